//! Numbers in a block of metadata: each read is checked, what lies outside is zero.
//!
//! Zero is no magic number, no size and no address, so that a structure that was cut short is refused by the checks
//! that every structure has to pass anyway.

/// The bytes at `at`, zeros where there are none.
fn array<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    at.checked_add(N)
        .and_then(|end| data.get(at..end))
        .and_then(|part| part.try_into().ok())
        .unwrap_or([0; N])
}

pub(super) fn byte(data: &[u8], at: usize) -> u8 {
    array::<1>(data, at)[0]
}

pub(super) fn be16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(data, at))
}

pub(super) fn be32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(data, at))
}

pub(super) fn be64(data: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(data, at))
}

pub(super) fn le16(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(data, at))
}

pub(super) fn le32(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(data, at))
}

pub(super) fn uuid(data: &[u8], at: usize) -> [u8; 16] {
    array(data, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_zero() {
        assert_eq!(be16(&[1, 2], 0), 0x0102);
        assert_eq!(le16(&[1, 2], 0), 0x0201);
        assert_eq!(be32(&[1, 2, 3], 0), 0);
        assert_eq!(be64(&[0xFF; 8], 1), 0);
        assert_eq!(le32(&[0xFF; 8], usize::MAX), 0);
        assert_eq!(byte(&[], 0), 0);
        assert_eq!(uuid(&[9; 15], 0), [0; 16]);
    }
}
