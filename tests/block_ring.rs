//! The ring over socket pairs, loopback and files: resources come back, late if need be, never early.

mod block_support;
#[path = "block_support/bytes.rs"]
mod bytes;
#[path = "block_support/next_done.rs"]
mod next_done;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use block_support::{pool, ring};
use bytes::{buf_of, bytes_of, pattern};
use fastice::ring::{
    FileRef, Full, RecvBatch, RecvSplit, Ring, RingDone, RingOptions, RingResource, SendBatch, Socket, Wait,
};
use fastice::units::{ByteLen, ByteOffset};
use next_done::next_done;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;

fn pair() -> (Socket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    (Socket::new(ours.into()), theirs)
}

fn recv_of(done: RingDone) -> (std::io::Result<u32>, Box<RecvBatch>) {
    match done.resource {
        RingResource::Recv(batch) => (done.result, batch),
        other => panic!("not a receive: {other:?}"),
    }
}

fn send_of(done: RingDone) -> (std::io::Result<u32>, Box<SendBatch>) {
    match done.resource {
        RingResource::Send(batch) => (done.result, batch),
        other => panic!("not a send: {other:?}"),
    }
}

fn errno_of(result: &std::io::Result<u32>) -> Option<i32> {
    result.as_ref().err().and_then(std::io::Error::raw_os_error)
}

#[test]
fn a_receive_fills_the_direct_buffer_first() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(4);
    let (socket, mut peer) = pair();
    let bytes = pattern(1, 5000);
    let direct = pool.alloc(4096).expect("room");
    let mut batch = Box::new(RecvBatch::new(8192));
    batch.set_direct(Some(direct.clone()));

    // In two pieces, the second of which crosses from the direct buffer into `rx`.
    peer.write_all(&bytes[..1000]).expect("room in the socket");
    client.recv(7, &socket, batch).expect("room");
    let (result, mut batch) = recv_of(next_done(&ring, &client));
    assert_eq!(batch.complete(result.expect("bytes")), RecvSplit { direct_len: 1000, rx_len: 0 });
    assert_eq!(batch.direct_left(), 3096);
    peer.write_all(&bytes[1000..]).expect("room in the socket");
    client.recv(8, &socket, batch).expect("room");
    let done = next_done(&ring, &client);
    assert_eq!(done.token, 8);
    let (result, mut batch) = recv_of(done);
    assert_eq!(batch.complete(result.expect("bytes")), RecvSplit { direct_len: 3096, rx_len: 904 });
    assert_eq!(batch.direct_left(), 0);
    assert_eq!(bytes_of(&direct), bytes[..4096]);
    assert_eq!(batch.filled(), &bytes[4096..]);

    batch.consume(900);
    assert_eq!(batch.filled(), &bytes[4996..]);
    batch.compact(8192);
    assert_eq!((batch.filled(), batch.free_space()), (&bytes[4996..], 8188));
    batch.consume(4);
    assert_eq!(batch.free_space(), 8192);

    drop(peer);
    client.recv(9, &socket, batch).expect("room");
    let (result, _) = recv_of(next_done(&ring, &client));
    assert_eq!(result.expect("end of stream"), 0);
}

#[test]
fn a_receive_without_room_is_not_taken_for_the_end() {
    let ring = ring();
    let client = ring.client(1);
    let (socket, _peer) = pair();
    client.recv(1, &socket, Box::new(RecvBatch::new(0))).expect("room");
    let (result, _) = recv_of(next_done(&ring, &client));
    assert_eq!(errno_of(&result), Some(libc::ENOBUFS));
    assert_eq!(client.in_flight(), 0);
}

/// Headers and payloads alternate, as PDUs do.
fn send_batch(pool: &hugepage_alloc::BufferPool) -> (Box<SendBatch>, Vec<u8>) {
    let mut batch = Box::new(SendBatch::with_capacity(256, 8));
    let mut expected = Vec::new();
    for (number, len) in [(0, 100), (1, 133), (2, 166)] {
        let (header, payload) = (pattern(number, 24), pattern(number + 10, len));
        assert!(batch.push_bytes(&header[..8]) && batch.push_bytes(&header[8..]), "merged into one part");
        assert!(batch.push_buf(buf_of(pool, &payload)));
        expected.extend([header, payload].concat());
    }
    assert_eq!(batch.bytes_len(), expected.len());
    assert_eq!(batch.parts_room(), 2);
    (batch, expected)
}

/// Where the payloads of [`send_batch`] end.
const PAYLOAD_ENDS: [usize; 3] = [124, 281, 471];

#[test]
fn a_send_goes_on_wherever_it_was_cut() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(1);
    let (socket, mut peer) = pair();
    let total = send_batch(&pool).1.len();
    for cut in 0..=total {
        let (mut batch, expected) = send_batch(&pool);
        // In two steps, so that a cut within an already cut part is met as well.
        batch.advance(cut / 2);
        batch.advance(cut - cut / 2);
        assert_eq!(batch.bytes_len(), total - cut);
        let held = PAYLOAD_ENDS.iter().filter(|end| **end > cut).count();
        assert_eq!(pool.stats().bytes_in_use, held * 4096, "buffers that are sent whole are free");
        assert_eq!(batch.is_begun(), cut > 0 && cut < total);
        if batch.is_empty() {
            continue;
        }
        client.send(1, &socket, batch).expect("room");
        let (result, mut batch) = send_of(next_done(&ring, &client));
        assert_eq!(result.expect("sent") as usize, total - cut);
        batch.advance(total - cut);
        let mut got = vec![0; total - cut];
        peer.read_exact(&mut got).expect("the bytes");
        assert_eq!(got, expected[cut..]);
    }
}

#[test]
fn a_send_batch_never_grows() {
    let pool = pool(2);
    let mut batch = SendBatch::with_capacity(10, 2);
    assert!(batch.push_bytes(b"12345"));
    assert!(!batch.push_bytes(b"123456"), "six into five");
    assert!(batch.push_buf(pool.alloc(1).expect("room")));
    assert!(!batch.push_buf(pool.alloc(1).expect("room")), "a third part");
    assert!(!batch.push_bytes(b"1"), "a third part");
    assert_eq!((batch.bytes_len(), batch.arena_room(), batch.parts_room()), (6, 5, 0));
    batch.clear();
    assert_eq!((batch.bytes_len(), batch.arena_room(), batch.parts_room()), (0, 10, 2));
    assert_eq!(pool.stats().bytes_in_use, 0);
}

#[test]
fn a_send_larger_than_the_socket_buffer_arrives_whole() {
    let (ring, pool) = (ring(), pool(8));
    let client = ring.client(1);
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let mut peer = TcpStream::connect(listener.local_addr().expect("an address")).expect("loopback");
    let socket = Socket::new(OwnedFd::from(listener.accept().expect("a connection").0));
    let bytes = pattern(3, 2 << 20);
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        peer.read_to_end(&mut got).expect("the bytes");
        got
    });
    let mut batch = Box::new(SendBatch::with_capacity(64, 4));
    assert!(batch.push_buf(buf_of(&pool, &bytes)) && batch.push_bytes(b"tail"));
    assert!(batch.push_buf(buf_of(&pool, &bytes)));
    let total = batch.bytes_len();
    client.send(1, &socket, batch).expect("room");
    drop(socket);
    let (result, batch) = send_of(next_done(&ring, &client));
    assert_eq!(result.expect("sent") as usize, total, "MSG_WAITALL");
    drop(batch);
    assert_eq!(reader.join().expect("no panic"), [&bytes[..], b"tail", &bytes[..]].concat());
}

#[test]
fn sending_to_a_closed_socket_is_an_error_not_a_signal() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(1);
    let (socket, peer) = pair();
    drop(peer);
    client.send(1, &socket, send_batch(&pool).0).expect("room");
    let (result, batch) = send_of(next_done(&ring, &client));
    assert_eq!(errno_of(&result), Some(libc::EPIPE));
    assert!(!batch.is_empty());
}

#[test]
fn a_cancelled_receive_gives_its_batch_back() {
    let ring = ring();
    let (client, other) = (ring.client(2), ring.client(2));
    let (socket, _peer) = pair();
    client.recv(1, &socket, Box::new(RecvBatch::new(100))).expect("room");
    client.recv(2, &socket, Box::new(RecvBatch::new(200))).expect("room");
    other.recv(1, &socket, Box::new(RecvBatch::new(300))).expect("room");
    ring.turn(Wait::No).expect("a turn");
    client.cancel(1);
    let done = next_done(&ring, &client);
    assert_eq!(done.token, 1);
    let (result, batch) = recv_of(done);
    assert_eq!(errno_of(&result), Some(libc::ECANCELED));
    assert_eq!(batch.capacity(), 100);
    assert_eq!((client.in_flight(), other.in_flight()), (1, 1), "no other is cancelled");
    client.cancel_all();
    assert_eq!(next_done(&ring, &client).token, 2);
    assert_eq!(other.in_flight(), 1);
}

#[test]
fn what_a_dropped_client_has_in_flight_is_kept_until_it_ends() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(2);
    let (socket, mut peer) = pair();
    let mut batch = Box::new(RecvBatch::new(100));
    batch.set_direct(Some(pool.alloc(4096).expect("room")));
    client.recv(1, &socket, batch).expect("room");
    ring.turn(Wait::No).expect("a turn");
    drop((client, socket));
    assert_eq!(ring.in_flight(), 1);
    assert_eq!(pool.stats().bytes_in_use, 4096, "the kernel may still write there");
    let deadline = Instant::now() + Duration::from_secs(10);
    while ring.in_flight() > 0 {
        assert!(Instant::now() < deadline, "dropping the client cancels");
        ring.turn(Wait::UpTo(Duration::from_millis(50))).expect("a turn");
    }
    assert_eq!(pool.stats().bytes_in_use, 0);
    assert_eq!(
        peer.read(&mut [0; 1]).expect("end of stream"),
        0,
        "the socket closed with its last operation"
    );
}

#[test]
fn a_dropped_ring_waits_for_what_it_cancels() {
    let pool = pool(2);
    let ring = ring();
    ring.register_pool(&pool).expect("the first pool");
    let client = ring.client(8);
    let (socket, mut peer) = pair();
    for token in 0..4 {
        let mut batch = Box::new(RecvBatch::new(100));
        batch.set_direct(Some(pool.alloc(4096).expect("room")));
        client.recv(token, &socket, batch).expect("room");
    }
    ring.turn(Wait::No).expect("a turn");
    let before = Instant::now();
    drop((ring, client, socket));
    assert!(before.elapsed() < Duration::from_secs(4), "not the whole of the bounded wait");
    assert_eq!(pool.stats().bytes_in_use, 0);
    assert_eq!(peer.read(&mut [0; 1]).expect("end of stream"), 0);
}

/// Thaws and unmounts a filesystem when dropped.
struct Frozen(PathBuf);

impl Frozen {
    /// A small ext4, not frozen yet. None, and a loud word, where that cannot be had.
    fn mount(folder: &Path) -> Option<Self> {
        let image = folder.join("image");
        File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("disk space");
        let mounted = folder.join("mounted");
        std::fs::create_dir(&mounted).expect("a folder");
        let is_made = run(Command::new("mkfs.ext4").arg("-q").arg(&image))
            && run(Command::new("mount").args(["-o", "loop"]).args([&image, &mounted]));
        if !is_made {
            eprintln!(
                "SKIPPED: what_does_not_end_is_leaked_not_freed: no ext4 on a loop device (run as root)"
            );
            return None;
        }
        Some(Self(mounted))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.0));
        // The leaked operation keeps its file open until this process ends.
        run(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

fn run(command: &mut Command) -> bool {
    command.stderr(std::process::Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn what_does_not_end_is_leaked_not_freed() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(frozen) = Frozen::mount(folder.path()) else { return };
    let file = File::create(frozen.0.join("file")).expect("room in the filesystem");
    let pool = pool(2);
    let options = RingOptions { drop_wait: Duration::from_millis(200), ..RingOptions::default() };
    let ring = Ring::new(&options).expect("io_uring");
    let client = ring.client(1);
    assert!(run(Command::new("fsfreeze").arg("--freeze").arg(&frozen.0)));
    // A write to a frozen filesystem sleeps in the kernel, deaf to cancellation.
    let file = FileRef::new(file.into());
    client.write(1, &file, buf_of(&pool, &[1; 4096]), ByteOffset(0), false).expect("room");
    // Time for a worker to pick it up: what still queues can be cancelled.
    ring.turn(Wait::No).expect("a turn");
    std::thread::sleep(Duration::from_millis(200));
    assert!(client.pop().is_none(), "written to a frozen filesystem");
    let before = Instant::now();
    drop((ring, client));
    let waited = before.elapsed();
    assert!(waited >= Duration::from_millis(150) && waited < Duration::from_secs(5), "{waited:?}");
    assert_eq!(pool.stats().bytes_in_use, 4096, "the kernel will still read there");
}

#[test]
fn a_full_client_gives_the_operation_back() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(1);
    let file = FileRef::new(File::open("/dev/zero").expect("/dev/zero").into());
    let buf = buf_of(&pool, &[9; 512]);
    let address = buf.as_ptr();
    client.fsync(1, &file).expect("room");
    let Err(Full(buf)) = client.read(2, &file, buf, ByteOffset(0)) else { panic!("capacity is one") };
    assert_eq!(buf.as_ptr(), address);
    ring.turn(Wait::UpTo(Duration::from_secs(5))).expect("a turn");
    assert!(
        client.read(2, &file, buf.clone(), ByteOffset(0)).is_err(),
        "what was not popped still takes room"
    );
    assert_eq!(next_done(&ring, &client).token, 1);
    client.read(2, &file, buf, ByteOffset(0)).expect("room again");
    let done = next_done(&ring, &client);
    assert_eq!(done.result.expect("zeros"), 512);
    let RingResource::Buffer(buf) = done.resource else { panic!("a read gives its buffer back") };
    assert_eq!(bytes_of(&buf), [0; 512]);
}

#[test]
fn slots_run_out_and_the_submission_queue_does_not() {
    let ring = Ring::new(&RingOptions { sq_entries: 4, slots: 32, files: 0, ..RingOptions::default() })
        .expect("io_uring");
    let client = ring.client(100);
    let (socket, mut peer) = pair();
    // A receive each, none of which can complete: the submission queue overflows seven times.
    for token in 0..32 {
        client.recv(token, &socket, Box::new(RecvBatch::new(1))).expect("a slot");
    }
    assert!(client.recv(32, &socket, Box::new(RecvBatch::new(1))).is_err(), "32 slots");
    assert_eq!(ring.in_flight(), 32);
    peer.write_all(&[5; 32]).expect("room in the socket");
    let mut tokens: Vec<u64> = (0..32).map(|_| next_done(&ring, &client).token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..32).collect::<Vec<u64>>());
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn files_are_read_written_and_zeroed_registered_or_not() {
    for is_registered in [false, true] {
        let (ring, pool) = (ring(), pool(4));
        let file = tempfile::tempfile().expect("a temporary file");
        let plain = file.try_clone().expect("a descriptor");
        let file = if is_registered {
            ring.register_pool(&pool).expect("the first pool");
            assert!(ring.register_pool(&pool).is_err(), "only one pool a ring");
            ring.register_file(file.into())
        } else {
            FileRef::new(file.into())
        };
        let client = ring.client(4);
        let bytes = pattern(4, 10_000);
        let stranger = buf_of(&block_support::pool(2), &bytes);
        for (dsync, buf) in [(false, buf_of(&pool, &bytes)), (true, stranger)] {
            client.write(1, &file, buf, ByteOffset(4096), dsync).expect("room");
            assert_eq!(next_done(&ring, &client).result.expect("written"), 10_000);
        }
        client.fsync(2, &file).expect("room");
        assert_eq!(next_done(&ring, &client).result.expect("synced"), 0);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        client.fallocate(3, &file, mode, ByteOffset(5000), ByteLen(100)).expect("room");
        assert_eq!(next_done(&ring, &client).result.expect("punched"), 0);
        client.read(4, &file, pool.alloc(20_000).expect("room"), ByteOffset(4096)).expect("room");
        let done = next_done(&ring, &client);
        assert_eq!(done.result.expect("read"), 10_000, "the file ends there");
        let RingResource::Buffer(buf) = done.resource else { panic!("a read gives its buffer back") };
        let mut expected = bytes.clone();
        expected[904..1004].fill(0);
        assert_eq!(bytes_of(&buf)[..10_000], expected);
        drop(file);
        assert_eq!(plain.metadata().expect("fstat").len(), 14_096);
    }
}

#[test]
fn the_file_table_is_used_again_and_never_runs_over() {
    let (ring, pool) = (ring(), pool(2));
    let client = ring.client(1);
    for round in 0..3 {
        // Twelve files, eight places.
        let files: Vec<FileRef> = (0..12u8)
            .map(|number| {
                let mut file = tempfile::tempfile().expect("a temporary file");
                file.write_all(&[number + round; 100]).expect("disk space");
                ring.register_file(file.into())
            })
            .collect();
        for (number, file) in (0u8..).zip(&files) {
            client.read(1, file, pool.alloc(100).expect("room"), ByteOffset(0)).expect("room");
            let RingResource::Buffer(buf) = next_done(&ring, &client).resource else { panic!("a buffer") };
            assert_eq!(bytes_of(&buf), [number + round; 100]);
        }
    }
}

#[test]
fn a_file_of_another_ring_works_here() {
    let (here, there, pool) = (ring(), ring(), pool(2));
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(b"abc").expect("disk space");
    // Place 0 of the table of `here` is another file.
    let _other = here.register_file(File::open("/dev/zero").expect("/dev/zero").into());
    let file = there.register_file(file.into());
    let client = here.client(1);
    client.read(1, &file, pool.alloc(3).expect("room"), ByteOffset(0)).expect("room");
    let RingResource::Buffer(buf) = next_done(&here, &client).resource else { panic!("a buffer") };
    assert_eq!(bytes_of(&buf), b"abc");
}

#[test]
fn connections_are_accepted_also_on_a_non_blocking_listener() {
    let ring = ring();
    let client = ring.client(2);
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    listener.set_nonblocking(true).expect("fcntl");
    let address = listener.local_addr().expect("an address");
    let listener = ring.register_socket(listener.into());
    client.accept(1, &listener).expect("room");
    ring.turn(Wait::No).expect("a turn");
    assert!(client.pop().is_none(), "nobody is there yet");
    let mut peer = TcpStream::connect(address).expect("loopback");
    let RingResource::Accepted(accepted) = next_done(&ring, &client).resource else { panic!("a connection") };
    peer.write_all(b"hello").expect("room in the socket");
    let mut got = [0; 5];
    TcpStream::from(accepted).read_exact(&mut got).expect("the bytes");
    assert_eq!(&got, b"hello");
}

#[test]
fn an_eventfd_wakes_a_sleeping_ring() {
    let ring = ring();
    let client = ring.client(1);
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let waker = event.try_clone().expect("a descriptor");
    client.wait_readable(1, &FileRef::new(event)).expect("room");
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        rustix::io::write(&waker, &1u64.to_ne_bytes()).expect("room in the counter");
    });
    let before = Instant::now();
    assert_eq!(ring.turn(Wait::UpTo(Duration::from_secs(20))).expect("a turn"), 1);
    assert!(before.elapsed() < Duration::from_secs(10));
    let events = next_done(&ring, &client).result.expect("events");
    assert_ne!(events & libc::POLLIN as u32, 0);
    thread.join().expect("no panic");
}

#[test]
fn a_wait_ends_in_time_and_is_no_error() {
    let ring = ring();
    let before = Instant::now();
    assert_eq!(ring.turn(Wait::UpTo(Duration::from_millis(30))).expect("a turn"), 0);
    assert!(before.elapsed() >= Duration::from_millis(29));
    assert_eq!(ring.turn(Wait::No).expect("a turn"), 0);
}

#[test]
fn senseless_options_are_refused() {
    for options in [
        RingOptions { slots: 0, ..RingOptions::default() },
        RingOptions { slots: 40_000, ..RingOptions::default() },
        RingOptions { sq_entries: 0, ..RingOptions::default() },
    ] {
        assert!(Ring::new(&options).is_err(), "{options:?}");
    }
}
