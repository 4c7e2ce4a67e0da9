//! Running a future of the control path where there is no executor.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Polls `future` until it is done, and calls `idle` between: to step a model, to sleep a little, or to do nothing.
///
/// The driver's futures ask to be polled again at once, for a polled device does not wake anybody. All of them end
/// by their own deadlines, provided that the clock moves.
pub fn block_on<F: Future>(future: F, mut idle: impl FnMut()) -> F::Output {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        idle();
    }
}
