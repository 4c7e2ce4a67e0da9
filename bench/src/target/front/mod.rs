//! The bare responder for hosts that join by the book, as SPDK's does: their admin queues are a real target's, and only the I/O queues
//! are answered by nobody.
//!
//! ```text
//!   admin queue ---- ICReq, Connect: looked at ---- passed on, byte by byte ----> fastice, which sleeps until it is asked
//!   I/O queue   ---- ICReq, Connect: answered ----> one thread for all of them
//!                    each command: a header with its CID, and data that is nobody's
//! ```
//!
//! It does what [`super::bare`] does, and what a whole driver needs beyond that: reads beside writes, R2T for data that is not in the
//! capsule, response capsules behind read data for a host that has flow control of its submission queue, as SPDK's has. How many of
//! these go together decides how many commands that host submits together, and with it the rate: so there are two of it
//! ([`Together`]). Any number of I/O queues ([`answering`]); each joins in a thread of its own ([`joining`]), so that one that takes its time
//! is in nobody's way. Digests are in [`super::sealed`]. What it does not do: SQHD (which is zero always: the hosts that it
//! is for do not look at it), HPDA, or to wait so that more comes together, as fastice may: a target that does can come to more than it.

mod answering;
mod commands;
mod joining;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::Result;

use super::bare::is_end;
use answering::{Answering, Door};
use joining::{Joined, joined, pass_on};

/// How many response capsules of a batch go together, behind the data of as many reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Together {
    /// Each behind its own data.
    One,
    /// All of it.
    All,
}

/// Answers connections until the process ends, and polls, or sleeps until something comes. `admin` is a target whose subsystem has the
/// same name.
///
/// # Errors
/// When a connection breaks otherwise than by its end, or says what no host says.
pub(super) fn answer(
    listener: &TcpListener,
    admin: SocketAddr,
    together: Together,
    sleeps: bool,
) -> Result<()> {
    let (door, arrivals) = answering::arrivals();
    let listener = listener.try_clone()?;
    let accept = move || {
        if let Err(error) = accept(&listener, &door, (admin, together, sleeps)) {
            door.fail(error);
        }
    };
    thread::Builder::new().name("accepts".to_owned()).spawn(accept)?;
    Answering::new(together).all(&arrivals)
}

/// Each connection has a thread until it has joined. One that sleeps keeps it, for a thread can sleep in one `read` only.
fn accept(
    listener: &TcpListener,
    door: &Door,
    (admin, together, sleeps): (SocketAddr, Together, bool),
) -> Result<()> {
    for stream in listener.incoming() {
        let stream = stream?;
        let door = door.clone();
        let serve = move || match serve(stream, &door, (admin, together, sleeps)) {
            Err(error) if !is_end(&error) => door.fail(error),
            _ => {}
        };
        thread::Builder::new().name("joins".to_owned()).spawn(serve)?;
    }
    Ok(())
}

/// One connection: an I/O queue until it is let in, or ends where it sleeps, an admin queue until it is passed on.
fn serve(
    mut stream: TcpStream,
    door: &Door,
    (admin, together, sleeps): (SocketAddr, Together, bool),
) -> Result<()> {
    stream.set_nodelay(true)?;
    match joined(&mut stream, admin)? {
        Joined::Admin(target) => pass_on(stream, target),
        Joined::Queue(agreed) if sleeps => Answering::new(together).one(stream, agreed),
        Joined::Queue(agreed) => {
            stream.set_nonblocking(true)?;
            door.let_in(stream, agreed);
            Ok(())
        }
    }
}
