//! The commands of one connection: a fixed table, found by its index (our TTAG) or by CID.

use std::time::Instant;

use hugepage_alloc::DmaBuf;
use nvme_spec::SubmissionQueueEntry;

use super::outstanding::Outstanding;
use super::times::Passed;
use crate::fabrics::{Completion, IoCommand};
use crate::stage::Stamp;

/// Index of a request in its connection's table; also the TTAG of its R2T.
pub(super) type Index = u16;

/// What a command's data is for once it has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For the session: Connect, Set Features, ranges.
    Session,
    /// For the device.
    Device(IoCommand),
}

/// Where a command stands. Each state names what it waits for.
#[derive(Debug)]
pub(super) enum State {
    /// No command.
    Free,
    /// A buffer, to ask the host for `len` bytes of data with an R2T.
    BufferForData(Purpose, u32),
    /// A buffer, for data that came in the capsule and lies on the shelf.
    BufferForShelf(Purpose),
    /// A buffer, to read into.
    BufferForRead(IoCommand),
    /// A buffer, to send what the session had to say.
    BufferForAnswer(Vec<u8>, Completion),
    /// The rest of its data, in the capsule or in H2CData.
    Data(Purpose),
    /// The device.
    Device {
        /// The buffer comes back with data for the host.
        reads: bool,
    },
    /// An event: an Asynchronous Event Request.
    Parked,
    /// Its turn to be sent: data first when `buf` is there, then the completion.
    Answer(Completion),
}

/// One command. Laid out so that a read which is answered at once touches two cache lines of it.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Request {
    pub(super) sqe: SubmissionQueueEntry,
    pub(super) state: State,
    /// When it arrived.
    pub(super) arrived: Stamp,
    /// Bytes of data that have arrived.
    pub(super) received: u32,
    /// Bytes of the pool that it keeps from others.
    charge: u32,
    /// An R2T was made: H2CData may come.
    pub(super) asked: bool,
    /// The data did not fit its digest.
    pub(super) spoilt: bool,
    pub(super) buf: Option<DmaBuf>,
    /// In-capsule data for which there was no buffer when it came. The stream goes on behind it, and with it the data
    /// of commands that have buffers: they would never get free if it had to wait.
    pub(super) shelf: Vec<u8>,
    /// Since when the host owes the rest of the data. Of one in [`State::Data`] only.
    pub(super) owed_since: Option<Instant>,
    /// When it passed its stages: of one that waits to be answered.
    pub(super) passed: Passed,
}

impl Request {
    const fn free(sqe: SubmissionQueueEntry) -> Self {
        Self {
            sqe,
            state: State::Free,
            arrived: Stamp::NONE,
            received: 0,
            charge: 0,
            asked: false,
            spoilt: false,
            buf: None,
            shelf: Vec::new(),
            owed_since: None,
            passed: Passed::NONE,
        }
    }

    /// Bytes of data that are expected: the size of the buffer, or of the shelf.
    pub(super) fn expected(&self) -> u32 {
        let len = self.buf.as_ref().map_or(self.shelf.len(), DmaBuf::len);
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    /// Puts received data where it belongs.
    pub(super) fn store(&mut self, at: usize, bytes: &[u8]) {
        if let Some(buf) = &self.buf {
            buf.write_from(at, bytes);
        } else if let Some(place) = self.shelf.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

/// Why a command got no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// Its CID belongs to a command that is under way.
    CidInUse,
    /// The host has more commands under way than the queue has entries.
    QueueOverrun,
}

/// Places that are made at first; then as many again, up to the queue's size.
const PLACES_MIN: usize = 8;

/// All commands of a connection. Places are made when so many commands are under way for the first time: most queues never
/// have as many as they may.
#[derive(Debug)]
pub(super) struct Requests {
    slots: Vec<Request>,
    free: Vec<Index>,
    /// The most commands there may be: the queue's size.
    limit: usize,
    /// The sum of all charges.
    held_bytes: usize,
    /// One bit a CID: finds a duplicate in constant time, whatever numbers the host gives.
    cids: Box<[u64; 1024]>,
    /// What the host has outstanding, of one for which that is counted.
    outstanding: Option<Outstanding>,
}

impl Requests {
    pub(super) fn new(size: u16) -> Self {
        let (slots, free, cids) = (Vec::new(), Vec::new(), Box::new([0; 1024]));
        let mut requests = Self { slots, free, limit: 0, held_bytes: 0, cids, outstanding: None };
        requests.grow(size);
        requests
    }

    /// Allows `size` commands.
    pub(super) fn grow(&mut self, size: u16) {
        self.limit = usize::from(size);
    }

    /// Makes more places, and gives one of them; none when there are as many as commands may be.
    #[cold]
    fn more_places(&mut self) -> Option<Index> {
        let empty: SubmissionQueueEntry = zerocopy::FromZeros::new_zeroed();
        let have = self.slots.len();
        let want = (have + have.max(PLACES_MIN)).min(self.limit);
        self.slots.reserve_exact(want.saturating_sub(have));
        self.free.reserve_exact(want);
        for index in have..want {
            self.slots.push(Request::free(empty));
            self.free.push(Index::try_from(index).ok()?);
        }
        self.free.pop()
    }

    /// How many commands are under way.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// From now on it is counted what the host has outstanding.
    pub(super) fn count_outstanding(&mut self) {
        self.outstanding = Some(Outstanding::new());
    }

    /// The most that the host had outstanding lately, as it sees it, where that is counted and known: see
    /// [`outstanding`](super::outstanding).
    #[inline]
    pub(super) fn outstanding(&self) -> Option<u16> {
        self.outstanding.as_ref().and_then(Outstanding::most)
    }

    /// How many there may be.
    pub(super) fn capacity(&self) -> usize {
        self.limit
    }

    /// Bytes of the pool that the commands hold.
    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Gives a command its buffer, and charges it until the command ends.
    pub(super) fn give(&mut self, index: Index, buf: DmaBuf) {
        // At most 2 MiB.
        self.charge(index, u32::try_from(buf.len()).unwrap_or(u32::MAX));
        self.slots[usize::from(index)].buf = Some(buf);
    }

    /// Charges a command for a buffer of so many bytes that is somewhere else.
    #[inline]
    pub(super) fn charge(&mut self, index: Index, len: u32) {
        self.slots[usize::from(index)].charge += len;
        self.held_bytes += len as usize;
    }

    /// Since when the host owes data, for the command that waits longest.
    pub(super) fn owed_since(&self) -> Option<Instant> {
        if self.len() == 0 {
            return None;
        }
        self.slots
            .iter()
            .filter(|slot| matches!(slot.state, State::Data(_)))
            .filter_map(|slot| slot.owed_since)
            .min()
    }

    const fn bit(cid: u16) -> (usize, u64) {
        (cid as usize >> 6, 1 << (cid & 63))
    }

    /// A place for a command.
    pub(super) fn insert(&mut self, sqe: &SubmissionQueueEntry) -> Result<Index, NoPlace> {
        let (word, bit) = Self::bit(sqe.cid.get());
        if self.cids[word] & bit != 0 {
            return Err(NoPlace::CidInUse);
        }
        if self.len() >= self.limit {
            return Err(NoPlace::QueueOverrun);
        }
        let index = self.free.pop().or_else(|| self.more_places()).ok_or(NoPlace::QueueOverrun)?;
        self.cids[word] |= bit;
        if let Some(outstanding) = &mut self.outstanding {
            outstanding.saw(sqe.cid.get(), self.limit);
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.sqe = *sqe;
        slot.received = 0;
        slot.spoilt = false;
        slot.asked = false;
        Ok(index)
    }

    /// The command at an index that this side keeps.
    pub(super) fn at(&mut self, index: Index) -> &mut Request {
        &mut self.slots[usize::from(index)]
    }

    /// The command at an index that a peer named, if there is one.
    pub(super) fn get(&mut self, index: Index) -> Option<&mut Request> {
        self.slots.get_mut(usize::from(index)).filter(|request| !matches!(request.state, State::Free))
    }

    /// The parked command with this CID.
    pub(super) fn parked(&self, cid: u16) -> Option<Index> {
        let is_it =
            |request: &Request| matches!(request.state, State::Parked) && request.sqe.cid.get() == cid;
        self.slots.iter().position(is_it).and_then(|index| Index::try_from(index).ok())
    }

    /// Ends a command; its buffer goes back to the pool unless somebody else still holds it.
    pub(super) fn remove(&mut self, index: Index) {
        let slot = &mut self.slots[usize::from(index)];
        if matches!(slot.state, State::Device { .. }) {
            // Its buffer went to the device, and that was never on the shelf any more: these lines need not be touched.
            debug_assert!(slot.buf.is_none() && slot.shelf.is_empty(), "both were taken");
        } else {
            slot.buf = None;
            slot.shelf = Vec::new();
        }
        slot.state = State::Free;
        self.held_bytes -= std::mem::take(&mut slot.charge) as usize;
        let (word, bit) = Self::bit(slot.sqe.cid.get());
        self.cids[word] &= !bit;
        self.free.push(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`Request`] says of its lines.
    #[test]
    fn a_read_touches_two_lines_of_its_request() {
        assert_eq!(std::mem::offset_of!(Request, state), 64);
        assert_eq!(std::mem::offset_of!(Request, buf), 128, "{}", size_of::<State>());
    }

    fn command(cid: u16) -> SubmissionQueueEntry {
        SubmissionQueueEntry { cid: cid.into(), ..Default::default() }
    }

    #[test]
    fn a_cid_is_used_once_at_a_time() {
        let mut requests = Requests::new(4);
        let first = requests.insert(&command(0xFFFF)).expect("room");
        assert_eq!(requests.insert(&command(0xFFFF)), Err(NoPlace::CidInUse));
        requests.at(first).state = State::Device { reads: false };
        requests.remove(first);
        assert!(requests.insert(&command(0xFFFF)).is_ok());
    }

    #[test]
    fn what_a_host_has_outstanding_is_counted_by_the_commands_that_have_a_place() {
        let mut requests = Requests::new(8);
        let rounds = |requests: &mut Requests| {
            for cid in (0..4).cycle().take(2000) {
                let index = requests.insert(&command(cid)).expect("room");
                assert_eq!(requests.insert(&command(cid)), Err(NoPlace::CidInUse));
                requests.remove(index);
            }
            requests.outstanding()
        };
        assert_eq!(rounds(&mut requests), None, "nobody asked");
        requests.count_outstanding();
        assert_eq!(rounds(&mut requests), Some(4));
    }

    #[test]
    fn more_commands_than_entries_are_refused_until_it_grows() {
        let mut requests = Requests::new(2);
        assert!(requests.insert(&command(1)).is_ok());
        assert!(requests.insert(&command(2)).is_ok());
        assert_eq!(requests.insert(&command(3)), Err(NoPlace::QueueOverrun));
        requests.grow(3);
        assert!(requests.insert(&command(3)).is_ok());
        assert_eq!((requests.len(), requests.capacity()), (3, 3));
    }

    #[test]
    fn places_are_made_as_they_are_wanted_and_no_more_than_there_may_be() {
        let mut requests = Requests::new(50);
        for cid in 0..50 {
            let index = requests.insert(&command(cid)).expect("room");
            assert_eq!(requests.at(index).sqe.cid.get(), cid);
            assert!(requests.slots.len() <= usize::from(cid + 1).next_power_of_two().max(PLACES_MIN));
        }
        assert_eq!((requests.slots.len(), requests.len()), (50, 50));
        assert_eq!(requests.insert(&command(50)), Err(NoPlace::QueueOverrun));
        requests.remove(7);
        assert_eq!(requests.insert(&command(50)), Ok(7));
    }

    #[test]
    fn a_queue_smaller_than_the_table_is_held_to_its_size() {
        let mut requests = Requests::new(8);
        requests.grow(2);
        assert!(requests.insert(&command(1)).is_ok());
        assert!(requests.insert(&command(2)).is_ok());
        assert_eq!(requests.insert(&command(3)), Err(NoPlace::QueueOverrun));
    }

    #[test]
    fn a_peer_cannot_name_a_command_that_is_not_there() {
        let mut requests = Requests::new(2);
        assert!(requests.get(0).is_none());
        assert!(requests.get(99).is_none());
        let index = requests.insert(&command(7)).expect("room");
        requests.at(index).state = State::Parked;
        assert!(requests.get(index).is_some());
        assert_eq!(requests.parked(7), Some(index));
        assert_eq!(requests.parked(8), None);
    }
}
