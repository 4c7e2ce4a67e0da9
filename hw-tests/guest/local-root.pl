#!/usr/bin/env perl
# A local root who breaks a pin, and the look at every block afterwards. x86_64 only, as the guests are.
#
#   unflag PID FILE             clears the immutable flag of FILE, which process PID serves
#   recall PID FILE LEN THIEF   the same, truncates FILE to LEN bytes by its path, and has THIEF take every free block
#   timeline FILE...            lines of "microseconds since 1970, tab, text", in order, counted from the first
#   events SINCE FENCED FILE... the target's own events (FILE: lines of JSON) from SINCE on, as lines of a timeline. They are
#                               to the millisecond, but some say how many microseconds after the fence, which fell at FENCED
#   blocks IMAGE OLD_MAP LEN BEFORE ACKED THIEF_MAP
#                               judges every block of the filesystem in IMAGE, which is not mounted
#
# What recall does is told line by line, each with its time, as a part of a timeline.
use strict;
use warnings;

use constant { PIDFD_OPEN => 434, PIDFD_GETFD => 438, CLOCK_GETTIME => 228 };
use constant { FS_IOC_GETFLAGS => 0x80086601, FS_IOC_SETFLAGS => 0x40086602, FS_IMMUTABLE_FL => 0x10 };
# Bytes of a block that say who wrote it, and to which offset of its file: repeated until it is full.
use constant { BLOCK => 4096, REMOTE => 'FASTICE-REMOTE!!', LOCAL => 'FASTICE-LOCAL!!!' };

$| = 1;

sub now_us {
    my $time = pack 'q2', 0, 0;
    syscall(CLOCK_GETTIME, 0, $time) == 0 or die "clock_gettime: $!\n";
    my ($seconds, $nanoseconds) = unpack 'q2', $time;
    return $seconds * 1_000_000 + int($nanoseconds / 1000);
}

sub told { print now_us(), "\t", @_, "\n" }

sub block_of { my ($who, $offset) = @_; return substr(($who . pack 'Q<', $offset) x 171, 0, BLOCK) }

# The open-permission mark denies whoever opens the file, chattr too: so by a copy of the server's own descriptor.
sub unflag {
    my ($pid, $path) = @_;
    opendir(my $fds, "/proc/$pid/fd") or die "/proc/$pid/fd: $!\n";
    my ($number) = grep { (readlink("/proc/$pid/fd/$_") // '') eq $path } readdir $fds;
    defined $number or die "process $pid has no descriptor of $path\n";
    my $process = syscall(PIDFD_OPEN, $pid + 0, 0);
    $process >= 0 or die "pidfd_open: $!\n";
    my $fd = syscall(PIDFD_GETFD, $process, $number + 0, 0);
    $fd >= 0 or die "pidfd_getfd: $!\n";
    open(my $file, '<&=', $fd) or die "descriptor: $!\n";
    my $flags = pack 'Q', 0;
    defined ioctl($file, FS_IOC_GETFLAGS, $flags) or die "FS_IOC_GETFLAGS: $!\n";
    my $kept = pack 'Q', unpack('L', $flags) & ~FS_IMMUTABLE_FL;
    my $before = now_us();
    defined ioctl($file, FS_IOC_SETFLAGS, $kept) or die "FS_IOC_SETFLAGS: $!\n";
    return $before;
}

sub recall {
    my ($pid, $path, $len, $thief) = @_;
    my $cleared = unflag($pid, $path);
    my $begun = now_us();
    truncate($path, $len) or die "truncate: $!\n";
    my $ended = now_us();
    print "$cleared\tlocal root: chattr -i\n$begun\tlocal root: truncate to $len bytes: waits for the lease\n";
    print "$ended\tlocal root: truncate returns: the guard has let go\n";
    open(my $file, '>', $thief) or die "$thief: $!\n";
    my $offset = 0;
    while (defined syswrite $file, block_of(LOCAL, $offset)) { $offset += BLOCK }
    $!{ENOSPC} or die "$thief: $!\n";
    told("another local file has taken every free block, ", $offset / BLOCK, " of them");
    require IO::Handle;
    $file->sync or die "fsync: $!\n";
    told("and is on the disk");
}

sub timeline {
    my @lines = sort { $a->[0] <=> $b->[0] } map { [split /\t/, $_, 2] } lines_of(@_);
    my $zero = (grep { $_->[1] =~ /chattr -i/ } @lines)[0] // $lines[0];
    printf "  %+11.6f s  %s\n", ($_->[0] - $zero->[0]) / 1e6, $_->[1] for @lines;
}

sub events {
    my ($since, $fenced, @files) = @_;
    for (lines_of(@files)) {
        my ($at) = /"at_ms":(\d+)/ or next;
        my ($step) = /"step":"([^"]+)"/ or next;
        my $detail = /"detail":"((?:[^"\\]|\\.)*)"/ ? ": $1" : '';
        # By the end of its millisecond at the latest.
        my $us = $at * 1000 + 999;
        next if $us < $since;
        $us = $fenced + $1 if $detail =~ /(\d+) us after it was noticed/;
        $us = $fenced if $step eq 'recalled';
        print "$us\ttarget: $step$detail\n";
    }
}

sub lines_of {
    my @lines;
    for my $name (@_) {
        open(my $file, '<', $name) or die "$name: $!\n";
        chomp(my @of = <$file>);
        push @lines, @of;
    }
    return @lines;
}

# The filesystem's blocks of a file, by the lines of map_of (sectors): filesystem block => block of the file.
sub map_of {
    my %blocks;
    for (lines_of(@_)) {
        my ($file, $device, $count) = split ' ';
        die "not aligned: $_\n" if grep { $_ % (BLOCK / 512) } $file, $device, $count;
        $blocks{ ($device + $_) * 512 / BLOCK } = ($file + $_) * 512 / BLOCK
            for map { $_ * BLOCK / 512 } 0 .. $count * 512 / BLOCK - 1;
    }
    return \%blocks;
}

sub blocks {
    my ($image, $old_map, $len, $before, $acked, $thief_map) = @_;
    my ($old, $thief) = (map_of($old_map), map_of($thief_map));
    my %acked = map { $_ => 1 } map { split ' ' } lines_of($acked);
    open(my $disk, '<:raw', $image) or die "$image: $!\n";
    open(my $was, '<:raw', $before) or die "$before: $!\n";
    my (%count, @wrong);
    for (my $at = 0; sysread $disk, my $data, BLOCK; $at++) {
        my $of = $old->{$at};
        if (defined $of && $of * BLOCK < $len) {
            my $is_remote = $data eq block_of(REMOTE, $of * BLOCK);
            sysseek $was, $of * BLOCK, 0;
            sysread $was, my $old_data, BLOCK;
            if ($is_remote) { $count{ $acked{$of} ? 'acknowledged' : 'unanswered' }++ }
            elsif ($acked{$of}) { push @wrong, "block $of of the file: acknowledged, and not there" }
            elsif ($data eq $old_data) { $count{untouched}++ }
            else { push @wrong, "block $of of the file holds neither what it held nor what was written to it" }
        } elsif (defined $thief->{$at}) {
            if ($data eq block_of(LOCAL, $thief->{$at} * BLOCK)) { $count{thief}++ }
            else { push @wrong, "block $at of the filesystem is another file's, and holds something else" }
            $count{reused}++ if defined $of;
        } elsif (index($data, REMOTE) >= 0) {
            # Freed, and nobody's since: what was written there before the guard let go.
            if (defined $of && $data eq block_of(REMOTE, $of * BLOCK)) { $count{freed}++ }
            else { push @wrong, "block $at of the filesystem holds a remote write, and was never the file's" }
        } else {
            $count{others}++;
        }
    }
    my $cut = grep { $_ * BLOCK >= $len } keys %acked;
    printf "every block of the filesystem: %d acknowledged writes in what is left, all there (%d more were cut off); %d writes there that were "
        . "never answered; %d blocks there untouched; %d blocks of the other local file, all its own, %d of them the file's before; "
        . "%d freed and not taken; %d others without a remote byte\n",
        (map { $count{$_} // 0 } 'acknowledged'), $cut, (map { $count{$_} // 0 } qw(unanswered untouched thief reused freed others));
    print "$_\n" for @wrong[0 .. ($#wrong < 9 ? $#wrong : 9)];
    die scalar(@wrong) . " wrong blocks\n" if @wrong;
    die "nothing was acknowledged in what is left\n" unless $count{acknowledged};
    die "nothing of the file was given to another\n" unless $count{reused};
}

my ($verb, @arguments) = @ARGV;
my %verbs = (unflag => \&unflag, recall => \&recall, timeline => \&timeline, events => \&events, blocks => \&blocks);
my $do = $verbs{ $verb // '' } or die "usage: see the beginning of $0\n";
$do->(@arguments);
