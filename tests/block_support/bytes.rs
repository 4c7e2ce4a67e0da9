//! Buffers and bytes.

use hugepage_alloc::{BufferPool, DmaBuf};

/// A buffer with these bytes.
pub(crate) fn buf_of(pool: &BufferPool, bytes: &[u8]) -> DmaBuf {
    let buf = pool.alloc(u32::try_from(bytes.len()).expect("small")).expect("room in the pool");
    buf.write_from(0, bytes);
    buf
}

/// The bytes of a buffer.
pub(crate) fn bytes_of(buf: &DmaBuf) -> Vec<u8> {
    let mut bytes = vec![0; buf.len()];
    buf.read_into(0, &mut bytes);
    bytes
}

/// `len` bytes that differ by seed and place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
