//! Waiting for one completion of one client.

use std::time::{Duration, Instant};

use fastice::ring::{Ring, RingClient, RingDone, Wait};

/// No wait is longer.
const DEADLINE: Duration = Duration::from_secs(20);

/// Turns the ring until the client has a completion.
pub(crate) fn next_done(ring: &Ring, client: &RingClient) -> RingDone {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(done) = client.pop() {
            return done;
        }
        assert!(Instant::now() < deadline, "no completion in {DEADLINE:?}");
        ring.turn(Wait::UpTo(Duration::from_millis(50))).expect("a turn");
    }
}
