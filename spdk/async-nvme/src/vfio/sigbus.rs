//! What becomes of an access to a BAR that is not there any more.
//!
//! The kernel answers it with SIGBUS, which would end the process. A handler looks whether the address lies in one
//! of the ranges that are guarded here. If so, it marks the range as gone, puts ordinary memory in its place, and
//! lets the access go on; whoever made it sees the mark and takes the value for all ones. Any other SIGBUS goes to
//! the handler that was there before.
#![expect(unsafe_code, reason = "a signal handler, and a mapping that it replaces")]

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// At most so many ranges at a time: one or two for each controller.
const RANGES_MAX: usize = 256;

/// A guarded range; `start` is 0 while there is none.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    gone: AtomicBool,
}

static SLOTS: [Slot; RANGES_MAX] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        gone: AtomicBool::new(false),
    }
}; RANGES_MAX];

/// The handler that was there before; set before ours can run.
static BEFORE: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

/// The guard of one range, ended on drop.
pub(super) struct Guard {
    slot: &'static Slot,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("gone", &self.is_gone()).finish_non_exhaustive()
    }
}

impl Guard {
    /// Guards `len` bytes from `start`, page aligned, the first time also installing the handler.
    ///
    /// # Safety
    /// The range is a mapping of the caller's that no Rust reference points into, and that stays mapped as long as
    /// the guard. Its content may become zeros at any time.
    ///
    /// # Errors
    /// When the handler cannot be installed, or too many ranges are guarded.
    pub(super) unsafe fn new(start: usize, len: usize) -> io::Result<Self> {
        install()?;
        let free = |slot: &&Slot| {
            slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = SLOTS.iter().find(free).ok_or_else(|| io::Error::other("too many BARs are mapped"))?;
        slot.gone.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Ok(Self { slot })
    }

    /// Whether an access to the range failed. Asked after an access, it holds for that access.
    pub(super) fn is_gone(&self) -> bool {
        self.slot.gone.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.start.store(0, Ordering::Release);
        self.slot.taken.store(false, Ordering::Release);
    }
}

fn install() -> io::Result<()> {
    let before = BEFORE.get_or_init(|| {
        // SAFETY: a `sigaction` of zeros is one with the default action and an empty mask.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only asks, into a local of the right type.
        if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) } != 0 {
            return Err(errno());
        }
        Ok(before)
    });
    before.map_err(io::Error::from_raw_os_error)?;
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: as above.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = on_sigbus as *const () as usize;
        // On the alternate stack, for the handler before may be the one that reports an overflowing stack.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler has the type that SA_SIGINFO asks for, and does only what a handler may do.
        match unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(errno()),
        }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// Atomics and two system calls: nothing that could wait for what it interrupted.
extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, whose address field holds for SIGBUS.
    let (address, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    // A code of 0 or less: sent by a process, so that the address means nothing.
    if code > 0 && replace_range_at(address) {
        return;
    }
    pass_on(signal, info, context);
}

fn replace_range_at(address: usize) -> bool {
    for slot in &SLOTS {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        if start == 0 || address.wrapping_sub(start) >= len {
            continue;
        }
        // Marked before zeros can be read there by another thread.
        slot.gone.store(true, Ordering::SeqCst);
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: libc's own errno of this thread.
        let kept = unsafe { *libc::__errno_location() };
        // SAFETY: the range is a mapping whose owner has given leave to replace it (`Guard::new`).
        let got = unsafe {
            libc::mmap(std::ptr::with_exposed_provenance_mut(start), len, protection, flags, -1, 0)
        };
        // SAFETY: as above; the interrupted code must not see a change.
        unsafe { *libc::__errno_location() = kept };
        return got != libc::MAP_FAILED;
    }
    false
}

/// Does what would have been done without us.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.get().and_then(|before| before.as_ref().ok());
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // SAFETY: restores the default action and raises the signal again, which ends the process; both are
        // allowed in a handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    let wants_info = before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    if wants_info {
        // SAFETY: the address of a handler that was installed with SA_SIGINFO, so of this type.
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(handler) };
        handler(signal, info, context);
    } else {
        // SAFETY: the address of a handler that was installed without SA_SIGINFO, so of this type.
        let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
        handler(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap};

    use crate::vfio::kernel::Window as _;
    use crate::vfio::mmio::Mmio;

    const NAME: &str = "vfio::sigbus::tests::a_fault_elsewhere_ends_the_process_as_ever";
    const CHILD: &str = "ASYNC_NVME_SIGBUS_CHILD";

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_ever() {
        if std::env::var_os(CHILD).is_some() {
            fault_outside();
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", NAME]).env(CHILD, "1").output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    }

    /// Guards one mapping, which works, and faults in another.
    fn fault_outside() {
        let file = memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 8192).unwrap();
        let bar = Mmio::map(file.as_fd(), 0, 4096).unwrap();
        let (protection, null) = (ProtFlags::READ, std::ptr::null_mut());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let other = unsafe { mmap(null, 4096, protection, MapFlags::SHARED, &file, 4096).unwrap() };
        ftruncate(&file, 0).unwrap();
        assert_eq!(bar.read32(0), u32::MAX);
        // SAFETY: mapped above; that the process does not outlive this is what is tested.
        unsafe { other.cast::<u32>().read_volatile() };
    }
}
