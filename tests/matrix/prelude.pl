# What hostile scripts use. Arguments: the pinned file, a directory of its filesystem, the process that serves it,
# the device.
# Every script says "done", or "errno N" of the step that was refused.
use strict;
use Fcntl qw(O_RDONLY O_RDWR O_CREAT O_TRUNC);
our ($f, $dir, $pid, $dev) = @ARGV;
our $h;
$| = 1;

sub fail { print "errno ", $! + 0, "\n"; exit 0 }
sub done { print "done\n"; exit 0 }
sub told { my $r = shift; fail() if !defined $r || $r eq "-1"; $r }

sub opened { my ($path, $flags) = @_; sysopen(my $file, $path, $flags, 0644) or fail(); $file }

# Tries until the file is let go; the mark denies meanwhile.
sub broken_in {
    my ($path, $flags) = @_;
    for (1 .. 2000) {
        my $file;
        return $file if sysopen($file, $path, $flags);
        fail() unless $!{EPERM};
        select(undef, undef, undef, 0.01);
    }
    fail();
}

# The same for swapoff, which opens the file.
sub swapped_off {
    my $path = "$f\0";
    for (1 .. 2000) {
        return unless syscall(&SYS_SWAPOFF, $path) == -1;
        fail() unless $!{EPERM};
        select(undef, undef, undef, 0.01);
    }
    fail();
}

# A copy of the descriptor that the server has of the file: it is past the mark.
sub stolen {
    opendir(my $fds, "/proc/$pid/fd") or fail();
    my ($number) = grep { (readlink("/proc/$pid/fd/$_") // "") eq $f } readdir $fds;
    $! = 2, fail() unless defined $number;
    my $process = told(syscall(&SYS_PIDFD_OPEN, $pid + 0, 0));
    my $fd = told(syscall(&SYS_PIDFD_GETFD, $process, $number + 0, 0));
    open(my $file, "<&=", $fd) or fail();
    $file;
}

# The file once more, by what /proc shows of a descriptor of it.
sub reopened {
    my ($flags) = @_;
    my $server = stolen();
    opened("/proc/self/fd/" . fileno($server), $flags);
}

sub flags { my $file = shift; my $flags = pack("l!", 0); told(ioctl($file, 0x80086601, $flags)); unpack("l!", $flags) }
sub set_flags { my ($file, $flags) = @_; my $packed = pack("l!", $flags); told(ioctl($file, 0x40086602, $packed)) }
sub clear_flag { my $file = shift; set_flags($file, flags($file) & ~0x10) }

# Sets the flags without opening the file: file_setattr(2), from Linux 6.17 on.
sub clear_flag_by_path {
    my $attr = pack("QLLLL", 0, 0, 0, 0, 0);
    my $path = "$f\0";
    told(syscall(469, -100, $path, $attr, 24, 0));
}

# The flag is cleared by whatever way the kernel has.
sub cleared { clear_flag(stolen()) }

# The same, and the server can do nothing about it until this script ends: what is refused then is by the kernel alone.
my $held;
sub cleared_unseen { my $s = stolen(); kill("STOP", $pid) or fail(); $held = 1; clear_flag($s); $s }
END { kill("CONT", $pid) if $held }

sub fallocated { my ($mode, $at, $len) = @_; told(syscall(&SYS_FALLOCATE, fileno($h), $mode, $at, $len)) }
sub attributed { my ($path, $name, $value) = ("$f\0", "user.x\0", "v" x $_[0]); told(syscall(&SYS_SETXATTR, $path, $name, $value, $_[0], 0)) }
sub written { my ($file, $at, $data) = @_; sysseek($file, $at, 0); defined syswrite($file, $data) or fail() }
sub synced { my $file = shift; told(syscall(&SYS_FSYNC, fileno($file))) }

# Another file of this filesystem, to exchange blocks with.
# Where none can be made any more, one was made before.
sub donor {
    return opened("$dir/spare", O_RDWR) if -e "$dir/spare";
    my $file = opened("$dir/donor", O_RDWR | O_CREAT | O_TRUNC);
    written($file, 0, "D" x L);
    synced($file);
    $file;
}

sub cloned { my ($from, $to) = @_; my $number = fileno($from) + 0; told(ioctl($to, 0x40049409, $number)) }

sub cloned_range {
    my ($from, $from_at, $len, $to, $to_at) = @_;
    my $range = pack("qQQQ", fileno($from), $from_at, $len, $to_at);
    told(ioctl($to, 0x4020940d, $range));
}

# The status of the range: 0 when it was deduplicated, 1 when the content differs.
sub deduped {
    my ($from, $to, $at, $len) = @_;
    my $range = pack("QQSSLqQQlL", $at, $len, 1, 0, 0, fileno($to), $at, 0, 0, 0);
    told(ioctl($from, 0xc0189436, $range));
    my $status = (unpack("QQSSLqQQlL", $range))[8];
    $! = -$status, fail() if $status < 0;
    $status;
}
