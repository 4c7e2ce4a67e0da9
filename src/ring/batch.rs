//! What one receive fills and one send empties.

use hugepage_alloc::DmaBuf;

/// The place where received bytes go: first a [`DmaBuf`] if there is one, then the byte buffer `rx`.
///
/// ```text
///   direct  [ already received | to be received ]      set_direct
///   rx      [ consumed | filled | free space    ]      filled(), consume(n)
/// ```
///
/// `rx` is ordinary memory. While the batch is in flight it belongs to the kernel and the caller has no way to it.
pub struct RecvBatch {
    direct: Option<DmaBuf>,
    rx: Box<[u8]>,
    start: usize,
    end: usize,
    pub(super) iovecs: [libc::iovec; 2],
    pub(super) header: libc::msghdr,
    /// The last receive emptied the socket: wait for it to be readable before trying.
    pub(super) poll_first: bool,
}

/// How the bytes of one receive were spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecvSplit {
    /// Bytes that went into the direct buffer.
    pub direct_len: usize,
    /// Bytes that went into `rx`.
    pub rx_len: usize,
}

impl RecvBatch {
    /// A batch with `capacity` bytes of `rx`.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            direct: None,
            rx: vec![0; capacity].into_boxed_slice(),
            start: 0,
            end: 0,
            iovecs: [super::sys::IOVEC_NONE; 2],
            header: super::sys::empty_msghdr(),
            poll_first: false,
        }
    }

    /// Sets or takes away the buffer that the next bytes go to first. Bytes that are in `rx` already stay there:
    /// the caller copies those that belong to the buffer, and sets only what is missing.
    pub fn set_direct(&mut self, buf: Option<DmaBuf>) {
        self.direct = buf.filter(|buf| !buf.is_empty());
    }

    /// Bytes of the direct buffer still to be received.
    #[must_use]
    pub fn direct_left(&self) -> usize {
        self.direct.as_ref().map_or(0, DmaBuf::len)
    }

    /// Received bytes that were not yet consumed.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        self.rx.get(self.start..self.end).unwrap_or_default()
    }

    /// Consumes the first `count` bytes of [`RecvBatch::filled`].
    ///
    /// # Panics
    /// When there are not as many: an error of the programmer.
    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "consumed {count} of {} bytes", self.end - self.start);
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room in `rx` for the next receive, without compaction.
    #[must_use]
    pub fn free_space(&self) -> usize {
        self.rx.len() - self.end
    }

    /// The size of `rx` in bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.rx.len()
    }

    /// Moves what is filled to the front of `rx`, when free space is below `wanted` bytes and moving helps.
    pub fn compact(&mut self, wanted: usize) {
        if self.free_space() < wanted && self.start > 0 {
            self.rx.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Writes the io vectors of the room there is: how many.
    pub(super) fn fill_iovecs(&mut self) -> usize {
        let direct = self.direct.as_ref().map(|buf| (buf.as_ptr(), buf.len()));
        let free = self.rx.get_mut(self.end..).filter(|free| !free.is_empty());
        let places = direct.into_iter().chain(free.map(|free| (free.as_mut_ptr(), free.len())));
        let mut count = 0;
        for (iovec, (start, len)) in self.iovecs.iter_mut().zip(places) {
            *iovec = libc::iovec { iov_base: start.cast(), iov_len: len };
            count += 1;
        }
        count
    }

    /// Books the `count` bytes that a receive returned. A direct buffer that is full is given up.
    ///
    /// Bytes beyond the room that was offered cannot have been received and are not booked.
    pub fn complete(&mut self, count: u32) -> RecvSplit {
        let count = count as usize;
        let direct_len = count.min(self.direct_left());
        if direct_len > 0
            && let Some(buf) = self.direct.take()
        {
            self.set_direct(buf.try_slice(direct_len, buf.len() - direct_len));
        }
        let rx_len = (count - direct_len).min(self.free_space());
        self.end += rx_len;
        RecvSplit { direct_len, rx_len }
    }
}

impl std::fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvBatch")
            .field("direct_left", &self.direct_left())
            .field("filled_len", &self.filled().len())
            .field("free_space", &self.free_space())
            .finish_non_exhaustive()
    }
}

/// One vectored send: headers, copied into an arena, and payload buffers, in the order they were pushed.
///
/// Nothing grows: pushing more than there is room for returns false.
pub struct SendBatch {
    /// Filled up to its capacity at most, so that it never moves.
    arena: Vec<u8>,
    arena_bytes_max: usize,
    /// Where the bytes lie that are to be sent: in the arena, or in `bufs`, which are in the same order.
    iovecs: Vec<libc::iovec>,
    /// That the last of them ends where the arena does.
    ends_in_arena: bool,
    /// Each is there; as options, for so they move whole from where they lay.
    bufs: Vec<Option<DmaBuf>>,
    parts_max: usize,
    /// Parts before this one are sent.
    first: usize,
    bytes_len: usize,
    /// A part of its bytes is sent.
    begun: bool,
    pub(super) header: libc::msghdr,
}

impl SendBatch {
    /// The most parts a message may have (UIO_MAXIOV, `include/uapi/linux/uio.h`).
    pub const PARTS_MAX: usize = 1024;

    /// A batch with room for `arena_bytes` of copied bytes and `iov_max` parts, at most
    /// [`SendBatch::PARTS_MAX`].
    #[must_use]
    pub fn with_capacity(arena_bytes: usize, iov_max: usize) -> Self {
        let parts_max = iov_max.min(Self::PARTS_MAX);
        Self {
            arena: Vec::with_capacity(arena_bytes),
            arena_bytes_max: arena_bytes,
            iovecs: Vec::with_capacity(parts_max),
            ends_in_arena: false,
            bufs: Vec::with_capacity(parts_max),
            parts_max,
            first: 0,
            bytes_len: 0,
            begun: false,
            header: super::sys::empty_msghdr(),
        }
    }

    /// As [`SendBatch::push_bytes`], of bytes whose number is known when this is compiled: no call for so few.
    #[must_use]
    #[inline]
    pub fn push_array<const N: usize>(&mut self, bytes: &[u8; N]) -> bool {
        self.push_bytes(bytes)
    }

    /// Copies `bytes` to the end. False, and nothing copied, when there is no room.
    #[must_use]
    #[inline]
    pub fn push_bytes(&mut self, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        if bytes.len() > self.arena_room() {
            return false;
        }
        let has_part = self.parts_room() > 0;
        match self.iovecs.last_mut() {
            // The arena holds only what was pushed, in order: this continues the last part.
            Some(last) if self.ends_in_arena => last.iov_len += bytes.len(),
            _ if has_part => {
                let start = self.arena.as_ptr().wrapping_add(self.arena.len());
                self.iovecs.push(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: bytes.len() });
                self.ends_in_arena = true;
            }
            _ => return false,
        }
        self.arena.extend_from_slice(bytes);
        self.bytes_len += bytes.len();
        true
    }

    /// Appends a payload. False, and the buffer dropped, when there is no room: ask [`SendBatch::parts_room`]
    /// before.
    #[must_use]
    #[inline]
    pub fn push_buf(&mut self, buf: DmaBuf) -> bool {
        self.push_taken(&mut Some(buf))
    }

    /// As [`SendBatch::push_buf`], of one that is taken from where it lies, if one is there.
    #[must_use]
    #[inline]
    pub fn push_taken(&mut self, place: &mut Option<DmaBuf>) -> bool {
        let Some(buf) = place else { return true };
        if buf.is_empty() {
            *place = None;
            return true;
        }
        // It has room for as many buffers as parts; asked so that nothing is made for the case that it had to grow.
        if self.parts_room() == 0 || self.bufs.len() == self.bufs.capacity() {
            *place = None;
            return false;
        }
        self.bytes_len += buf.len();
        self.iovecs.push(libc::iovec { iov_base: buf.as_ptr().cast(), iov_len: buf.len() });
        self.ends_in_arena = false;
        self.bufs.push(place.take());
        true
    }

    /// Bytes that [`SendBatch::push_bytes`] has room for.
    #[must_use]
    pub const fn arena_room(&self) -> usize {
        self.arena_bytes_max - self.arena.len()
    }

    /// Parts there is room for.
    #[must_use]
    pub const fn parts_room(&self) -> usize {
        self.parts_max - self.iovecs.len()
    }

    /// Bytes still to be sent.
    #[must_use]
    pub const fn bytes_len(&self) -> usize {
        self.bytes_len
    }

    /// Whether nothing is left to be sent.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes_len == 0
    }

    /// Whether some of its bytes are sent, and some are left.
    #[must_use]
    pub const fn is_begun(&self) -> bool {
        self.begun
    }

    /// Takes the first `sent` bytes away; buffers that are sent whole are dropped. When all is sent the batch is
    /// cleared.
    ///
    /// # Panics
    /// When there are not as many: an error of the programmer.
    pub fn advance(&mut self, sent: usize) {
        assert!(sent <= self.bytes_len, "sent {sent} of {} bytes", self.bytes_len);
        self.bytes_len -= sent;
        self.begun |= sent > 0;
        if self.bytes_len == 0 {
            self.clear();
            return;
        }
        let mut left = sent;
        while let Some(part) = self.iovecs.get_mut(self.first) {
            if left < part.iov_len {
                part.iov_base = part.iov_base.wrapping_byte_add(left);
                part.iov_len -= left;
                break;
            }
            left -= part.iov_len;
            self.first += 1;
        }
        let arena = self.arena.as_ptr_range();
        let is_payload = |part: &&libc::iovec| !arena.contains(&part.iov_base.cast_const().cast());
        let unsent = self.iovecs.iter().skip(self.first).filter(is_payload).count();
        self.bufs.drain(..self.bufs.len().saturating_sub(unsent));
    }

    /// Drops all buffers and forgets all bytes.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.bufs.clear();
        self.arena.clear();
        (self.first, self.bytes_len) = (0, 0);
        (self.ends_in_arena, self.begun) = (false, false);
    }

    /// Points the header to what is left to be sent.
    pub(super) fn fill_header(&mut self) {
        let unsent = self.iovecs.get_mut(self.first..).unwrap_or_default();
        self.header.msg_iov = unsent.as_mut_ptr();
        self.header.msg_iovlen = unsent.len() as _;
    }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch")
            .field("bytes_len", &self.bytes_len)
            .field("parts", &(self.iovecs.len() - self.first))
            .finish_non_exhaustive()
    }
}
