//! The operations, as perl that works on the pinned file, by the names that the facts about pins give them.
//!
//! `L` is the length of the file, `H` the half of it, `Q` a quarter. All changes are in the second half, so that the first
//! must stay what hosts wrote, whatever becomes of the second.

use std::io::Write as _;
use std::process::Command;

use crate::loopfs::Spec;

/// The filesystems of the matrix, as small as they may be.
pub(crate) const XFS: Spec = Spec { size_mib: 320, ..Spec::XFS };
/// XFS without shared extents.
pub(crate) const PLAIN: Spec = Spec { mkfs: &["-q", "-m", "reflink=0,rmapbt=0"], ..XFS };
/// Ordinary users get all of it. Without checksums, for `EXT4_IOC_SWAP_BOOT` leaves wrong ones behind in extent blocks.
pub(crate) const EXT4: Spec = Spec {
    mkfs: &["-q", "-F", "-m", "0", "-b", "4096", "-O", "^metadata_csum"],
    size_mib: 128,
    ..Spec::EXT4
};

/// Where an operation is possible at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    All,
    Xfs,
    Reflink,
    Ext4,
}

impl On {
    pub(crate) fn fits(self, spec: &Spec) -> bool {
        match self {
            Self::All => true,
            Self::Xfs => spec.kind == "xfs",
            Self::Reflink => spec.mkfs == XFS.mkfs,
            Self::Ext4 => spec.kind == "ext4",
        }
    }
}

/// Says that this kernel does not know what is to be tried.
fn skip(name: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {why}");
}

/// Whether this kernel has `file_setattr`; says so when it has not.
pub(crate) fn has_file_setattr() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
    let has = (numbers.next(), numbers.next()) >= (Some(6), Some(17));
    if !has {
        skip("file_setattr", "it came with Linux 6.17");
    }
    has
}

/// Whether this kernel has overlays; says so when it has not.
pub(crate) fn has_overlays() -> bool {
    let filesystems = std::fs::read_to_string("/proc/filesystems").expect("a list");
    let has = filesystems.contains("overlay")
        || Command::new("modprobe").arg("overlay").status().is_ok_and(|status| status.success());
    if !has {
        skip("overlays over pinned files", "this kernel has no overlayfs");
    }
    has
}

/// A change of the file through `$h`, which is open for reading and writing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) name: &'static str,
    pub(crate) on: On,
    pub(crate) perl: &'static str,
    /// Whether the second half is still what hosts wrote, and where.
    pub(crate) leaves: Leaves,
    /// The filesystem copies what the second half holds to the other file or the same.
    pub(crate) copies: bool,
    /// It may be refused for what it is, or must be, with this.
    pub(crate) may_fail: Option<i32>,
    pub(crate) must_fail: bool,
}

/// Where the halves of the file are after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    Both,
    First,
    /// Both, in the file that was exchanged with it.
    InDonor,
    Nothing,
}

const fn change(name: &'static str, on: On, leaves: Leaves, perl: &'static str) -> Change {
    Change { name, on, perl, leaves, copies: false, may_fail: None, must_fail: false }
}

pub(crate) const CHANGES: &[Change] = &[
    change("fa_punch", On::All, Leaves::First, "fallocated(3, H, Q);"),
    change("fa_zero", On::All, Leaves::First, "fallocated(16, H, Q);"),
    Change {
        may_fail: Some(libc::EOPNOTSUPP),
        ..change("fa_writezeroes", On::All, Leaves::First, "fallocated(128, H, Q);")
    },
    change("fa_collapse", On::All, Leaves::First, "fallocated(8, H, Q);"),
    change("fa_insert", On::All, Leaves::First, "fallocated(32, H, Q);"),
    change("fa_keep", On::All, Leaves::Both, "fallocated(1, L, Q);"),
    change("fa_alloc", On::All, Leaves::Both, "fallocated(0, L, Q);"),
    change("fa_unshare", On::Reflink, Leaves::Both, "fallocated(64, H, Q);"),
    change("ftruncate_shrink", On::All, Leaves::First, "truncate($h, H) or fail();"),
    change("ftruncate_grow", On::All, Leaves::Both, "truncate($h, L + Q) or fail();"),
    change("write_inplace", On::All, Leaves::First, "written($h, H, 'W' x 65536); synced($h);"),
    change("write_extend", On::All, Leaves::Both, "written($h, L, 'W' x 65536); synced($h);"),
    change("ficlonerange_into", On::Reflink, Leaves::First, "cloned_range(donor(), H, Q, $h, H);"),
    change(
        "copyrange_into",
        On::All,
        Leaves::First,
        "my ($from, $to) = (pack('q', H), pack('q', H)); \
         told(syscall(&SYS_COPY_FILE_RANGE, fileno(donor()), $from, fileno($h), $to, Q, 0)); synced($h);",
    ),
    change(
        "xfs_unresvsp",
        On::Xfs,
        Leaves::First,
        "my $range = pack('ssx4qqlLl4', 0, 0, H, Q, 0, 0, 0, 0, 0, 0); told(ioctl($h, 0x4030582b, $range));",
    ),
    change(
        "xfs_swapext",
        On::Xfs,
        Leaves::InDonor,
        "donor(); open(STDIN, '+<&', $h); \
         my $said = qx(xfs_io -c 'swapext $dir/donor' /proc/self/fd/0 2>&1); die $said if $said =~ /\\S/;",
    ),
    Change {
        may_fail: Some(libc::EOPNOTSUPP),
        ..change(
            "xfs_exchrange",
            On::Xfs,
            Leaves::First,
            "my $d = donor(); my $range = pack('lLQQQQ', fileno($d), 0, H, H, Q, 0); \
             told(ioctl($h, 0x40285881, $range));",
        )
    },
    Change {
        copies: true,
        ..change(
            "ext4_moveext",
            On::Ext4,
            Leaves::Both,
            "my $d = donor(); my $range = pack('LLQQQQ', 0, fileno($d), H / 4096, H / 4096, Q / 4096, 0); \
             told(ioctl($h, 0xc028660f, $range)); die 'nothing moved' unless (unpack('LLQQQQ', $range))[5];",
        )
    },
    change("ext4_swapboot", On::Ext4, Leaves::Nothing, "told(ioctl($h, 0x6611, 0));"),
];

/// Frees blocks, cuts the file, exchanges blocks.
pub(crate) const ONE_OF_EACH_KIND: &[&str] = &["fa_punch", "ftruncate_shrink", "xfs_swapext", "ext4_moveext"];

/// Who tries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Anybody,
    Root,
    /// Somebody without any privilege, who may read and write the file as far as its mode goes.
    Ordinary,
}

/// What is tried by path, or by another way to a descriptor. It ends well or tells an errno.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub(crate) name: &'static str,
    pub(crate) on: On,
    pub(crate) who: Who,
    pub(crate) perl: &'static str,
}

const fn attempt(name: &'static str, on: On, who: Who, perl: &'static str) -> Attempt {
    Attempt { name, on, who, perl }
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    attempt("open_rdonly", On::All, Who::Anybody, "opened($f, O_RDONLY);"),
    attempt("odirect_read", On::All, Who::Anybody, "opened($f, O_RDONLY | O_DIRECT);"),
    attempt("open_rw_only", On::All, Who::Anybody, "opened($f, O_RDWR);"),
    attempt("open_trunc", On::All, Who::Anybody, "opened($f, O_RDWR | O_TRUNC);"),
    attempt("truncate_shrink", On::All, Who::Anybody, "truncate($f, H) or fail();"),
    attempt("truncate_grow", On::All, Who::Anybody, "truncate($f, L + Q) or fail();"),
    attempt("truncate_same", On::All, Who::Anybody, "truncate($f, L) or fail();"),
    attempt("unlink", On::All, Who::Anybody, "unlink($f) or fail();"),
    attempt("rename", On::All, Who::Anybody, "rename($f, \"$f.away\") or fail();"),
    attempt("rename_over", On::All, Who::Anybody, "donor(); rename(\"$dir/donor\", $f) or fail();"),
    attempt("hardlink", On::All, Who::Anybody, "link($f, \"$f.link\") or fail();"),
    attempt("setxattr", On::All, Who::Anybody, "attributed(9);"),
    attempt("setxattr_big", On::All, Who::Anybody, "attributed(3000);"),
    attempt("chmod", On::All, Who::Anybody, "chmod(0600, $f) or fail();"),
    attempt("chown", On::All, Who::Anybody, "chown(1, 1, $f) or fail();"),
    attempt("utimes", On::All, Who::Anybody, "utime(1, 1, $f) or fail();"),
    attempt(
        "ficlone_from",
        On::Reflink,
        Who::Anybody,
        "cloned(opened($f, O_RDONLY), opened(\"$dir/clone\", O_RDWR | O_CREAT));",
    ),
    attempt("dedupe_from", On::Reflink, Who::Anybody, "deduped(opened($f, O_RDONLY), donor(), 0, Q);"),
    attempt("dedupe_into_rdonly", On::Reflink, Who::Anybody, "deduped(donor(), opened($f, O_RDONLY), 0, Q);"),
    attempt("chattr_-i", On::All, Who::Anybody, "clear_flag(opened($f, O_RDONLY));"),
    attempt("chattr_+a", On::All, Who::Anybody, "my $file = opened($f, O_RDONLY); set_flags($file, 0x20);"),
    attempt(
        "chattr_+j",
        On::Ext4,
        Who::Anybody,
        "my $file = opened($f, O_RDONLY); set_flags($file, 0x4000);",
    ),
    attempt("chattr_-e", On::Ext4, Who::Anybody, "my $file = opened($f, O_RDONLY); set_flags($file, 0);"),
    attempt(
        "fssetx_extsize",
        On::All,
        Who::Anybody,
        "my $attr = pack('LLLLLx8', 0x800, 65536, 0, 0, 0); told(ioctl(opened($f, O_RDONLY), 0x401c5820, $attr));",
    ),
    attempt("reopen_proc", On::All, Who::Root, "reopened(O_RDONLY);"),
    attempt("reopen_proc to write", On::All, Who::Root, "reopened(O_RDWR);"),
    attempt(
        "open_by_handle_at",
        On::All,
        Who::Root,
        "my ($path, $handle, $id) = (\"$f\\0\", pack('Ll', 128, 0) . \"\\0\" x 128, pack('l', 0)); \
         told(syscall(&SYS_NAME_TO_HANDLE_AT, -100, $path, $handle, $id, 0)); \
         my $mount = opened($dir, O_RDONLY); \
         told(syscall(&SYS_OPEN_BY_HANDLE_AT, fileno($mount), $handle, O_RDONLY));",
    ),
    attempt("swapon", On::All, Who::Anybody, "my $path = \"$f\\0\"; told(syscall(&SYS_SWAPON, $path, 0));"),
    attempt(
        "fallocate by the server's descriptor",
        On::All,
        Who::Root,
        "$h = stolen(); fallocated(3, H, Q);",
    ),
    attempt(
        "truncate by the server's descriptor",
        On::All,
        Who::Root,
        "told(syscall(&SYS_FTRUNCATE, fileno(stolen()), H));",
    ),
    attempt("the server's descriptors", On::All, Who::Ordinary, "stolen();"),
    attempt(
        "a descriptor of the server by its number",
        On::All,
        Who::Ordinary,
        "told(syscall(&SYS_PIDFD_GETFD, told(syscall(&SYS_PIDFD_OPEN, $pid + 0, 0)), 3, 0));",
    ),
    attempt("the end of the server", On::All, Who::Ordinary, "kill(9, $pid) or fail();"),
    attempt("the device", On::All, Who::Ordinary, "opened($dev, O_RDWR);"),
    attempt("fifreeze", On::All, Who::Ordinary, "told(ioctl(opened($dir, O_RDONLY), 0xc0045877, 0));"),
    attempt("file_setattr", On::All, Who::Ordinary, "clear_flag_by_path();"),
    attempt(
        "umount",
        On::All,
        Who::Ordinary,
        "my $path = \"$dir\\0\"; told(syscall(&SYS_UMOUNT2, $path, 2));",
    ),
];

/// What breaks a pin without a swap area.
pub(crate) const SWAP_ATTEMPTS: &[Attempt] = &[
    attempt(
        "ficlone_from by the server's descriptor",
        On::Reflink,
        Who::Root,
        "cloned(stolen(), opened(\"$dir/clone\", O_RDWR | O_CREAT));",
    ),
    attempt(
        "dedupe_into by the server's descriptor",
        On::Reflink,
        Who::Root,
        "deduped(donor(), stolen(), H, Q);",
    ),
    attempt("swapoff", On::All, Who::Anybody, "my $path = \"$f\\0\"; told(syscall(&SYS_SWAPOFF, $path));"),
];

/// What comes of a descriptor of a reader, where readers are let in.
pub(crate) const READER_ATTEMPTS: &[Attempt] = &[
    attempt(
        "read by a reader",
        On::All,
        Who::Anybody,
        "my $r = opened($f, O_RDONLY); sysread($r, my $data, L) == L or fail();",
    ),
    attempt(
        "ficlone_from a reader",
        On::All,
        Who::Anybody,
        "cloned(opened($f, O_RDONLY), opened(\"$dir/clone\", O_RDWR | O_CREAT));",
    ),
    attempt(
        "ficlonerange_from a reader",
        On::All,
        Who::Anybody,
        "cloned_range(opened($f, O_RDONLY), H, Q, opened(\"$dir/clone\", O_RDWR | O_CREAT), H);",
    ),
    attempt("dedupe_from a reader", On::All, Who::Anybody, "deduped(opened($f, O_RDONLY), donor(), 0, Q);"),
    attempt("dedupe_into a reader", On::All, Who::Root, "deduped(donor(), opened($f, O_RDONLY), 0, Q);"),
    // A copy through the page cache. What hosts wrote does not stay in it, for the scan of the disk would find that.
    attempt(
        "copyrange_from a reader",
        On::All,
        Who::Anybody,
        "my ($r, $c) = (opened($f, O_RDONLY), opened(\"$dir/clone\", O_RDWR | O_CREAT)); \
         told(syscall(&SYS_COPY_FILE_RANGE, fileno($r), 0, fileno($c), 0, L, 0)); \
         written($c, 0, \"\\0\" x L); synced($c);",
    ),
    attempt(
        "write_inplace by a reader",
        On::All,
        Who::Anybody,
        "written(opened($f, O_RDONLY), H, 'W' x 4096);",
    ),
    attempt("fa_punch by a reader", On::All, Who::Anybody, "$h = opened($f, O_RDONLY); fallocated(3, H, Q);"),
    attempt(
        "ftruncate by a reader",
        On::All,
        Who::Anybody,
        "told(syscall(&SYS_FTRUNCATE, fileno(opened($f, O_RDONLY)), H));",
    ),
    attempt(
        "mmap_inplace by a reader",
        On::All,
        Who::Anybody,
        "my $r = opened($f, O_RDONLY); my $at = syscall(&SYS_MMAP, 0, 4096, 3, 1, fileno($r), 0); told($at);",
    ),
    attempt(
        "ext4_moveext by a reader",
        On::Ext4,
        Who::Anybody,
        "my $d = donor(); my $range = pack('LLQQQQ', 0, fileno($d), H / 4096, H / 4096, Q / 4096, 0); \
         told(ioctl(opened($f, O_RDONLY), 0xc028660f, $range));",
    ),
    attempt(
        "ext4_swapboot by a reader",
        On::Ext4,
        Who::Root,
        "told(ioctl(opened($f, O_RDONLY), 0x6611, 0));",
    ),
    attempt(
        "xfs_unresvsp by a reader",
        On::Xfs,
        Who::Anybody,
        "my $range = pack('ssx4qqlLl4', 0, 0, H, Q, 0, 0, 0, 0, 0, 0); \
         told(ioctl(opened($f, O_RDONLY), 0x4030582b, $range));",
    ),
];

/// What programs do with a file that they may read. `{f}` is the file, `{d}` its directory, `{m}` the filesystem.
pub(crate) const READER_COMMANDS: &[(&str, On, &str)] = &[
    ("cat of a reader", On::All, "cat {f} > /dev/null"),
    ("dd of a reader", On::All, "dd if={f} of=/dev/null bs=64k iflag=direct status=none"),
    // A reader may be at work on what is mounted.
    (
        "bind mount over what a reader has",
        On::All,
        "mount --bind {m}/filler {f} && sleep 0.1; umount --lazy {f}",
    ),
    ("filefrag of a reader", On::All, "filefrag {f} | grep -q extent"),
    (
        "losetup of a reader",
        On::All,
        "l=$(losetup --read-only --find --show {f}) && cat $l > /dev/null; code=$?; losetup -d $l; exit $code",
    ),
    (
        "copy up of an overlay of a reader",
        On::All,
        "o=$(mktemp -d /dev/shm/fastice-overlay-XXXXXX); mkdir $o/up $o/work $o/seen; \
         mount -t overlay -o lowerdir={d},upperdir=$o/up,workdir=$o/work overlay $o/seen && \
         cat $o/seen/file-1 > /dev/null && ! sh -c \"echo x >> $o/seen/file-1\"; code=$?; umount $o/seen; rm -rf $o; exit $code",
    ),
];

/// What gets past the mark and would break the default pin: on a frozen filesystem it waits.
pub(crate) const FROZEN_ATTEMPTS: &[Attempt] = &[
    attempt("chattr_-i by the server's descriptor", On::All, Who::Root, "clear_flag(stolen());"),
    attempt("chattr_-i by file_setattr", On::All, Who::Root, "clear_flag_by_path();"),
    attempt("ficlone_from by the server's descriptor", On::Reflink, Who::Root, "cloned(stolen(), donor());"),
    attempt(
        "dedupe_from by the server's descriptor",
        On::Reflink,
        Who::Root,
        "deduped(stolen(), donor(), H, Q);",
    ),
    attempt(
        "dedupe_into by the server's descriptor",
        On::Reflink,
        Who::Root,
        "deduped(donor(), stolen(), H, Q);",
    ),
    attempt("write beside it", On::All, Who::Anybody, "written(donor(), 0, 'W' x 4096);"),
    attempt("fa_punch beside it", On::All, Who::Anybody, "$h = donor(); fallocated(3, H, Q);"),
    attempt("create beside it", On::All, Who::Anybody, "opened(\"$dir/clone\", O_RDWR | O_CREAT);"),
];
