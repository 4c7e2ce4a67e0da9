//! A connection without manners, for tests and benches: sends any bytes, and reads what comes back PDU by PDU.
//!
//! Nothing is retried or held back here, and only what is read is checked.

use super::error::{ErrorKind, InitiatorError};
use crate::tcp::digest;
use crate::tcp::pdu::{
    self, COMMON_HEADER_LEN, Digests, HEADER_MAX, HeaderPlan, IcReq, IcResp, PduHeader, PduRules, Phase,
    Receiver,
};
use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A PDU that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawPdu {
    /// Its header.
    pub header: PduHeader,
    /// Its lengths.
    pub plan: HeaderPlan,
    /// Its data.
    pub data: Vec<u8>,
    /// Whether its data digest fits its data; `true` when it has none.
    pub data_digest_good: bool,
}

/// What reading gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawEvent {
    /// A whole PDU.
    Pdu(RawPdu),
    /// The peer closed the connection, in order or by a reset.
    Closed,
    /// Nothing within the time given.
    Silence,
}

/// A TCP connection to a controller.
pub struct RawConnection {
    stream: TcpStream,
    rules: PduRules,
    unread: Vec<u8>,
}

impl RawConnection {
    /// Connects; nothing is sent.
    ///
    /// # Errors
    /// No connection within five seconds.
    pub fn connect(address: SocketAddr) -> Result<Self, InitiatorError> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).map_err(|error| {
            InitiatorError::new(ErrorKind::Connect, format!("cannot connect to {address}")).with_source(error)
        })?;
        stream.set_nodelay(true).map_err(InitiatorError::closed)?;
        Ok(Self { stream, rules: PduRules::initializing(Receiver::Host), unread: Vec::new() })
    }

    /// The socket itself; `None` when bytes were received that nobody has read.
    #[must_use]
    pub fn into_stream(self) -> Option<TcpStream> {
        self.unread.is_empty().then_some(self.stream)
    }

    /// Exchanges ICReq and ICResp.
    ///
    /// # Errors
    /// Whatever comes in place of an ICResp within five seconds.
    pub fn initialize(&mut self, digests: Digests) -> Result<IcResp, InitiatorError> {
        let mut header = [0; HEADER_MAX];
        let len = pdu::ic_req(&mut header, &IcReq { hpda: 0, digests, maxr2t_z: 0 });
        self.send(&header[..len])?;
        match self.read_pdu(Duration::from_secs(5))? {
            RawEvent::Pdu(RawPdu { header: PduHeader::IcResp(ic_resp), .. }) => {
                self.rules.phase = Phase::Running;
                self.rules.digests = ic_resp.digests;
                Ok(ic_resp)
            }
            other => Err(InitiatorError::protocol(format!("in place of an ICResp came {other:?}"))),
        }
    }

    /// The digests in force.
    #[must_use]
    pub const fn digests(&self) -> Digests {
        self.rules.digests
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), InitiatorError> {
        self.stream.write_all(bytes).map_err(InitiatorError::closed)
    }

    /// Sends bytes a few at a time.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send_slowly(
        &mut self,
        bytes: &[u8],
        piece_len: usize,
        pause: Duration,
    ) -> Result<(), InitiatorError> {
        for piece in bytes.chunks(piece_len.max(1)) {
            self.send(piece)?;
            std::thread::sleep(pause);
        }
        Ok(())
    }

    /// Sends a command capsule, well formed around whatever the 64 bytes and the data are.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send_capsule(&mut self, sqe: &[u8; 64], data: &[u8]) -> Result<(), InitiatorError> {
        let mut header = [0; HEADER_MAX];
        let data_len = u32::try_from(data.len()).map_err(|_| InitiatorError::invalid("too much data"))?;
        let len = pdu::capsule_cmd(&mut header, self.rules.digests, 0, sqe, data_len);
        let mut bytes = header[..len].to_vec();
        bytes.extend_from_slice(data);
        if self.rules.digests.data && !data.is_empty() {
            bytes.extend_from_slice(&digest::crc32c(0, data).to_le_bytes());
        }
        self.send(&bytes)
    }

    /// Ends the sending half.
    ///
    /// # Errors
    /// The connection broke.
    pub fn half_close(&mut self) -> Result<(), InitiatorError> {
        self.stream.shutdown(Shutdown::Write).map_err(InitiatorError::closed)
    }

    /// The next PDU.
    ///
    /// # Errors
    /// A PDU that breaks the protocol.
    pub fn read_pdu(&mut self, wait: Duration) -> Result<RawEvent, InitiatorError> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(pdu) = self.take_pdu()? {
                return Ok(RawEvent::Pdu(pdu));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(RawEvent::Silence);
            }
            self.stream.set_read_timeout(Some(left)).map_err(InitiatorError::closed)?;
            let mut piece = [0; 65536];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(RawEvent::Closed),
                Ok(len) => self.unread.extend_from_slice(&piece[..len]),
                Err(error) => match error.kind() {
                    IoErrorKind::WouldBlock | IoErrorKind::TimedOut | IoErrorKind::Interrupted => {}
                    IoErrorKind::ConnectionReset | IoErrorKind::BrokenPipe => return Ok(RawEvent::Closed),
                    _ => return Err(InitiatorError::closed(error)),
                },
            }
        }
    }

    fn take_pdu(&mut self) -> Result<Option<RawPdu>, InitiatorError> {
        let Some(first8) = self.unread.first_chunk::<COMMON_HEADER_LEN>() else { return Ok(None) };
        let plan = pdu::header_len_needed(&self.rules, first8).map_err(InitiatorError::pdu)?;
        if self.unread.len() < plan.total_len() {
            return Ok(None);
        }
        let decoded = pdu::decode_header(&self.rules, &self.unread).map_err(InitiatorError::pdu)?;
        let bytes: Vec<u8> = self.unread.drain(..plan.total_len()).collect();
        let (data, ddgst) = bytes[plan.data_offset..].split_at(plan.data_len);
        let data_digest_good = !plan.ddgst || ddgst == digest::crc32c(0, data).to_le_bytes();
        Ok(Some(RawPdu { header: decoded.header, plan, data: data.to_vec(), data_digest_good }))
    }
}
