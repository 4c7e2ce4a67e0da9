//! Hints to the processor's caches: for memory that will be needed in a moment, and is known to be far away.

#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "prefetches have no safe wrapper"))]

/// A line of the cache, in bytes.
#[cfg(target_arch = "x86_64")]
const LINE_LEN: usize = 64;

/// Has the processor fetch the memory of `items` into its caches: each line that they would lie in if they began with one, so that a
/// last line that they only reach into may lack. To ask for that as well was dearer than it is worth (of 96 bytes: 25 more instructions):
/// whoever can has its items begin where they need no such line. A hint: it reads nothing that could be seen, and waits for nothing. Where
/// the processor has no such instruction it does nothing.
#[inline]
pub fn prefetch<T>(items: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = items.as_ptr().cast::<i8>();
        for at in (0..size_of_val(items)).step_by(LINE_LEN) {
            // SAFETY: a prefetch never faults and changes nothing but caches; the address lies in `items` all the same.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
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
