//! Responses that are held back until the data of other commands is in the send batch.
//!
//! ```text
//!   a command at a time   D R D R D R D R        D  C2HData, 24 bytes and the data
//!   four at a time        D D D D R R R R        R  response capsule, 24 bytes
//! ```
//!
//! A host with SQ flow control gets a response capsule after the data of each read. One that reads its socket in pieces, completes
//! what is in a piece and submits that many anew (SPDK's initiator does: a piece is eight data PDUs) sends commands by as few as lie in
//! a piece, and a send costs more than all else that it does for a command. Of responses that come together it completes all at once, so
//! its commands come together too. That takes nothing from it: the data arrives no later, and it is copied meanwhile.
//!
//! But a host that got *all* its responses together would wait for the target, and the target then for it: how many shall be held is
//! decided where its commands are seen to ([`Gather`](crate::reactor::Gather)). A host that never had many is answered at once, and so is long
//! data, behind what was held.
//!
//! What it does not do: change the order of responses among themselves, for SQHD must not go back, or hold one beyond its batch.

/// Responses at a time, at the most: half of what most hosts have under way, so that of more than these half, and all, is the same.
const COUNT_MAX: u32 = 64;
/// A response capsule with its header digest, in bytes.
const RESPONSE_BYTES_MAX: usize = 28;
/// Data of one command whose response is held, at the most.
const DATA_BYTES_MAX: usize = 16 << 10;
/// Data of all whose responses are held together: as much more goes before the first of them.
const ALL_DATA_BYTES_MAX: usize = 256 << 10;

/// The responses of one connection that are held.
#[derive(Debug, Default)]
pub(super) struct HeldResponses {
    bytes: Vec<u8>,
    count: u32,
    /// Data before them, in bytes.
    data_len: usize,
    /// So many are held together.
    most: u32,
}

impl HeldResponses {
    /// Makes room for as many as there may be.
    pub(super) fn reserve(&mut self) {
        self.bytes.reserve_exact(COUNT_MAX as usize * RESPONSE_BYTES_MAX);
    }

    /// So many shall be held together, or as many as may be.
    #[inline]
    pub(super) fn set_most(&mut self, most: u64) {
        self.most = u32::try_from(most).unwrap_or(COUNT_MAX).min(COUNT_MAX);
    }

    /// Whether the response of a command with so much data is held: one without any behind others only.
    #[inline]
    pub(super) const fn takes(&self, data_len: usize) -> bool {
        match data_len {
            0 => !self.bytes.is_empty(),
            _ => self.most > 1 && data_len <= DATA_BYTES_MAX,
        }
    }

    /// Holds the response of a command with so much data. True when they are enough, and go.
    #[inline]
    pub(super) fn hold(&mut self, response: &[u8], data_len: usize) -> bool {
        self.bytes.extend_from_slice(response);
        self.count += 1;
        self.data_len += data_len;
        self.count >= self.most || self.data_len >= ALL_DATA_BYTES_MAX
    }

    /// What is held, in order.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Nothing is held any more.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        (self.count, self.data_len) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are held until they go.
    fn held(most: u64, data_len: usize) -> u32 {
        let mut held = HeldResponses::default();
        held.set_most(most);
        assert!(held.takes(data_len), "{most} {data_len}");
        let mut count = 1;
        while !held.hold(&[0; RESPONSE_BYTES_MAX], data_len) {
            count += 1;
        }
        assert_eq!(held.bytes().len(), count as usize * RESPONSE_BYTES_MAX);
        count
    }

    #[test]
    fn as_many_are_held_together_as_shall_be() {
        assert_eq!(held(16, 4096), 16);
        assert_eq!(held(2, 512), 2);
        assert_eq!(held(u64::MAX, 512), COUNT_MAX);
    }

    #[test]
    fn much_data_is_followed_by_its_responses_sooner() {
        assert_eq!(held(128, 4096), 64);
        assert_eq!(held(128, 8192), 32);
        assert_eq!(held(128, DATA_BYTES_MAX), 16);
    }

    #[test]
    fn few_commands_and_long_data_are_answered_at_once() {
        let mut held = HeldResponses::default();
        assert!(!held.takes(512), "nothing is known of the host");
        held.set_most(1);
        assert!(!held.takes(512));
        held.set_most(16);
        assert!(held.takes(DATA_BYTES_MAX) && !held.takes(DATA_BYTES_MAX + 1));
        held.set_most(0);
        assert!(!held.takes(512), "it has few by now");
    }

    #[test]
    fn a_write_is_answered_at_once_or_behind_reads() {
        let mut held = HeldResponses::default();
        held.set_most(16);
        assert!(!held.takes(0), "nothing is gained");
        assert!(!held.hold(&[1], 512));
        assert!(held.takes(0), "in order");
        held.clear();
        assert!(!held.takes(0));
    }

    #[test]
    fn what_is_held_is_in_order_and_goes_whole() {
        let mut held = HeldResponses::default();
        held.set_most(4);
        assert!(!held.hold(&[1], 512) && !held.hold(&[2], 512));
        assert_eq!(held.bytes(), [1, 2]);
        held.clear();
        assert!(held.bytes().is_empty());
        assert!(
            !held.hold(&[3], 512) && !held.hold(&[4], 512) && !held.hold(&[5], 512),
            "counted from the start"
        );
        assert!(held.hold(&[6], 512));
    }
}
