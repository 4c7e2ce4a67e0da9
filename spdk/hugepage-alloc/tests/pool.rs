//! The pool against a model: whatever the order of taking and giving back, no two living buffers share a byte, and
//! all of the pool comes back.

use hugepage_alloc::{AllocError, Backing, BufferPool, DmaBuf, PoolOptions, SharedMemory};
use proptest::prelude::*;

const PAGE_LEN: usize = 2 << 20;

fn small_pool(pages: usize) -> BufferPool {
    let options = PoolOptions { bytes: pages * PAGE_LEN, prefer_huge: false, lock: false };
    BufferPool::new(&options).expect("a few MiB of ordinary memory")
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(u32),
    Free(prop::sample::Index),
    Clone(prop::sample::Index),
    Slice(prop::sample::Index, prop::sample::Index, prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![
        4 => 1u32..=4096,
        2 => 1u32..=65536,
        1 => 1u32..=(2 << 20),
        1 => prop::sample::select(vec![0, 4096, 16384, 65536, 262_144, 1 << 20, 2 << 20, (2 << 20) + 1]),
    ];
    let any = any::<prop::sample::Index>;
    let step = prop_oneof![
        5 => len.prop_map(Step::Alloc),
        4 => any().prop_map(Step::Free),
        1 => any().prop_map(Step::Clone),
        1 => (any(), any(), any()).prop_map(|(of, at, len)| Step::Slice(of, at, len)),
    ];
    prop::collection::vec(step, 1..400)
}

/// A living slice, with the bounds of the buffer it came from: it holds all of that, also when the first handle is
/// gone.
struct Held {
    buf: DmaBuf,
    buffer: std::ops::Range<usize>,
    tag: u8,
}

/// The smallest size class that holds `len`.
fn class_len(len: usize) -> usize {
    [4096, 16384, 65536, 262_144, 1 << 20, 2 << 20]
        .into_iter()
        .find(|&class| len <= class)
        .expect("at most 2 MiB")
}

fn check_step(pool: &BufferPool, held: &mut Vec<Held>, tag: u8, step: &Step) -> Result<(), TestCaseError> {
    match step {
        Step::Alloc(len) => {
            let Some(buf) = pool.alloc(*len) else { return Ok(()) };
            prop_assert!(*len as usize <= PAGE_LEN);
            prop_assert_eq!(buf.len(), *len as usize);
            let start = buf.as_ptr().addr();
            prop_assert_eq!(start % 4096, 0);
            let (base, region_len) = pool.regions().nth(buf.region_index().into()).expect("its region");
            let pages_before: usize =
                pool.regions().take(buf.region_index().into()).map(|(_, len)| len / PAGE_LEN).sum();
            let position = (buf.page_index() - pages_before) * PAGE_LEN + buf.page_offset();
            prop_assert!(buf.is_empty() || position == buf.region_offset());
            prop_assert!(start >= base.addr() && start + buf.len() <= base.addr() + region_len);
            let buffer = start..start + class_len(buf.len());
            for other in held.iter() {
                prop_assert!(buffer.end <= other.buffer.start || other.buffer.end <= buffer.start);
            }
            buf.write_from(0, &vec![tag; buf.len()]);
            held.push(Held { buf, buffer, tag });
        }
        Step::Free(index) if !held.is_empty() => {
            let gone = held.swap_remove(index.index(held.len()));
            let mut bytes = vec![0; gone.buf.len()];
            gone.buf.read_into(0, &mut bytes);
            prop_assert!(bytes.iter().all(|&byte| byte == gone.tag), "another buffer was written here");
        }
        Step::Clone(index) if !held.is_empty() => {
            let of = &held[index.index(held.len())];
            let twin = Held { buf: of.buf.clone(), buffer: of.buffer.clone(), tag: of.tag };
            held.push(twin);
        }
        Step::Slice(of, at, len) if !held.is_empty() => {
            let of = &held[of.index(held.len())];
            let at = at.index(of.buf.len() + 1);
            let len = len.index(of.buf.len() - at + 1);
            let buf = of.buf.slice(at, len);
            prop_assert_eq!(buf.as_ptr(), of.buf.as_ptr().wrapping_add(at));
            held.push(Held { buf, buffer: of.buffer.clone(), tag: of.tag });
        }
        _ => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn living_buffers_never_overlap_and_all_come_back(steps in steps()) {
        let pool = small_pool(4);
        let mut held: Vec<Held> = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            let tag = u8::try_from(number % 251).expect("below 251");
            check_step(&pool, &mut held, tag, step)?;
        }
        held.clear();
        let stats = pool.stats();
        prop_assert_eq!(stats.bytes_in_use, 0);
        prop_assert_eq!(stats.pages_free, stats.pages_total);
        let all: Vec<_> = (0..4).map_while(|_| pool.alloc(2 << 20)).collect();
        prop_assert_eq!(all.len(), 4, "every page can be had whole again");
    }
}

#[test]
fn the_zeroes_of_a_pool_are_the_same_for_all_and_never_handed_out_as_a_buffer() {
    let pool = small_pool(8);
    let dirty = pool.alloc(1 << 18).expect("room");
    dirty.write_from(0, &vec![0xA5; dirty.len()]);
    drop(dirty);
    let free_before = pool.bytes_free();
    let zeroes = pool.zeroes().expect("a pool of eight pages spares some");
    let mut bytes = vec![1; zeroes.len()];
    zeroes.read_into(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0));
    let at = zeroes.as_ptr();
    drop(zeroes);
    assert_eq!(pool.zeroes().map(|again| again.as_ptr()), Some(at));
    assert_eq!(pool.stats().bytes_in_use, 0, "they are no buffer in use");
    assert_eq!(free_before - pool.bytes_free(), bytes.len());

    let all: Vec<DmaBuf> = std::iter::from_fn(|| pool.alloc(1 << 18)).collect();
    assert_eq!(all.len(), 8 * PAGE_LEN / (1 << 18) - 1);
    assert!(all.iter().all(|buf| buf.as_ptr() != at));
    assert_eq!(pool.bytes_free(), 0);
}

#[test]
fn a_small_pool_spares_no_zeroes() {
    assert!(small_pool(7).zeroes().is_none());
    let pool = small_pool(8);
    let _all: Vec<DmaBuf> = std::iter::from_fn(|| pool.alloc(2 << 20)).collect();
    assert!(pool.zeroes().is_none(), "nothing is left");
}

#[test]
fn an_exhausted_pool_says_so_and_recovers() {
    let pool = small_pool(1);
    let mut bufs: Vec<DmaBuf> = (0..512).map_while(|_| pool.alloc(4096)).collect();
    assert_eq!(bufs.len(), 512);
    assert!(pool.alloc(1).is_none());
    assert_eq!(pool.stats().exhausted_count, 1);
    assert_eq!(pool.stats().bytes_in_use, PAGE_LEN);
    let kept = bufs[17].slice(100, 1);
    let address = bufs[17].as_ptr();
    bufs.remove(17);
    assert!(pool.alloc(4096).is_none(), "a slice keeps its buffer");
    drop(kept);
    assert_eq!(pool.alloc(4096).map(|buf| buf.as_ptr()), Some(address));
    assert!(pool.alloc((2 << 20) + 1).is_none(), "above the largest class");
}

#[test]
fn the_memory_outlives_the_pool() {
    let buf = small_pool(1).alloc(4096).expect("an empty pool");
    buf.write_from(10, b"still here");
    let mut bytes = [0; 10];
    buf.read_into(10, &mut bytes);
    assert_eq!(&bytes, b"still here");
    buf.zero();
    buf.read_into(10, &mut bytes);
    assert_eq!(bytes, [0; 10]);
}

#[test]
fn copies_may_overlap() {
    let pool = small_pool(1);
    let buf = pool.alloc(16).expect("an empty pool");
    buf.write_from(0, b"0123456789abcdef");
    buf.copy_from(4, &buf, 0, 8);
    let mut bytes = [0; 16];
    buf.read_into(0, &mut bytes);
    assert_eq!(&bytes, b"012301234567cdef");
}

#[test]
#[should_panic(expected = "leave a buffer of 16 bytes")]
fn writing_past_the_end_is_refused() {
    small_pool(1).alloc(16).expect("an empty pool").write_from(9, &[0; 8]);
}

#[test]
fn slices_that_leave_the_buffer_are_refused() {
    let buf = small_pool(1).alloc(100).expect("an empty pool");
    assert!(buf.try_slice(100, 0).is_some_and(|slice| slice.is_empty()));
    assert!(buf.try_slice(101, 0).is_none());
    assert!(buf.try_slice(1, 100).is_none());
    assert!(buf.try_slice(1, usize::MAX).is_none());
    assert!(buf.slice(10, 20).try_slice(0, 21).is_none(), "a slice does not see beyond itself");
}

#[test]
fn senseless_sizes_are_refused() {
    for bytes in [0, usize::MAX] {
        let result = BufferPool::new(&PoolOptions { bytes, ..PoolOptions::default() });
        assert!(matches!(result, Err(AllocError::BadSize { .. })), "{bytes}");
    }
}

#[test]
fn shared_memory_copies_whole_buffers_or_nothing() {
    let memory = SharedMemory::new(3 * 4096, false).expect("a little memory");
    let pool = small_pool(1);
    let (from, to) = (pool.alloc(4096).expect("room"), pool.alloc(4096).expect("room"));
    from.write_from(0, &(0..=255).cycle().take(4096).collect::<Vec<u8>>());
    assert!(memory.copy_in(512, &from));
    assert!(memory.copy_out(512, &to));
    let (mut sent, mut got) = (vec![0; 4096], vec![1; 4096]);
    from.read_into(0, &mut sent);
    to.read_into(0, &mut got);
    assert_eq!(sent, got);
    assert!(memory.zero(512 + 100, 50));
    assert!(memory.copy_out(512, &to));
    to.read_into(0, &mut got);
    assert_eq!(got[100..150], [0; 50]);
    assert_eq!((got[99], got[150]), (sent[99], sent[150]));
    assert!(!memory.copy_in(2 * 4096 + 1, &from), "one byte past the end");
    assert!(!memory.copy_out(usize::MAX, &to));
    assert!(!memory.zero(0, 3 * 4096 + 1));
}

#[test]
fn without_huge_pages_ordinary_ones_are_used_and_the_reason_told() {
    let options = PoolOptions { bytes: 256 << 20, prefer_huge: true, lock: false };
    let reserved = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if reserved.trim().parse::<usize>().is_ok_and(|pages| pages >= 128) {
        eprintln!("SKIPPED: without hugepages: this machine has {} huge pages reserved", reserved.trim());
        return;
    }
    let pool = BufferPool::new(&options).expect("256 MiB of memory");
    assert_eq!(pool.backing(), Backing::OrdinaryUnlocked);
    let notice = pool.notice().expect("a reason");
    assert!(notice.contains("vm.nr_hugepages"), "{notice}");
    assert!(pool.alloc(4096).is_some());
}

#[test]
fn locked_memory_is_locked() {
    let pool =
        BufferPool::new(&PoolOptions { bytes: PAGE_LEN, prefer_huge: false, lock: true }).expect("2 MiB");
    match pool.backing() {
        Backing::OrdinaryLocked => {
            let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
            let locked = status.lines().find(|line| line.starts_with("VmLck:")).expect("VmLck");
            let kib: usize = locked.split_whitespace().nth(1).expect("a number").parse().expect("a number");
            assert!(kib >= PAGE_LEN / 1024, "{locked}");
        }
        other => {
            assert_eq!(other, Backing::OrdinaryUnlocked);
            assert!(pool.notice().expect("a reason").contains("RLIMIT_MEMLOCK"));
        }
    }
}
