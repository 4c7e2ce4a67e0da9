//! The C interface that the shim calls: `shim/fastice_fio.h` declares the same, and says what each function expects.
//!
//! Functions give 0 or an errno. A panic ends here, as an errno: fio's frames are no place for one.

#![expect(
    unsafe_code,
    reason = "the border to C: pointers of fio become references and slices here, and nowhere else"
)]

use std::ffi::{CStr, c_char, c_void};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use fastice::initiator::controller::{ConnectOptions, Host};
use fastice::initiator::transport::DEPTH_MAX;
use libc::c_int;
use nvme_spec::{Nsid, Status};

use crate::session::{self, Ending, Failure, Geometry, Job, Session, Taken, Work};

/// What a panic becomes: nothing can be said of the state behind it.
const PANICKED: c_int = libc::ENOTRECOVERABLE;
/// [`FiCommand::kind`].
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 2;
const TRIM: u32 = 3;

/// `struct fi_job`: the options of fio. Strings may be null where they have defaults.
#[repr(C)]
pub struct FiJob {
    traddr: *const c_char,
    subnqn: *const c_char,
    hostnqn: *const c_char,
    hostid: *const c_char,
    trsvcid: u32,
    nsid: u32,
    queue_size: u32,
    iodepth: u32,
    keep_alive_tmo_s: u32,
    hdr_digest: u32,
    data_digest: u32,
    hipri: u32,
}

/// `struct fi_geometry`.
#[repr(C)]
pub struct FiGeometry {
    size: u64,
    block_size: u32,
    transfer_len_max: u32,
    read_only: u32,
    deallocates: u32,
}

/// `struct fi_message`: a text for people, cut to what fits.
#[repr(C)]
pub struct FiMessage {
    text: [c_char; 512],
}

/// `struct fi_command`. `data` is what is written, or where a read goes.
#[repr(C)]
pub struct FiCommand {
    tag: *mut c_void,
    data: *mut u8,
    offset: u64,
    len: u64,
    kind: u32,
    fua: u32,
}

/// `struct fi_event`: how the command of a tag ended.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FiEvent {
    tag: *mut c_void,
    errno: c_int,
    /// 0 when there was none.
    status: u32,
}

// As in shim/fastice_fio.h.
const _: () = assert!(size_of::<FiJob>() == 64);
const _: () = assert!(size_of::<FiGeometry>() == 24);
const _: () = assert!(size_of::<FiMessage>() == 512);
const _: () = assert!(size_of::<FiCommand>() == 40);
const _: () = assert!(size_of::<FiEvent>() == 16);

/// What the connection keeps of a command: whose it is, and where its data goes.
#[derive(Clone, Copy)]
struct Tag {
    io_u: *mut c_void,
    /// Null unless it reads.
    into: *mut u8,
    len: usize,
}

/// `struct fi_session`, of which C sees only the address: one of a job, used by one thread at a time.
pub struct FiSession {
    session: Session<Tag>,
    events: Vec<FiEvent>,
}

/// Who we are where no option says it: one host, also when it is made up, whatever the number of jobs.
static OWN: OnceLock<Host> = OnceLock::new();
/// Geometries that were read already: jobs of one namespace need not connect for it one after the other.
static KNOWN: Mutex<Vec<(String, Geometry)>> = Mutex::new(Vec::new());

/// The geometry of the namespace that `job` names.
///
/// # Safety
/// `job` is a valid `struct fi_job` whose strings are null or end with a zero; the other two are valid and nobody else's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_geometry(
    job: *const FiJob,
    geometry: *mut FiGeometry,
    message: *mut FiMessage,
) -> c_int {
    // SAFETY: the caller's promise is that of both.
    let (job, geometry, message) = unsafe { (&*job, &mut *geometry, &mut *message) };
    guarded(message, || {
        // SAFETY: the strings are as the caller promised.
        let job = unsafe { job_of(job) }?;
        *geometry = known_geometry(&job)?.into();
        Ok(())
    })
}

/// Connects. What `session` gets is to be given to [`fastice_fio_close`].
///
/// # Safety
/// As [`fastice_fio_geometry`], with `session` in place of `geometry`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_open(
    job: *const FiJob,
    session: *mut *mut FiSession,
    message: *mut FiMessage,
) -> c_int {
    // SAFETY: the caller's promise is that of both.
    let (job, session, message) = unsafe { (&*job, &mut *session, &mut *message) };
    *session = ptr::null_mut();
    guarded(message, || {
        // SAFETY: the strings are as the caller promised.
        let job = unsafe { job_of(job) }?;
        let opened = Session::open(&job)?;
        let events = Vec::with_capacity(job.depth);
        *session = Box::into_raw(Box::new(FiSession { session: opened, events }));
        Ok(())
    })
}

/// Takes a command; [`fastice_fio_send`] sends it. `EBUSY`: as many as may be are in flight; it was not taken.
///
/// # Safety
/// `session` is open and used by this thread alone. `data` of `command` is valid for `len` bytes where it reads or writes:
/// until this returns for a write, until its event is given for a read, and nobody else uses it until then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_queue(
    session: *mut FiSession,
    command: *const FiCommand,
    message: *mut FiMessage,
) -> c_int {
    // SAFETY: the caller's promise.
    let (session, command, message) = unsafe { (&mut *session, &*command, &mut *message) };
    guarded(message, || {
        let too_long = || Failure::new(libc::EINVAL, format!("{} bytes in one command", command.len));
        let len = usize::try_from(command.len).map_err(|_| too_long())?;
        let mut tag = Tag { io_u: command.tag, into: ptr::null_mut(), len: 0 };
        let work = match command.kind {
            READ => {
                tag.into = command.data;
                tag.len = len;
                Work::Read(u32::try_from(len).map_err(|_| too_long())?)
            }
            WRITE if command.data.is_null() => {
                return Err(Failure::new(libc::EFAULT, "a write without data"));
            }
            WRITE => {
                // SAFETY: the caller's promise: valid, and unchanged until this returns.
                let data = unsafe { std::slice::from_raw_parts(command.data, len) };
                Work::Write { data, fua: command.fua != 0 }
            }
            FLUSH => Work::Flush,
            TRIM => Work::Deallocate(command.len),
            other => return Err(Failure::new(libc::EINVAL, format!("no kind of command is {other}"))),
        };
        match session.session.submit(command.offset, work, tag)? {
            Taken::Yes => Ok(()),
            Taken::Busy => Err(Failure::new(libc::EBUSY, "as many commands as may be are in flight")),
        }
    })
}

/// Sends what was taken. What goes wrong is told by [`fastice_fio_reap`].
///
/// # Safety
/// `session` is open and used by this thread alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_send(session: *mut FiSession) {
    // SAFETY: the caller's promise.
    let session = unsafe { &mut *session };
    // A panic leaves commands unsent, which the deadline of a reap then tells.
    let _ = catch_unwind(AssertUnwindSafe(|| session.session.send()));
}

/// Waits until `min` commands have ended, takes up to `max`, and gives their number; [`fastice_fio_event`] tells which. Below
/// zero: an errno, negated. `message` is set when the connection broke since the last call, and empty otherwise.
///
/// # Safety
/// `session` is open and used by this thread alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_reap(
    session: *mut FiSession,
    min: u32,
    max: u32,
    message: *mut FiMessage,
) -> c_int {
    // SAFETY: the caller's promise.
    let (FiSession { session, events }, message) = unsafe { (&mut *session, &mut *message) };
    message.set("");
    events.clear();
    let errno = guarded(message, || {
        session.reap(min as usize, max as usize, |tag, ending| {
            // SAFETY: `into` is valid for `len` bytes until the event is given: fastice_fio_queue's caller promised.
            events.push(unsafe { event_of(tag, ending) });
        });
        Ok(())
    });
    if let Some(failure) = session.take_news() {
        message.set(&failure.message);
    }
    if errno == 0 { c_int::try_from(events.len()).unwrap_or(c_int::MAX) } else { -errno }
}

/// The event `index` of the last [`fastice_fio_reap`]; a null tag where there is none.
///
/// # Safety
/// `session` is open and used by this thread alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_event(session: *const FiSession, index: u32) -> FiEvent {
    // SAFETY: the caller's promise.
    let session = unsafe { &*session };
    let none = FiEvent { tag: ptr::null_mut(), errno: libc::EINVAL, status: 0 };
    session.events.get(index as usize).copied().unwrap_or(none)
}

/// The name of an NVMe status.
///
/// # Safety
/// `message` is valid and nobody else's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_status_text(status: u32, message: *mut FiMessage) {
    // SAFETY: the caller's promise.
    let message = unsafe { &mut *message };
    guarded(message, || {
        let status = Status(u16::try_from(status).unwrap_or(u16::MAX));
        Err(Failure::new(0, format!("NVMe status: {status}")))
    });
}

/// Shuts the controller down and closes the connections; null is left alone.
///
/// # Safety
/// `session` is null or came from [`fastice_fio_open`], and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fastice_fio_close(session: *mut FiSession, message: *mut FiMessage) -> c_int {
    // SAFETY: the caller's promise.
    let message = unsafe { &mut *message };
    message.set("");
    if session.is_null() {
        return 0;
    }
    // SAFETY: the caller's promise: it is the box that fastice_fio_open made, and comes here once.
    let session = unsafe { Box::from_raw(session) };
    guarded(message, || session.session.close())
}

/// Runs `f`; a failure or a panic becomes an errno and a message.
fn guarded(message: &mut FiMessage, f: impl FnOnce() -> Result<(), Failure>) -> c_int {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(failure)) => {
            message.set(&failure.message);
            failure.errno
        }
        Err(_) => {
            message.set("fastice's engine panicked: a fault of it, please report what stands above");
            PANICKED
        }
    }
}

fn known_geometry(job: &Job) -> Result<Geometry, Failure> {
    let key = format!("{:?} {:?}", job.connect, job.nsid);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, geometry)) = known.iter().find(|(other, _)| *other == key) {
        return Ok(*geometry);
    }
    let geometry = session::geometry(job)?;
    known.push((key, geometry));
    Ok(geometry)
}

/// # Safety
/// The strings are null or valid and end with a zero.
unsafe fn job_of(job: &FiJob) -> Result<Job, Failure> {
    let invalid = |what: String| Failure::new(libc::EINVAL, what);
    let text = |name: &str, at: *const c_char| -> Result<_, Failure> {
        if at.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let text = unsafe { CStr::from_ptr(at) };
        let text = text.to_str().map_err(|_| invalid(format!("{name} is no UTF-8")))?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    };
    let needed = |name: &str, value: Option<&str>| {
        value.map(str::to_owned).ok_or_else(|| invalid(format!("the option {name} is missing")))
    };
    let traddr = needed("traddr", text("traddr", job.traddr)?)?;
    let subnqn = needed("subnqn", text("subnqn", job.subnqn)?)?;
    let id = text("hostid", job.hostid)?.map(uuid::Uuid::parse_str).transpose();
    let id = id.map_err(|error| invalid(format!("hostid is no UUID: {error}")))?;
    let host = match (text("hostnqn", job.hostnqn)?, id) {
        (None, None) => OWN.get_or_init(|| Host::of_this_machine(None, None)).clone(),
        (nqn, id) => Host::of_this_machine(nqn, id.map(uuid::Uuid::into_bytes)),
    };
    let port =
        u16::try_from(job.trsvcid).map_err(|_| invalid(format!("trsvcid={} is no port", job.trsvcid)))?;
    let mut connect = ConnectOptions::new(address(&traddr, port)?, subnqn, host);
    // Zero is fewer than any depth takes: the depth decides.
    connect.queue_size = u16::try_from(job.queue_size)
        .ok()
        .filter(|&size| usize::from(size) <= DEPTH_MAX + 1)
        .ok_or_else(|| invalid(format!("queue_size={}: at most {}", job.queue_size, DEPTH_MAX + 1)))?;
    let kato = Duration::from_secs(job.keep_alive_tmo_s.into()).as_millis();
    connect.kato_ms = u32::try_from(kato).map_err(|_| invalid("keep_alive_tmo is too long".to_owned()))?;
    connect.header_digest = job.hdr_digest != 0;
    connect.data_digest = job.data_digest != 0;
    Ok(Job { connect, nsid: Nsid(job.nsid), depth: job.iodepth as usize, busy_poll: job.hipri != 0 })
}

fn address(traddr: &str, port: u16) -> Result<SocketAddr, Failure> {
    let bare = traddr.trim_start_matches('[').trim_end_matches(']');
    let unknown =
        |why: String| Failure::new(libc::EHOSTUNREACH, format!("traddr={traddr} has no address{why}"));
    let mut found = (bare, port).to_socket_addrs().map_err(|error| unknown(format!(": {error}")))?;
    found.next().ok_or_else(|| unknown(String::new()))
}

/// # Safety
/// `into` of the tag is null or valid for `len` bytes, and nobody else's.
unsafe fn event_of(tag: Tag, ending: Ending<'_>) -> FiEvent {
    let mut event = FiEvent { tag: tag.io_u, errno: 0, status: 0 };
    match ending {
        Ok(data) if tag.into.is_null() || data.len() == tag.len => {
            if !tag.into.is_null() {
                // SAFETY: the caller's promise; both are `len` bytes, and one is the queue's own.
                unsafe { ptr::copy_nonoverlapping(data.as_ptr(), tag.into, tag.len) };
            }
        }
        Ok(_) => event.errno = libc::EPROTO,
        Err((errno, status)) => {
            event.errno = errno;
            event.status = status.map_or(0, |status| status.0.into());
        }
    }
    event
}

impl From<Geometry> for FiGeometry {
    fn from(geometry: Geometry) -> Self {
        Self {
            size: geometry.len,
            block_size: geometry.block_size.bytes(),
            transfer_len_max: geometry.transfer_len_max,
            read_only: geometry.read_only.into(),
            deallocates: geometry.deallocates.into(),
        }
    }
}

impl FiMessage {
    fn set(&mut self, text: &str) {
        let room = self.text.len() - 1;
        let bytes = text.as_bytes().iter().take(room);
        let mut end = 0;
        for (place, byte) in self.text.iter_mut().zip(bytes) {
            *place = c_char::from_ne_bytes([*byte]);
            end += 1;
        }
        if let Some(place) = self.text.get_mut(end) {
            *place = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> FiMessage {
        FiMessage { text: [1; 512] }
    }

    fn text(message: &FiMessage) -> String {
        let end = message.text.iter().position(|&byte| byte == 0).expect("it ends");
        message.text[..end].iter().map(|&byte| char::from(byte.to_ne_bytes()[0])).collect()
    }

    #[test]
    fn a_panic_becomes_an_errno() {
        let mut told = message();
        let errno = guarded(&mut told, || panic!("this is what the test wants"));
        assert_eq!(errno, PANICKED);
        assert!(text(&told).contains("panicked"), "{}", text(&told));
        assert_eq!(guarded(&mut told, || Ok(())), 0);
    }

    #[test]
    fn a_message_is_cut_to_what_fits() {
        let mut told = message();
        told.set(&"x".repeat(1000));
        assert_eq!(text(&told), "x".repeat(511));
        told.set("");
        assert_eq!(text(&told), "");
    }

    #[test]
    fn addresses_may_be_names_and_have_brackets() {
        for (traddr, found) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("[::1]", "[::1]:7")] {
            assert_eq!(address(traddr, 7).expect(traddr).to_string(), found);
        }
        assert_eq!(address("no such host", 7).expect_err("no address").errno, libc::EHOSTUNREACH);
    }
}
