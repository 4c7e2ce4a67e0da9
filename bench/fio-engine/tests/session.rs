//! Goal: each command that is taken ends once, with its data or with a real errno, also when the target goes away.
//! Method: the engine's session without fio, against a target in this process.

mod common;

use common::{LEN, NQN, TestTarget};
use fastice::initiator::controller::{ConnectOptions, Host};
use fastice_fio::session::{self, Job, Session, Taken, Work};
use nvme_spec::{Nsid, Status};

const DEPTH: usize = 4;

fn job(target: &TestTarget, nsid: u32) -> Job {
    let connect =
        ConnectOptions { queue_size: 0, ..ConnectOptions::new(target.address(), NQN, Host::random()) };
    Job { connect, nsid: Nsid(nsid), depth: DEPTH, busy_poll: false }
}

/// What ended: tag, errno, status, and the buffer.
type End = (u32, i32, Option<Status>, Vec<u8>);

fn reap(session: &mut Session<u32>, min: usize, max: usize) -> Vec<End> {
    let mut ends = Vec::new();
    let count = session.reap(min, max, |tag, ending| {
        ends.push(match ending {
            Ok(data) => (tag, 0, None, data.to_vec()),
            Err((errno, status)) => (tag, errno, status, Vec::new()),
        });
    });
    assert_eq!(count, ends.len());
    ends
}

fn run(session: &mut Session<u32>, offset: u64, work: Work<'_>) -> End {
    assert_eq!(session.submit(offset, work, 7), Ok(Taken::Yes));
    session.send();
    let mut ends = reap(session, 1, DEPTH);
    assert_eq!(ends.len(), 1);
    ends.remove(0)
}

#[test]
fn what_is_written_is_read_back_after_a_flush_and_zeros_after_a_trim() {
    let target = TestTarget::start();
    for busy_poll in [false, true] {
        let mut session = Session::open(&Job { busy_poll, ..job(&target, 1) }).unwrap();
        let data: Vec<u8> = (0..16384_u32).map(|at| at.to_le_bytes()[0] ^ 0x5A).collect();
        assert_eq!(run(&mut session, 8192, Work::Write { data: &data, fua: true }).1, 0);
        assert_eq!(run(&mut session, 0, Work::Flush).1, 0);
        let (tag, errno, _, read) = run(&mut session, 8192, Work::Read(16384));
        assert_eq!((tag, errno), (7, 0));
        assert_eq!(read, data);
        assert_eq!(run(&mut session, 8192, Work::Deallocate(16384)).1, 0);
        assert!(run(&mut session, 8192, Work::Read(16384)).3.iter().all(|&byte| byte == 0));
        session.close().unwrap();
    }
}

#[test]
fn a_queue_takes_as_many_as_its_depth_and_gives_no_more_than_was_asked_for() {
    let target = TestTarget::start();
    let mut session = Session::open(&job(&target, 2)).unwrap();
    assert!(reap(&mut session, 1, 4).is_empty(), "nothing is waited for when nothing is in flight");
    for tag in 0..4 {
        assert_eq!(session.submit(u64::from(tag) * 4096, Work::Read(4096), tag), Ok(Taken::Yes));
    }
    assert_eq!(session.submit(0, Work::Read(4096), 4), Ok(Taken::Busy));
    let mut ends = reap(&mut session, 3, 3);
    assert_eq!(ends.len(), 3);
    ends.extend(reap(&mut session, 1, 4));
    ends.sort_by_key(|end| end.0);
    assert_eq!(ends.iter().map(|end| end.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
    session.close().unwrap();
}

#[test]
fn the_geometry_is_the_namespaces() {
    let target = TestTarget::start();
    let geometry = session::geometry(&job(&target, 1)).unwrap();
    assert_eq!(geometry.len, LEN);
    assert!(
        geometry.transfer_len_max >= 128 << 10 && !geometry.read_only && geometry.deallocates,
        "{geometry:?}"
    );
    let missing = session::geometry(&job(&target, 9)).unwrap_err();
    assert!(missing.errno > 0 && !missing.message.is_empty(), "{missing:?}");
    let mut stranger = job(&target, 1);
    stranger.connect.subsystem_nqn = "nqn.2026-11.io.fastice:other".to_owned();
    let unknown = session::geometry(&stranger).unwrap_err();
    assert!(unknown.status.is_some() && unknown.errno == libc::ENXIO, "{unknown:?}");
}

#[test]
fn what_cannot_be_done_is_an_errno_and_the_session_goes_on() {
    let target = TestTarget::start();
    let mut session = Session::open(&job(&target, 1)).unwrap();
    for (offset, work) in [
        (1, Work::Read(4096)),
        (0, Work::Read(100)),
        (0, Work::Read(0)),
        (0, Work::Read(8 << 20)),
        (0, Work::Write { data: &[], fua: false }),
        (0, Work::Deallocate(1)),
    ] {
        assert_eq!(session.submit(offset, work, 1).unwrap_err().errno, libc::EINVAL, "{offset} {work:?}");
    }
    let (_, errno, status, _) = run(&mut session, LEN, Work::Read(4096));
    assert_eq!((errno, status.map(Status::code)), (libc::ENOSPC, Some(Status::LBA_OUT_OF_RANGE)));
    assert_eq!(run(&mut session, 0, Work::Read(4096)).1, 0);
    let deep = Session::<u32>::open(&Job { depth: 5000, ..job(&target, 1) }).err().unwrap();
    assert!(deep.errno == libc::EINVAL && deep.message.contains("iodepth=5000"), "{deep:?}");
}

#[test]
fn when_the_target_goes_away_everything_in_flight_ends_with_the_reason() {
    let target = TestTarget::start();
    let mut session = Session::open(&job(&target, 1)).unwrap();
    assert_eq!(run(&mut session, 0, Work::Read(4096)).1, 0);
    drop(target);
    for tag in 0..3 {
        // The connection may be known to be gone already.
        let _ = session.submit(0, Work::Read(4096), tag);
    }
    session.send();
    let ends = reap(&mut session, 3, 2);
    assert_eq!(ends.len(), 2);
    assert!(ends.iter().all(|end| end.1 == libc::ECONNRESET), "{ends:?}");
    assert_eq!(reap(&mut session, 1, 2).len(), 1, "and the last one");
    let news = session.take_news().cloned().unwrap();
    assert!(news.errno == libc::ECONNRESET && !news.message.is_empty(), "{news:?}");
    assert_eq!(session.take_news(), None, "told once");
    assert_eq!(session.submit(0, Work::Flush, 0), Err(news));
    session.close().unwrap();
}
