//! Every state that a model can reach, breadth first.

use std::collections::HashSet;
use std::hash::Hash;

/// A model: its states are what they are, and what may follow.
pub(crate) trait Model: Clone + Eq + Hash {
    /// What must hold in every state, when it does not.
    fn broken(&self) -> Option<&'static str>;
    /// Every state that one step of one of the threads leads to.
    fn next(&self) -> Vec<Self>;
}

/// How many states there are, or the first one that breaks a promise, with a shortest way to it.
pub(crate) fn explore<M: Model>(first: M) -> Result<usize, (&'static str, Vec<M>)> {
    let mut seen = HashSet::from([first.clone()]);
    let mut trail: Vec<(M, Option<usize>)> = vec![(first, None)];
    let mut at = 0;
    while at < trail.len() {
        let state = trail[at].0.clone();
        if let Some(why) = state.broken() {
            return Err((why, way_to(&trail, at)));
        }
        for next in state.next() {
            if seen.insert(next.clone()) {
                trail.push((next, Some(at)));
            }
        }
        at += 1;
    }
    Ok(trail.len())
}

fn way_to<M: Model>(trail: &[(M, Option<usize>)], at: usize) -> Vec<M> {
    let mut way = Vec::new();
    let mut step = Some(at);
    while let Some(index) = step {
        way.push(trail[index].0.clone());
        step = trail[index].1;
    }
    way.reverse();
    way
}
