//! When which file is looked at, so that all looks together stay within their share of a processor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::WatchOptions;
use crate::extent::guard::Post;

/// Between two rounds of quick looks, when there are few files.
pub(super) const QUICK_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Less than what a look may be late by.
const REST_MAX: Duration = Duration::from_millis(500);
/// What a look is taken to cost before there was one.
const COST_FIRST: Duration = Duration::from_micros(20);

#[derive(Debug)]
struct Turn {
    due: Instant,
    interval: Duration,
    /// When it may next be looked at before its time.
    hurry_from: Instant,
}

/// The part of the share that quick looks have, and that maps have.
const LOOKS_PART: f64 = 0.35;
/// What waking up and planning have, which for many files cost as much as the looks do. A tenth is left for the guard thread.
const OWN_PART: f64 = 0.2;

/// The schedule. Quick looks, maps and the watch's own work each keep within their part of the share.
#[derive(Debug)]
pub(super) struct Pace {
    options: WatchOptions,
    turns: BTreeMap<u64, Turn>,
    quick_due: Instant,
    quick_interval: Duration,
    /// Until when what is due waits for more that is, so that one turn deals with all of it.
    rest_until: Instant,
}

impl Pace {
    pub(super) fn new(options: WatchOptions) -> Self {
        let (turns, now) = (BTreeMap::new(), Instant::now());
        Self { options, turns, quick_due: now, quick_interval: QUICK_INTERVAL_MIN, rest_until: now }
    }

    fn share(&self) -> f64 {
        self.options.share.clamp(1e-6, 1.0) * LOOKS_PART
    }

    /// A turn took this of a processor beside its looks.
    pub(super) fn worked(&mut self, now: Instant, cost: Duration) {
        let part = self.options.share.clamp(1e-6, 1.0) * OWN_PART;
        let rest = Duration::try_from_secs_f64(cost.as_secs_f64() / part).unwrap_or(REST_MAX);
        self.rest_until = now + rest.min(REST_MAX);
    }

    /// Sets the intervals of these files, and forgets all others. A new file is due after its first interval: it was
    /// looked at when it was pinned.
    pub(super) fn plan(&mut self, posts: &[(u64, Arc<Post>)]) {
        let costs: Vec<_> = posts.iter().map(|(id, post)| (*id, post.watch.cost())).collect();
        let intervals = self.intervals(&costs);
        for ((id, post), interval) in posts.iter().zip(&intervals) {
            post.watch.set_interval(*interval);
            let now = Instant::now();
            let turn = self.turns.entry(*id).or_insert(Turn {
                due: now + *interval,
                interval: *interval,
                hurry_from: now,
            });
            if turn.interval != *interval {
                // Planned by the interval of before, but never later than by that of now.
                turn.due = turn.due.min(now + *interval);
                turn.interval = *interval;
            }
        }
        self.turns.retain(|id, _| posts.binary_search_by_key(id, |(known, _)| *known).is_ok());
    }

    /// The interval of each file by its cost.
    fn intervals(&self, costs: &[(u64, Duration)]) -> Vec<Duration> {
        let root = |cost: &Duration| cost.max(&COST_FIRST).as_secs_f64().sqrt();
        let sum: f64 = costs.iter().map(|(_, cost)| root(cost)).sum();
        let interval =
            |cost| Duration::try_from_secs_f64(root(cost) * sum / self.share()).unwrap_or(Duration::MAX);
        costs.iter().map(|(_, cost)| interval(cost).max(self.options.interval_min)).collect()
    }

    /// The interval of a file whose look costs `cost`, when it is the only one.
    pub(super) fn interval_alone(&self, cost: Duration) -> Duration {
        self.intervals(&[(0, cost)]).first().copied().unwrap_or(self.options.interval_min)
    }

    /// How long nothing is due; `None` when there is nothing to watch.
    pub(super) fn pause(&self, now: Instant, posts: &[(u64, Arc<Post>)]) -> Option<Duration> {
        if posts.is_empty() {
            return None;
        }
        let is_planned = posts.iter().all(|(id, _)| self.turns.contains_key(id));
        let first =
            self.turns.values().map(|turn| turn.due).chain([self.quick_due]).min()?.max(self.rest_until);
        Some(if is_planned { first.saturating_duration_since(now) } else { Duration::ZERO })
    }

    /// Something happened that may have to do with the files: all are looked at, but none before its time more often than
    /// every other interval. On a host where mounts come and go all the time, the looks at large maps would be without end.
    pub(super) fn hurry(&mut self) {
        let now = Instant::now();
        self.quick_due = self.quick_due.min(now);
        for turn in self.turns.values_mut().filter(|turn| now >= turn.hurry_from) {
            turn.due = turn.due.min(now);
            turn.hurry_from = now + turn.interval * 2;
        }
    }

    pub(super) fn all_due(&mut self) {
        let now = Instant::now();
        self.quick_due = now;
        self.turns.values_mut().for_each(|turn| turn.due = now);
    }

    pub(super) fn is_quick_due(&self, now: Instant) -> bool {
        now >= self.quick_due
    }

    pub(super) fn quick_done(&mut self, now: Instant, cost: Duration) {
        let affordable = Duration::try_from_secs_f64(cost.as_secs_f64() / self.share());
        self.quick_interval = affordable.unwrap_or(Duration::MAX).max(QUICK_INTERVAL_MIN);
        self.quick_due = now + self.quick_interval;
    }

    pub(super) fn is_due(&self, id: u64, now: Instant) -> bool {
        self.turns.get(&id).is_some_and(|turn| now >= turn.due)
    }

    /// A look is over.
    pub(super) fn done(&mut self, id: u64, now: Instant) {
        if let Some(turn) = self.turns.get_mut(&id) {
            turn.due = now + turn.interval;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spent(options: WatchOptions, costs: &[Duration]) -> (f64, Vec<Duration>) {
        let pace = Pace::new(options);
        let costs: Vec<_> = (0..).zip(costs.iter().copied()).collect();
        let intervals = pace.intervals(&costs);
        let spent = costs
            .iter()
            .zip(&intervals)
            .map(|((_, cost), interval)| cost.as_secs_f64() / interval.as_secs_f64());
        (spent.sum(), intervals)
    }

    #[test]
    fn mounts_that_come_and_go_make_no_look_endless() {
        let mut pace = Pace::new(WatchOptions::default());
        let (now, interval) = (Instant::now(), Duration::from_secs(60));
        pace.turns.insert(1, Turn { due: now + interval, interval, hurry_from: now });
        pace.hurry();
        assert!(pace.is_due(1, Instant::now()), "the first is looked into at once");
        pace.done(1, Instant::now());
        pace.hurry();
        assert!(!pace.is_due(1, Instant::now()) && pace.is_quick_due(Instant::now()));
        assert!(pace.is_due(1, Instant::now() + interval), "and is looked at in its time all the same");
        pace.all_due();
        assert!(pace.is_due(1, Instant::now()), "a proof waits for nobody");
    }

    #[test]
    fn one_large_file_does_not_starve_small_ones() {
        let mut costs = vec![Duration::from_micros(20); 999];
        costs.push(Duration::from_millis(500));
        let (_, intervals) = spent(WatchOptions::default(), &costs);
        assert!(intervals[0] < Duration::from_secs(8), "{:?}", intervals[0]);
        assert!(intervals[999] < Duration::from_secs(1200), "{:?}", intervals[999]);
        let (_, alone) = spent(WatchOptions::default(), &[Duration::from_millis(500)]);
        assert_eq!(alone[0].as_secs(), 142);
    }

    proptest! {
        #[test]
        fn the_share_is_kept_whatever_the_files_cost(
            costs in proptest::collection::vec(20_u64..2_000_000, 1..200), percent in 1_u32..100,
        ) {
            let costs: Vec<_> = costs.into_iter().map(Duration::from_micros).collect();
            let share = f64::from(percent) / 100.0;
            let (spent, intervals) = spent(WatchOptions { share, ..WatchOptions::default() }, &costs);
            prop_assert!(spent <= share / 2.0 * 1.001, "{spent} of {share}");
            prop_assert!(intervals.iter().all(|interval| *interval >= Duration::from_millis(100)));
        }
    }
}
