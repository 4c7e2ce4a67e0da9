//! Whole messages over a socket that never blocks: partial ones are put together, each has a deadline, file
//! descriptors come with the message that they were sent with.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{HEADER_LEN, Header, MESSAGE_FDS_MAX, MESSAGE_LEN_MAX};

/// Why no message came or went. The stream is of no more use after any of them.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other end has closed the socket, or died.
    #[error("the other end closed the socket")]
    Closed,
    /// The other end did not answer, or stopped in the middle of a message, or takes nothing more.
    #[error("the other end did not move a whole message in time")]
    Deadline,
    /// What came is no message, or not one that may come now.
    #[error("the other end sent nonsense: {0}")]
    Nonsense(&'static str),
    /// The kernel refused.
    #[error("the socket failed")]
    Io(#[source] io::Error),
}

impl From<Errno> for StreamError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What followed the header.
    pub body: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    /// The message that is coming in, as far as it has come.
    partial: Vec<u8>,
    filled: usize,
    fds: Vec<OwnedFd>,
    /// When its first byte came.
    since: Option<Instant>,
    /// The message that is going out; kept so that its memory is.
    out: Vec<u8>,
}

impl Stream {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let partial = vec![0; HEADER_LEN as usize];
        Ok(Self { socket, partial, filled: 0, fds: Vec::new(), since: None, out: Vec::new() })
    }

    /// Sends a message: a header, whose length is set here, then `parts`, with `fds`.
    ///
    /// # Errors
    /// When not all of it could be sent in time.
    pub fn send(
        &mut self,
        header: Header,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), StreamError> {
        let len = HEADER_LEN as usize + parts.iter().map(|part| part.len()).sum::<usize>();
        let message_len = u32::try_from(len).map_err(|_| StreamError::Nonsense("a message of ours"))?;
        self.out.clear();
        self.out.extend_from_slice(Header { message_len, ..header }.as_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if fds.len() > MESSAGE_FDS_MAX {
            return Err(StreamError::Nonsense("a message of ours"));
        }
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(StreamError::Nonsense("a message of ours"));
        }
        let mut sent = 0;
        while let Some(rest) = self.out.get(sent..).filter(|rest| !rest.is_empty()) {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[io::IoSlice::new(rest)], &mut ancillary, flags) {
                Ok(count) => {
                    sent += count;
                    // The descriptors went with the first byte.
                    ancillary.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// When the other end is gone or sent what is no message.
    pub fn try_receive(&mut self) -> Result<Option<Message>, StreamError> {
        loop {
            if self.filled == self.partial.len() && self.filled >= HEADER_LEN as usize {
                let (header, _) = Header::read_from_prefix(&self.partial)
                    .map_err(|_| StreamError::Nonsense("a header that is none"))?;
                if !(HEADER_LEN..=MESSAGE_LEN_MAX).contains(&header.message_len) {
                    return Err(StreamError::Nonsense("an impossible length"));
                }
                if self.filled == header.message_len as usize {
                    return Ok(Some(self.take(header)));
                }
                self.partial.resize(header.message_len as usize, 0);
            }
            if !self.receive_some()? {
                return Ok(None);
            }
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// As [`Stream::try_receive`], and when it does not come in time.
    pub fn receive(&mut self, deadline: Instant) -> Result<Message, StreamError> {
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            self.wait(PollFlags::IN, deadline)?;
        }
    }

    /// How long a message has been on its way without its end having come; `None` between messages.
    #[must_use]
    pub fn partial_for(&self) -> Option<Duration> {
        self.since.map(|since| since.elapsed())
    }

    /// Ends the connection, so that the other end sees it at once.
    pub fn shut_down(&self) {
        // It may be closed already, which is as good.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn take(&mut self, header: Header) -> Message {
        let body = self.partial.split_off(HEADER_LEN as usize);
        self.filled = 0;
        self.since = None;
        Message { header, body, fds: std::mem::take(&mut self.fds) }
    }

    /// Reads what is there, up to the end of the header or message. False when nothing is.
    fn receive_some(&mut self) -> Result<bool, StreamError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let Some(room) = self.partial.get_mut(self.filled..) else { return Ok(false) };
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.socket, &mut [io::IoSliceMut::new(room)], &mut ancillary, flags) {
            Ok(received) => received,
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MESSAGE_FDS_MAX {
            return Err(StreamError::Nonsense("more file descriptors than a message may have"));
        }
        if received.bytes == 0 {
            return Err(StreamError::Closed);
        }
        self.filled += received.bytes;
        self.since.get_or_insert_with(Instant::now);
        Ok(true)
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<(), StreamError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StreamError::Deadline);
        }
        let timeout = Timespec::try_from(left).map_err(|_| StreamError::Deadline)?;
        match poll(&mut [PollFd::new(&self.socket, what)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio_user::wire::Command;
    use std::io::{Read, Write};

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours).unwrap(), theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    fn message(body: &[u8]) -> Vec<u8> {
        let message_len = HEADER_LEN + u32::try_from(body.len()).unwrap();
        let header = Header { message_len, ..Header::command(7, Command::DMA_MAP, 0) };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn messages_are_put_together_from_single_bytes() {
        let (mut stream, mut peer) = pair();
        let bytes = [message(b"first"), message(b""), message(b"third")].concat();
        let mut bodies = Vec::new();
        for byte in bytes {
            peer.write_all(&[byte]).unwrap();
            while let Some(message) = stream.try_receive().unwrap() {
                assert_eq!(message.header.message_id, 7);
                bodies.push(message.body);
            }
        }
        assert_eq!(bodies, [&b"first"[..], b"", b"third"]);
        assert_eq!(stream.partial_for(), None);
    }

    #[test]
    fn descriptors_come_with_their_own_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut sender, mut receiver) = (Stream::new(ours).unwrap(), Stream::new(theirs).unwrap());
        let null = std::fs::File::open("/dev/null").unwrap();
        let header = Header::command(1, Command::DMA_MAP, 0);
        sender.send(header, &[b"none"], &[], soon()).unwrap();
        sender.send(header, &[b"two"], &[null.as_fd(), null.as_fd()], soon()).unwrap();
        sender.send(header, &[b"none again"], &[], soon()).unwrap();
        let counts: Vec<_> = (0..3).map(|_| receiver.receive(soon()).unwrap().fds.len()).collect();
        assert_eq!(counts, [0, 2, 0]);
    }

    #[test]
    fn more_descriptors_than_a_message_may_have_end_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut sender, mut receiver) = (Stream::new(ours).unwrap(), Stream::new(theirs).unwrap());
        let null = std::fs::File::open("/dev/null").unwrap();
        let header = Header::command(1, Command::DMA_MAP, 0);
        let fds = [null.as_fd(); MESSAGE_FDS_MAX + 1];
        assert!(sender.send(header, &[], &fds, soon()).is_err());
        // Spread over the bytes of one message.
        let header = Header { message_len: HEADER_LEN + 8, ..header };
        for byte in header.as_bytes() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds[..2])));
            let iov = [io::IoSlice::new(std::slice::from_ref(byte))];
            sendmsg(&sender.socket, &iov, &mut ancillary, SendFlags::empty()).unwrap();
        }
        assert!(matches!(receiver.receive(soon()), Err(StreamError::Nonsense(_))));
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for len in [0, 15, MESSAGE_LEN_MAX + 1, u32::MAX] {
            let (mut stream, mut peer) = pair();
            let header = Header { message_len: len, ..Header::command(1, Command::VERSION, 0) };
            peer.write_all(header.as_bytes()).unwrap();
            assert!(matches!(stream.receive(soon()), Err(StreamError::Nonsense(_))), "{len}");
        }
    }

    #[test]
    fn silence_and_half_messages_end_at_the_deadline() {
        let (mut stream, mut peer) = pair();
        assert!(matches!(stream.receive(soon()), Err(StreamError::Deadline)));
        peer.write_all(&message(b"half")[..18]).unwrap();
        assert!(matches!(stream.receive(soon()), Err(StreamError::Deadline)));
        assert!(stream.partial_for().is_some());
        drop(peer);
        assert!(matches!(stream.receive(soon()), Err(StreamError::Closed)));
    }

    #[test]
    fn a_peer_that_reads_nothing_ends_at_the_deadline() {
        let (mut stream, mut peer) = pair();
        let body = vec![0; 32 << 10];
        let header = Header::command(1, Command::REGION_WRITE, 0);
        let end = soon();
        let error = (0..1000).find_map(|_| stream.send(header, &[&body], &[], end).err());
        assert!(matches!(error, Some(StreamError::Deadline)), "{error:?}");
        peer.read_exact(&mut [0; 16]).unwrap();
        drop(peer);
        let error = stream.send(header, &[&body], &[], soon()).unwrap_err();
        assert!(matches!(error, StreamError::Closed), "no signal ends the process: {error:?}");
    }
}
