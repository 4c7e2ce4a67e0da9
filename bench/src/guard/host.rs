//! The host of what is counted: it shares the thread with the target, which it calls until all is answered.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use fastice::units::Lba;

use crate::target::inbound::{Event, Inbound};
use crate::target::join::{Association, PATIENCE, join};
use crate::target::work::Work;

/// Where the first block of a read or write (SLBA) is in its capsule: behind the common header, in dwords 10 and 11.
const SLBA_AT: usize = 48;
/// What is read at a time.
const PIECE_LEN: usize = 1 << 20;

/// A host with one I/O queue.
pub(super) struct Host {
    stream: TcpStream,
    _association: Association,
    /// One a CID.
    capsules: Vec<Vec<u8>>,
    inbound: Inbound,
    space: Vec<u8>,
}

impl Host {
    /// Joins; waits for the target meanwhile.
    ///
    /// # Errors
    /// When the target does not let it.
    pub(super) fn join(address: SocketAddr, work: Work, depth: u16, blocks: u64) -> Result<Self> {
        let mut association = join(address, 1, depth, work.wanted())?;
        let (stream, _) = association.queues.pop().context("an association without a queue")?;
        stream.set_nonblocking(true)?;
        let capsules = (0..depth).map(|cid| work.capsule(cid, 0, blocks)).collect::<Result<_>>()?;
        let (inbound, space) = (Inbound::default(), vec![0; PIECE_LEN]);
        Ok(Self { stream, _association: association, capsules, inbound, space })
    }

    /// Of its I/O queue.
    pub(super) const fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends each command once, at `place()`, and calls `serve` until all are answered; gives how many system calls this took of the
    /// host, with readings of the clock.
    ///
    /// # Errors
    /// When the target answers otherwise than well or not at all, or what `serve` gives.
    pub(super) fn exchange(
        &mut self,
        mut place: impl FnMut() -> Lba,
        mut serve: impl FnMut() -> Result<()>,
    ) -> Result<u64> {
        for capsule in &mut self.capsules {
            let slba = capsule.get_mut(SLBA_AT..).and_then(<[u8]>::first_chunk_mut);
            *slba.context("a capsule that is too short")? = place().0.to_le_bytes();
        }
        let (begun, mut calls) = (Instant::now(), 1);
        let (mut out, mut in_flight) = (self.capsules.concat(), self.capsules.len());
        while in_flight > 0 {
            ensure!(begun.elapsed() < PATIENCE, "the target does not answer");
            calls += 2 + send_some(&mut self.stream, &mut out)?;
            serve()?;
            let len = match self.stream.read(&mut self.space) {
                Ok(0) => bail!("the target closed the connection"),
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            let depth = self.capsules.len();
            self.inbound.take(self.space.get(..len).unwrap_or_default(), |event| match event {
                Event::Done { cid } => {
                    ensure!(usize::from(cid) < depth, "a CID that was not sent");
                    in_flight = in_flight.checked_sub(1).context("more responses than commands")?;
                    Ok(())
                }
                Event::More => Ok(()),
                Event::Wanted(_) => bail!("data is asked for that went in the capsule"),
            })?;
        }
        Ok(calls)
    }
}

/// Sends as much as the socket takes now, and keeps the rest; gives how often it tried.
fn send_some(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<u64> {
    let mut calls = 0;
    while !bytes.is_empty() {
        calls += 1;
        match stream.write(bytes) {
            Ok(len) => drop(bytes.drain(..len)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(calls)
}
