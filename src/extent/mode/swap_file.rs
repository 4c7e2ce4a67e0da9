//! The swap-file guard: the file becomes a swap area of one page, so that the kernel itself refuses to change its map.
//!
//! ```text
//!   byte 0        4096            8192                                                end of the file
//!   | header      | the one page  | what is served ...                                |
//!   | last_page=1 | that may be   | the kernel never reads or writes it: the header   |
//!   |             | swapped to    | says that the area ends before                    |
//! ```
//!
//! The kernel sets `S_SWAPFILE` on the whole inode (`mm/swapfile.c`), and every path that could move, share, free or
//! convert a block of it looks at that. It stays when this process dies, and goes with swapoff or a reboot. Page 1 may
//! hold memory of anything that runs on this host: it is never served, and is wiped when the area ends.
//!
//! The order of the steps is given by the kernel: both swapon and swapoff open the file for writing, which the immutable
//! flag refuses; so the flag comes last and goes first.
//!
//! What it does not do: swap well. The area has the lowest priority, so that it is used when all others are full.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::danger;
use crate::extent::error::ExtentError;
use crate::extent::facts::{FileFacts, is_immutable, is_swap, number_of};
use crate::extent::sys;
use crate::extent::undo::change_flag;

/// The name of this guard in errors.
pub(in crate::extent) const SWAP_FILE: &str = "swap-file";

/// The page of a swap area, and of this machine: others are refused.
const PAGE_LEN: usize = 4096;
/// What is reserved at the beginning of the file: the header, and the one page that is swapped to.
pub(super) const RESERVED_LEN: usize = 2 * PAGE_LEN;
/// How often swapoff is tried again after a signal.
const ATTEMPTS: u32 = 100;
/// From how many areas on the limit is the likely reason for EPERM: 28 were seen to fit.
const AREAS_MANY: usize = 20;

/// The header of an area of one page (`union swap_header`, `linux/swap.h`).
fn header() -> [u8; PAGE_LEN] {
    /// Behind the boot block: version, last page, number of bad pages, UUID (16 bytes), label (16 bytes).
    const INFO: usize = 1024;
    const LABEL: &[u8; 16] = b"fastice-pin\0\0\0\0\0";
    const MAGIC: &[u8; 10] = b"SWAPSPACE2";
    let mut page = [0; PAGE_LEN];
    let (version, last_page) = (1_u32.to_ne_bytes(), 1_u32.to_ne_bytes());
    page[INFO..INFO + 4].copy_from_slice(&version);
    page[INFO + 4..INFO + 8].copy_from_slice(&last_page);
    page[INFO + 28..INFO + 44].copy_from_slice(LABEL);
    page[PAGE_LEN - MAGIC.len()..].copy_from_slice(MAGIC);
    page
}

/// What the reserved bytes of a file hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reserved {
    /// Our header.
    Ours,
    /// Zeros.
    Zeros,
    /// Something of the owner.
    Data,
}

fn reserved_of(file: &File) -> io::Result<Reserved> {
    let mut bytes = [0; RESERVED_LEN];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(judge(&bytes))
}

fn judge(bytes: &[u8; RESERVED_LEN]) -> Reserved {
    if bytes.starts_with(&header()) {
        Reserved::Ours
    } else if bytes.iter().all(|byte| *byte == 0) {
        Reserved::Zeros
    } else {
        Reserved::Data
    }
}

/// Whether the file begins with our header.
pub(in crate::extent) fn is_ours(file: &File) -> bool {
    reserved_of(file).is_ok_and(|reserved| reserved == Reserved::Ours)
}

fn is_on(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    is_swap(meta.ino(), number_of(meta.dev()))
}

/// What has to be done to a file so that it is a swap area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::extent) struct SwapPlan {
    /// It is one already, of ours.
    is_on: bool,
    /// The header is still to be written.
    pub(in crate::extent) write_header: bool,
}

impl SwapPlan {
    /// Looks at the file, and refuses where the guard is known to be dangerous. `may_overwrite`: the operator gave up
    /// what the reserved bytes hold.
    pub(in crate::extent) fn make(
        file: &File,
        facts: &FileFacts,
        may_overwrite: bool,
    ) -> Result<Self, ExtentError> {
        let path = facts.path.as_path();
        let refuse = |problem| Err(failed(path, problem, None));
        if rustix::param::page_size() != PAGE_LEN {
            return refuse("the pages of this machine are not of 4096 bytes");
        }
        if facts.size.get() <= RESERVED_LEN as u64 {
            return refuse("its first 8192 bytes are reserved, and it has no more");
        }
        let io = |error| ExtentError::io("read the first bytes of", path, error);
        let reserved = reserved_of(file).map_err(io)?;
        if facts.swap {
            return match reserved {
                Reserved::Ours => Ok(Self { is_on: true, write_header: false }),
                _ => refuse("it is a swap file of somebody else: swapoff it first"),
            };
        }
        let meta = file.metadata().map_err(|error| ExtentError::io("stat", path, error))?;
        if meta.uid() != 0 || meta.mode() & 0o077 != 0 {
            return refuse(
                "memory of this host may be swapped to it, and others than root may read it: chown root, chmod 600",
            );
        }
        danger::refuse(facts)?;
        match reserved {
            Reserved::Ours => Ok(Self { is_on: false, write_header: false }),
            _ if facts.immutable => {
                refuse("the header cannot be written, as the file is immutable: `chattr -i` it")
            }
            Reserved::Data if !may_overwrite => refuse(
                "its first 8192 bytes hold data, which the guard would destroy: --prepare gives them up",
            ),
            Reserved::Zeros | Reserved::Data => Ok(Self { is_on: false, write_header: true }),
        }
    }

    /// Writes the header if need be, and makes the file a swap area. `flag_is_foreign`: whoever set the immutable flag
    /// is not to lose it.
    pub(in crate::extent) fn carry_out<'a>(
        self,
        file: &'a File,
        path: &Path,
        flag_is_foreign: bool,
    ) -> Result<SwapArea<'a>, ExtentError> {
        let area = |restore_flag| SwapArea {
            file,
            path: path.to_owned(),
            plan: self,
            restore_flag,
            armed: !self.is_on,
        };
        if self.is_on {
            return Ok(area(false));
        }
        // After a reboot the flag of a kept pin is there and the swap area is not.
        let flagged = is_immutable(file, path)?;
        if flagged && flag_is_foreign {
            return Err(failed(
                path,
                "swapon cannot open it, as the file is immutable: `chattr -i` it",
                None,
            ));
        }
        let io = |error| ExtentError::io("write the swap header of", path, error);
        let area = area(flagged);
        if flagged {
            change_flag(file, false)
                .map_err(|error| ExtentError::io("clear the immutable flag of", path, error))?;
        }
        if self.write_header {
            let writer = open_write(file).map_err(io)?;
            let mut bytes = [0; RESERVED_LEN];
            bytes[..PAGE_LEN].copy_from_slice(&header());
            // The kernel reads the header through the page cache; a power loss must find it on the disk.
            writer.write_all_at(&bytes, 0).and_then(|()| writer.sync_all()).map_err(io)?;
        }
        sys::swap_on(file.as_fd()).map_err(|error| refused(path, error))?;
        Ok(area)
    }
}

/// A swap area that was begun for a pin under way. Dropped, it is ended, and the file is as it was.
pub(in crate::extent) struct SwapArea<'a> {
    file: &'a File,
    path: PathBuf,
    plan: SwapPlan,
    restore_flag: bool,
    armed: bool,
}

impl SwapArea<'_> {
    pub(in crate::extent) fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for SwapArea<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Err(error) = end(self.file, &self.path, self.plan.write_header) {
            let error = crate::chain::Chain(&error).to_string();
            tracing::error!(path = %self.path.display(), error, "cannot end the swap area of a failed pin");
        }
        if self.restore_flag
            && let Err(error) = change_flag(self.file, true)
        {
            tracing::error!(path = %self.path.display(), %error, "cannot set the immutable flag again");
        }
    }
}

/// Ends the swap area, and wipes what the kernel may have swapped to it, with the header if that was written by us.
/// Whether there was one. A flag that somebody else set is taken away for the moment.
pub(in crate::extent) fn end(file: &File, path: &Path, header_written: bool) -> Result<bool, ExtentError> {
    let io = |action| move |error| ExtentError::io(action, path, error);
    let is_on = is_on(file).map_err(io("look for swap files while ending that of"))?;
    if !is_on && !is_ours(file) {
        return Ok(false);
    }
    let flagged = is_immutable(file, path)?;
    if flagged {
        change_flag(file, false).map_err(io("clear the immutable flag of"))?;
    }
    let ended = if is_on { swap_off(file).map_err(io("end the swap area of")) } else { Ok(()) };
    let wiped = ended.and_then(|()| wipe(file, header_written).map_err(io("wipe the swap area of")));
    if flagged {
        change_flag(file, true).map_err(io("set the immutable flag again of"))?;
    }
    wiped.map(|()| is_on)
}

fn swap_off(file: &File) -> io::Result<()> {
    let mut attempt = 0;
    loop {
        match sys::swap_off(file.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && attempt < ATTEMPTS => attempt += 1,
            result => return result,
        }
    }
}

fn wipe(file: &File, header_too: bool) -> io::Result<()> {
    if !is_ours(file) {
        return Ok(());
    }
    let writer = open_write(file)?;
    let page = [0; PAGE_LEN];
    // The header last: as long as it is there, what is left of the wiping is done by the next attempt.
    writer.write_all_at(&page, PAGE_LEN as u64)?;
    writer.sync_all()?;
    if header_too {
        writer.write_all_at(&page, 0)?;
        writer.sync_all()?;
    }
    Ok(())
}

/// The very inode, whatever it is called by now.
fn open_write(file: &File) -> io::Result<File> {
    OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

pub(super) fn failed(path: &Path, problem: &'static str, source: Option<io::Error>) -> ExtentError {
    ExtentError::Guard { path: path.to_path_buf(), guard: SWAP_FILE, problem, source }
}

/// Why the kernel may not want it, as far as the error says.
fn refused(path: &Path, error: io::Error) -> ExtentError {
    let problem = match error.raw_os_error() {
        // The same error for both.
        Some(libc::EPERM) if area_count() >= AREAS_MANY => {
            "the kernel takes no more swap areas; the limit is one of the whole system, some 28"
        }
        Some(libc::EPERM) => "swapon is not allowed: it takes CAP_SYS_ADMIN",
        Some(libc::EINVAL) => {
            "swapon refused it: the filesystem takes no swap files, or not one with holes or shared blocks"
        }
        Some(libc::EBUSY) => "swapon refused it: it is in use as a swap area or under a loop device",
        Some(libc::ENOSYS) => "this kernel has no swap (CONFIG_SWAP)",
        _ => "swapon refused it",
    };
    failed(path, problem, Some(error))
}

fn area_count() -> usize {
    std::fs::read_to_string("/proc/swaps").map_or(0, |table| table.lines().skip(1).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_that_of_an_area_of_one_page() {
        let page = header();
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        let word = |at: usize| u32::from_ne_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        assert_eq!((word(1024), word(1028), word(1032)), (1, 1, 0), "version, last page, bad pages");
        assert_eq!(&page[1052..1063], b"fastice-pin");
        assert!(page[..1024].iter().all(|byte| *byte == 0), "room for a boot block");
        let nonzero = page.iter().filter(|byte| **byte != 0).count();
        assert_eq!(nonzero, 10 + 11 + 2);
    }

    #[test]
    fn what_belongs_to_the_owner_is_told_from_zeros_and_our_header() {
        let mut bytes = [0; RESERVED_LEN];
        assert_eq!(judge(&bytes), Reserved::Zeros);
        bytes[RESERVED_LEN - 1] = 1;
        assert_eq!(judge(&bytes), Reserved::Data);
        bytes[..PAGE_LEN].copy_from_slice(&header());
        assert_eq!(judge(&bytes), Reserved::Ours, "the second page is the kernel's");
        bytes[1028] = 2;
        assert_eq!(judge(&bytes), Reserved::Data, "another area");
    }

    #[test]
    fn a_file_that_is_no_swap_area_is_left_alone() {
        let mut file = tempfile::tempfile().expect("a file");
        io::Write::write_all(&mut file, &[7; 3 * PAGE_LEN]).expect("room");
        assert!(!end(&file, Path::new("/x"), true).expect("nothing to do"));
        let mut found = [0; 3 * PAGE_LEN];
        file.read_exact_at(&mut found, 0).expect("it is there");
        assert_eq!(found, [7; 3 * PAGE_LEN]);
    }
}
