//! Freezing a filesystem, and swap areas in its files.

#![expect(unsafe_code, reason = "ioctl and swapon have no safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::ioctl;

use super::check;

/// Freezes the filesystem of `file`: `FIFREEZE`. EBUSY when it is frozen.
pub(in crate::extent) fn freeze(file: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 119, int)`; the argument is not read.
    const FIFREEZE: ioctl::Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 119);
    // SAFETY: FIFREEZE neither reads nor writes by its argument (`ioctl_fsfreeze` of the kernel takes none).
    unsafe { Ok(ioctl::ioctl(file, ioctl::NoArg::<FIFREEZE>::new())?) }
}

/// Thaws it: `FITHAW`. EINVAL when it is not frozen.
pub(in crate::extent) fn thaw(file: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 120, int)`; the argument is not read.
    const FITHAW: ioctl::Opcode = ioctl::opcode::read_write::<libc::c_int>(b'X', 120);
    // SAFETY: as in `freeze`.
    unsafe { Ok(ioctl::ioctl(file, ioctl::NoArg::<FITHAW>::new())?) }
}

/// Makes `file` a swap area, of the lowest priority: areas that were there before are filled first. Found through the
/// descriptor, whatever the file is called by now; the kernel opens it for writing.
pub(in crate::extent) fn swap_on(file: BorrowedFd<'_>) -> io::Result<()> {
    let path = own_path(file)?;
    // SAFETY: swapon reads a string that ends in a null byte, which a CString is.
    check(unsafe { libc::swapon(path.as_ptr(), 0) }).map(drop)
}

/// Ends the swap area on `file`, which the kernel opens for writing. EINTR when a signal came.
pub(in crate::extent) fn swap_off(file: BorrowedFd<'_>) -> io::Result<()> {
    swap_off_by_path(&own_path(file)?)
}

/// Ends the swap area on the file at `path`.
pub(in crate::extent) fn swap_off_by_path(path: &CStr) -> io::Result<()> {
    // SAFETY: as in `swap_on`.
    check(unsafe { libc::swapoff(path.as_ptr()) }).map(drop)
}

fn own_path(file: BorrowedFd<'_>) -> io::Result<CString> {
    Ok(CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}
