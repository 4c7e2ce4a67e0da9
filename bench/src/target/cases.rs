//! What is measured of the target, and what each must come to.

use super::process::Served;
use super::work::{Kind, Work};
use crate::report::Bar;

/// One piece of work on one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// What the namespace is.
    pub(super) served: Served,
    /// What is asked for.
    pub(super) work: Work,
    /// Connections, each of this depth.
    pub(super) connections: u16,
    /// Commands in flight on each.
    pub(super) depth: u16,
}

/// The bars beside one peer; none where there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bars {
    /// Of commands a second.
    pub(super) rate: Option<Bar>,
    /// Of the median and the 99th percentile of the latency.
    pub(super) latency: Option<Bar>,
    /// Of the target's processor time a command.
    pub(super) cpu: Option<Bar>,
}

/// From this depth on a connection has many commands in flight.
const DEEP: u16 = 32;

impl Case {
    /// The name of its rows, without the last part: `target/null/randread/qd32`, `target/null/randread/64x4`.
    pub(super) fn name(&self) -> String {
        let Self { served, work, connections, depth } = *self;
        let load = if connections == 1 { format!("qd{depth}") } else { format!("{connections}x{depth}") };
        format!("target/{}/{}/{load}", served.name(), work.name())
    }

    /// Whether the bare responder can do the same: it knows one connection, one kind of command and no R2T.
    pub(super) fn has_ceiling(&self) -> bool {
        self.connections == 1 && self.work.kind != Kind::Mixed && self.work == Work::small(self.work.kind)
    }

    /// What must hold beside the bare responder.
    pub(super) fn bars_of_ceiling(&self) -> Bars {
        let is_barred = self.served == Served::Null && self.depth >= DEEP;
        Bars { rate: is_barred.then_some(Bar::RatioAtLeast(0.85)), ..Bars::default() }
    }

    /// What must hold beside SPDK's target.
    pub(super) fn bars_of_spdk(&self) -> Bars {
        let is_large = self.work.len > 4096;
        Bars {
            rate: (self.depth > 1).then_some(Bar::RatioAtLeast(if is_large { 1.05 } else { 1.3 })),
            latency: (self.depth == 1 && self.connections == 1).then_some(Bar::RatioAtMost(0.85)),
            cpu: (self.depth >= DEEP && !is_large && !self.work.digests).then_some(Bar::RatioAtMost(0.8)),
        }
    }

    /// Least part of the mean that the slowest of many connections must have.
    pub(super) fn bar_of_share(&self) -> Option<Bar> {
        (self.connections > 1).then_some(Bar::OursAtLeast(0.8))
    }
}

/// All of them: each kind of work at each depth, then large commands, digests and many connections.
pub(super) fn all(depths: &[u16]) -> Vec<Case> {
    let mut cases = Vec::new();
    for served in [Served::Null, Served::Memory] {
        for kind in [Kind::Read, Kind::Write, Kind::Mixed] {
            for &depth in depths {
                // A mix has no latency of its own.
                if kind != Kind::Mixed || depth > 1 {
                    cases.push(Case { served, work: Work::small(kind), connections: 1, depth });
                }
            }
        }
    }
    let null = |work, connections, depth| Case { served: Served::Null, work, connections, depth };
    for kind in [Kind::Read, Kind::Write] {
        cases.push(null(Work { len: 128 << 10, ..Work::small(kind) }, 1, 16));
    }
    cases.push(null(Work { digests: true, ..Work::small(Kind::Read) }, 1, 32));
    for connections in [64, 256] {
        cases.push(null(Work::small(Kind::Read), connections, 4));
    }
    cases
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_case_has_a_name_of_its_own_and_the_bars_that_are_asked_for() {
        let cases = all(&[1, 32, 128]);
        let names: HashSet<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        for name in
            ["target/null/randread/qd1", "target/null/randread-digests/qd32", "target/null/randread/256x4"]
        {
            assert!(names.contains(name), "{name} is missing from {names:?}");
        }
        let many = cases.iter().find(|case| case.connections == 256).unwrap();
        assert_eq!(many.bars_of_spdk().rate, Some(Bar::RatioAtLeast(1.3)));
        assert!(many.bar_of_share().is_some() && !many.has_ceiling());
    }
}
