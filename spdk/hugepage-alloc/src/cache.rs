//! Hints to the processor's caches: for memory that will be needed in a moment, and is known to be far away.

#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "prefetches have no safe wrapper"))]

/// A line of the cache, in bytes.
#[cfg(target_arch = "x86_64")]
const LINE_LEN: usize = 64;

/// Has the processor fetch the memory of `items` into its caches. A hint: it reads nothing that could be seen, and waits for
/// nothing. Where the processor has no such instruction it does nothing.
#[inline]
pub fn prefetch<T>(items: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = items.as_ptr().cast::<i8>();
        for at in places(size_of_val(items)) {
            // SAFETY: a prefetch never faults and changes nothing but caches; the address lies in `items` all the same.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = items;
}

/// Places among `len` bytes, at least one in each line that these lie in, wherever the first of them lies in a line: what begins in the
/// middle of a line may end in one more than its length tells.
#[cfg(target_arch = "x86_64")]
#[inline]
fn places(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(LINE_LEN).chain(len.checked_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_line_with_a_byte_of_the_items_is_one_and_no_other() {
        assert_eq!(places(0).count(), 0);
        for (into_line, len) in (0..LINE_LEN).flat_map(|into_line| (1..300).map(move |len| (into_line, len)))
        {
            let mut found: Vec<_> = places(len).map(|at| (into_line + at) / LINE_LEN).collect();
            found.dedup();
            let last = (into_line + len - 1) / LINE_LEN;
            assert_eq!(found, Vec::from_iter(0..=last), "{len} bytes from {into_line} on");
            assert!(places(len).all(|at| at < len));
        }
    }

    #[test]
    fn a_hint_changes_nothing_wherever_the_items_lie() {
        let bytes: Vec<u8> = (0..=255).collect();
        for at in 0..bytes.len() {
            prefetch(&bytes[at..]);
            prefetch(&bytes[..at]);
        }
        prefetch::<u64>(&[]);
        prefetch(&[(), ()]);
        assert!(bytes.iter().enumerate().all(|(at, byte)| at == usize::from(*byte)));
    }
}
