//! What is measured of the target, and what each must come to.

use std::sync::Arc;

use anyhow::Result;

use super::LEN;
use super::file::ServedFile;
use super::places::Space;
use super::process::Served;
use super::whole::OnNull;
use super::work::{Kind, Work};
use crate::report::Bar;

/// One piece of work on one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// What the namespace is.
    pub(super) served: Served,
    /// The file, of one that serves a file.
    pub(super) file: Option<Arc<ServedFile>>,
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

/// What must hold beside the bare responder: this part of its rate.
pub(crate) const OF_BARE_MIN: f64 = 0.85;
/// From this depth on a connection has many commands in flight.
const DEEP: u16 = 32;

impl Case {
    /// Of anything but a file.
    pub(super) const fn new(served: Served, work: Work, connections: u16, depth: u16) -> Self {
        Self { served, file: None, work, connections, depth }
    }

    /// The same with fewer or more commands in flight.
    pub(super) fn with(&self, connections: u16, depth: u16) -> Self {
        Self { connections, depth, ..self.clone() }
    }

    /// What stands before the load in the name of its rows: `target/null/randread`.
    pub(super) fn place(&self) -> String {
        let served = self.file.as_ref().map_or_else(|| self.served.name(), |file| &file.name);
        format!("target/{served}/{}", self.work.name())
    }

    /// How much is in flight: `qd32`, `64x4`.
    pub(super) fn load(&self) -> String {
        let Self { connections, depth, .. } = self;
        if *connections == 1 { format!("qd{depth}") } else { format!("{connections}x{depth}") }
    }

    /// Its namespace.
    pub(super) fn space(&self) -> Result<Space> {
        Ok(match &self.file {
            Some(file) => file.space(),
            None if self.is_map() => Space::whole(OnNull::make(None)?.len.get()),
            None => Space::whole(LEN),
        })
    }

    /// Whether a map is served that is of no file.
    pub(super) const fn is_map(&self) -> bool {
        matches!(self.served, Served::MapOfOne | Served::MapOfMany)
    }

    /// Whether somebody works for its device on the processors of target and host.
    pub(super) const fn has_helpers(&self) -> bool {
        self.file.is_some() || matches!(self.served, Served::Model)
    }

    /// Whether it is measured only where it is named: where the target's own device is in software, on the processors of both, rows say
    /// nothing. It is there for `bench/tuned.sh`, to have our driver used.
    pub(super) const fn is_for_practice(&self) -> bool {
        matches!(self.served, Served::Model)
    }

    /// Whether a file or a map is served.
    pub(super) const fn is_pinned(&self) -> bool {
        self.is_map() || matches!(self.served, Served::File)
    }

    /// The name of its rows, without the last part: `target/null/randread/qd32`, `target/null/randread/64x4`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.place(), self.load())
    }

    /// Whether the bare responder can do the same: it knows one connection, one kind of command and no R2T.
    pub(super) fn has_ceiling(&self) -> bool {
        let is_small = self.work == Work::small(self.work.kind);
        self.served == Served::Null && self.connections == 1 && self.work.kind != Kind::Mixed && is_small
    }

    /// Whether it can for hosts that join as they would a target: any work, any number of connections.
    pub(super) fn has_front(&self) -> bool {
        self.served == Served::Null
    }

    /// Whether a socket may be left alone for a moment: many small commands in flight.
    pub(super) fn gathers(&self) -> bool {
        let is_small = self.work == Work::small(self.work.kind);
        self.served == Served::Null && self.connections == 1 && self.depth >= DEEP && is_small
    }

    /// What must hold beside the bare responder.
    pub(super) fn bars_of_ceiling(&self) -> Bars {
        let is_barred = self.depth >= DEEP;
        Bars { rate: is_barred.then_some(Bar::RatioAtLeast(OF_BARE_MIN)), ..Bars::default() }
    }

    /// What must hold beside SPDK's target.
    pub(super) fn bars_of_spdk(&self) -> Bars {
        let is_large = self.work.len > 4096;
        Bars {
            rate: (self.depth > 1).then_some(Bar::RatioAtLeast(if is_large { 1.05 } else { 1.3 })),
            latency: (self.depth == 1 && self.work.kind == Kind::Read).then_some(Bar::RatioAtMost(0.85)),
            cpu: (self.depth >= DEEP && !is_large && !self.work.digests).then_some(Bar::RatioAtMost(0.8)),
        }
    }

    /// What must hold beside the same blocks without a pin.
    pub(super) fn bars_of_pin() -> Bars {
        Bars { rate: Some(Bar::RatioAtLeast(0.97)), ..Bars::default() }
    }

    /// Least part of the mean that the slowest of many connections must have.
    pub(super) fn bar_of_share(&self) -> Option<Bar> {
        (self.connections > 1).then_some(Bar::OursAtLeast(0.8))
    }
}

/// All of them: each kind of work at each depth, then large commands, digests and many connections, then what is pinned.
pub(super) fn all(depths: &[u16], files: &[Arc<ServedFile>]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (served, kind) in [
        (Served::Null, Kind::Read),
        (Served::Null, Kind::Write),
        (Served::Null, Kind::Mixed),
        (Served::Memory, Kind::Read),
        (Served::Memory, Kind::Write),
        (Served::Model, Kind::Read),
        (Served::Model, Kind::Write),
    ] {
        cases.extend(depths.iter().map(|&depth| Case::new(served, Work::small(kind), 1, depth)));
    }
    for kind in [Kind::Read, Kind::Write] {
        cases.push(Case::new(Served::Null, Work { len: 128 << 10, ..Work::small(kind) }, 1, 16));
    }
    let reads = Work::small(Kind::Read);
    cases.push(Case::new(Served::Null, Work { digests: true, ..reads }, 1, 32));
    cases.extend([64, 256].map(|connections| Case::new(Served::Null, reads, connections, 4)));
    for depth in [1, DEEP] {
        let on_null = [Served::MapOfOne, Served::MapOfMany].map(|served| Case::new(served, reads, 1, depth));
        cases.extend(on_null);
        cases.extend(files.iter().map(|file| {
            let file = Some(Arc::clone(file));
            Case { file, ..Case::new(Served::File, reads, 1, depth) }
        }));
    }
    cases
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_case_has_a_name_of_its_own_and_the_bars_that_are_asked_for() {
        let cases = all(&[1, 32, 128], &[]);
        let names: HashSet<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len());
        for name in [
            "target/null/randread/qd1",
            "target/null/randread-digests/qd32",
            "target/null/randread/256x4",
            "target/map-10000-extents/randread/qd32",
        ] {
            assert!(names.contains(name), "{name} is missing from {names:?}");
        }
        let practice: Vec<_> = cases.iter().filter(|case| case.is_for_practice()).map(Case::name).collect();
        assert!(practice.len() == 6 && practice.iter().all(|name| name.starts_with("target/model/rand")));
        let many = cases.iter().find(|case| case.connections == 256).unwrap();
        assert_eq!(many.bars_of_spdk().rate, Some(Bar::RatioAtLeast(1.3)));
        assert!(many.bar_of_share().is_some() && !many.has_ceiling());
    }
}
