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
        // Items may begin in the middle of a line, and then end in one more than their length tells.
        let into_line = start.addr() % LINE_LEN;
        let len = size_of_val(items);
        let end = if len > 0 { into_line + len } else { 0 };
        for at in (0..end).step_by(LINE_LEN) {
            // SAFETY: a prefetch never faults and changes nothing but caches; each of these lines holds bytes of `items` all the same.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at).wrapping_sub(into_line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = items;
}

#[cfg(test)]
mod tests {
    use super::*;

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
