//! How fast the machine is at this moment at what is measured: bytes over a TCP connection on loopback, from one processor to the
//! other, with nothing else to do.
//!
//! Machines that are shared get slower as a whole for some seconds, by half and more, which no account of processor time shows.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::server::{both_ends, stay_on};

/// As a busy target sends.
const PIECE_LEN: usize = 64 << 10;
/// How long one look takes.
const TIME: Duration = Duration::from_millis(20);

/// MiB a second.
///
/// # Errors
/// When there is no connection, or a thread cannot be put on a processor.
pub(super) fn loopback_mib_s() -> Result<f64> {
    let (_, [first, last]) = both_ends()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    sender.set_nonblocking(true)?;
    receiver.set_nonblocking(true)?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send(sender, first, &is_over));
        let received = scope.spawn(|| receive(receiver, last, &is_over));
        let gone = |_| anyhow!("a thread ended before its time");
        let rate = received.join().map_err(gone)?;
        // Also where the receiver could not even begin.
        is_over.store(true, Ordering::Relaxed);
        sending.join().map_err(gone)??;
        rate
    })
}

fn send(mut to: TcpStream, processor: usize, is_over: &AtomicBool) -> Result<()> {
    stay_on(processor)?;
    let piece = vec![0x5A; PIECE_LEN];
    while !is_over.load(Ordering::Relaxed) {
        match to.write(&piece) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            // A receiver that has seen enough goes without reading the rest.
            Err(_) if is_over.load(Ordering::Relaxed) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn receive(mut from: TcpStream, processor: usize, is_over: &AtomicBool) -> Result<f64> {
    let placed = stay_on(processor);
    let (mut space, mut count) = (vec![0; PIECE_LEN], 0);
    let begun = Instant::now();
    while begun.elapsed() < TIME && placed.is_ok() {
        match from.read(&mut space) {
            Ok(len) => count += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => {
                is_over.store(true, Ordering::Relaxed);
                return Err(error.into());
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    is_over.store(true, Ordering::Relaxed);
    placed?;
    Ok(count as f64 / seconds / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_bytes_come_through() {
        // On a machine with more to do than it has processors, a look can be over before the sender had its turn.
        assert!((0..100).any(|_| loopback_mib_s().unwrap() > 0.0));
    }
}
