//! When which file is looked at, so that all that the watch and the guard do by the clock stays within their share of a
//! processor.
//!
//! ```text
//!   looks at inodes     at most 35 % of the share: what a round costs tells when the next one is
//!   looks at maps       as much: what each costs tells its interval
//!   what goes beside    measured: waking up, planning, the guard thread's own rounds. What it takes beyond 25 % the looks
//!                       do without, so that they, their intervals and the bounds that follow from these are what is left
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::WatchOptions;

/// Between two rounds of quick looks, when there are few files.
pub(super) const QUICK_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Less than what a look may be late by.
const REST_MAX: Duration = Duration::from_millis(500);
/// What a look is taken to cost at the least: that of a moment ago may have been a lucky one.
const COST_MIN: Duration = Duration::from_micros(5);
/// How often intervals are worked out anew, by what looks have cost meanwhile.
const PLAN_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Turn {
    looked: Instant,
    interval: Duration,
    /// To be looked at before its time.
    is_hurried: bool,
    /// When it may next be.
    hurry_from: Instant,
}

impl Turn {
    fn due(&self) -> Instant {
        if self.is_hurried { self.looked } else { self.looked + self.interval }
    }
}

/// What looks have of the share at the most, and at the least, whatever else takes.
const LOOKS_PART_MAX: f64 = 0.7;
const LOOKS_PART_MIN: f64 = 0.25;
/// What looks and all else are to take together: the rest makes up for what no clock has seen.
const ALL_PART: f64 = 0.9;
/// After a turn the watch rests until its own work is this part of the share.
const OWN_PART: f64 = 0.2;
/// Over how long it is measured what goes beside the looks.
const WINDOW: Duration = Duration::from_secs(2);

/// What goes beside looks.
#[derive(Debug)]
struct Beside {
    since: Instant,
    spent: Duration,
    /// As a part of a processor, smoothed.
    rate: f64,
}

impl Beside {
    fn spent(&mut self, now: Instant, cost: Duration) {
        self.spent += cost;
        let window = now.saturating_duration_since(self.since);
        if window >= WINDOW {
            self.rate = f64::midpoint(self.rate, self.spent.as_secs_f64() / window.as_secs_f64());
            (self.since, self.spent) = (now, Duration::ZERO);
        }
    }
}

/// The schedule.
#[derive(Debug)]
pub(super) struct Pace {
    options: WatchOptions,
    turns: BTreeMap<u64, Turn>,
    /// There may be files that have no turn yet.
    is_anew: bool,
    planned: Instant,
    quick_due: Instant,
    /// Until when what is due waits for more that is, so that one turn deals with all of it.
    rest_until: Instant,
    beside: Beside,
}

impl Pace {
    pub(super) fn new(options: WatchOptions, now: Instant) -> Self {
        let beside = Beside { since: now, spent: Duration::ZERO, rate: 0.0 };
        let turns = BTreeMap::new();
        Self { options, turns, is_anew: true, planned: now, quick_due: now, rest_until: now, beside }
    }

    fn whole_share(&self) -> f64 {
        self.options.share.clamp(1e-6, 1.0)
    }

    /// What inodes have of a processor, and maps as much.
    fn share(&self) -> f64 {
        let share = self.whole_share();
        let left = ALL_PART - self.beside.rate / share;
        share * left.clamp(LOOKS_PART_MIN, LOOKS_PART_MAX) / 2.0
    }

    /// The watch and the guard did this beside looks.
    pub(super) fn worked(&mut self, now: Instant, cost: Duration) {
        self.beside.spent(now, cost);
    }

    /// A turn with looks is over, beside which it took this of a processor.
    pub(super) fn rest(&mut self, now: Instant, cost: Duration) {
        let rest = Duration::try_from_secs_f64(cost.as_secs_f64() / (self.whole_share() * OWN_PART));
        self.rest_until = now + rest.unwrap_or(REST_MAX).min(REST_MAX);
    }

    /// Whether it has rested.
    pub(super) fn is_rested(&self, now: Instant) -> bool {
        now >= self.rest_until
    }

    /// There may be files that are not planned yet.
    pub(super) const fn set_anew(&mut self) {
        self.is_anew = true;
    }

    /// Whether files are to be planned: some may be new, or their looks may cost something else by now.
    pub(super) fn is_plan_due(&self, now: Instant) -> bool {
        self.is_anew || now >= self.planned + PLAN_INTERVAL
    }

    /// Plans these files, by what a look at each costs, and forgets all others. The interval of each. A new file is due after
    /// its first interval: it was looked at when it was pinned.
    pub(super) fn plan(&mut self, now: Instant, costs: &[(u64, Duration)]) -> Vec<Duration> {
        let intervals = self.intervals(costs);
        for ((id, _), interval) in costs.iter().zip(&intervals) {
            let interval = *interval;
            let new = || Turn { looked: now, interval, is_hurried: false, hurry_from: now };
            self.turns.entry(*id).or_insert_with(new).interval = interval;
        }
        self.turns.retain(|id, _| costs.binary_search_by_key(id, |(known, _)| *known).is_ok());
        (self.is_anew, self.planned) = (false, now);
        intervals
    }

    /// The interval of each file by its cost.
    fn intervals(&self, costs: &[(u64, Duration)]) -> Vec<Duration> {
        let root = |cost: &Duration| cost.max(&COST_MIN).as_secs_f64().sqrt();
        let sum: f64 = costs.iter().map(|(_, cost)| root(cost)).sum();
        let share = self.share();
        let interval = |cost| Duration::try_from_secs_f64(root(cost) * sum / share).unwrap_or(Duration::MAX);
        // Half an age is as good as never, and can be added to any clock.
        let interval_max = Duration::from_secs(1 << 30);
        let within = |interval: Duration| interval.min(interval_max).max(self.options.interval_min);
        costs.iter().map(|(_, cost)| within(interval(cost))).collect()
    }

    /// The interval of a file whose look costs `cost`, when it is the only one.
    pub(super) fn interval_alone(&self, cost: Duration) -> Duration {
        self.intervals(&[(0, cost)]).first().copied().unwrap_or(self.options.interval_min)
    }

    /// How long nothing is due; `None` when there is nothing to watch.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        if self.is_anew {
            return Some(self.rest_until.saturating_duration_since(now));
        }
        let first = self.turns.values().map(Turn::due).min()?.min(self.quick_due).max(self.rest_until);
        Some(first.saturating_duration_since(now))
    }

    /// Something happened that may have to do with the files: all are looked at, but none before its time more often than
    /// every other interval. On a host where mounts come and go all the time, the looks at large maps would be without end.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.quick_due = self.quick_due.min(now);
        for turn in self.turns.values_mut().filter(|turn| now >= turn.hurry_from) {
            turn.is_hurried = true;
            turn.hurry_from = now + turn.interval * 2;
        }
    }

    pub(super) fn all_due(&mut self, now: Instant) {
        self.quick_due = now;
        self.turns.values_mut().for_each(|turn| turn.is_hurried = true);
    }

    pub(super) fn is_quick_due(&self, now: Instant) -> bool {
        now >= self.quick_due
    }

    pub(super) fn quick_done(&mut self, now: Instant, cost: Duration) {
        let affordable = Duration::try_from_secs_f64(cost.as_secs_f64() / self.share());
        let interval_max = Duration::from_secs(1 << 30);
        self.quick_due = now + affordable.unwrap_or(interval_max).clamp(QUICK_INTERVAL_MIN, interval_max);
    }

    /// The files whose maps are to be looked at now.
    pub(super) fn due(&self, now: Instant) -> Vec<u64> {
        self.turns.iter().filter(|(_, turn)| now >= turn.due()).map(|(id, _)| *id).collect()
    }

    /// A look is over.
    pub(super) fn done(&mut self, id: u64, now: Instant) {
        if let Some(turn) = self.turns.get_mut(&id) {
            (turn.looked, turn.is_hurried) = (now, false);
        }
    }

    /// It is not to be looked at any more.
    pub(super) fn forget(&mut self, id: u64) {
        self.turns.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::extent::guard::post::smoothed;

    fn spent(options: WatchOptions, costs: &[Duration]) -> (f64, Vec<Duration>) {
        let pace = Pace::new(options, Instant::now());
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
        let now = Instant::now();
        let mut pace = Pace::new(WatchOptions::default(), now);
        let [interval] = pace.plan(now, &[(1, Duration::from_millis(200))])[..] else { panic!("one file") };
        pace.hurry(now);
        assert_eq!(pace.due(now), [1], "the first is looked into at once");
        pace.done(1, now);
        pace.hurry(now);
        assert!(pace.due(now).is_empty() && pace.is_quick_due(now));
        assert_eq!(pace.due(now + interval), [1], "and it is looked at in its time all the same");
        pace.all_due(now);
        assert_eq!(pace.due(now), [1], "a proof waits for nobody");
    }

    #[test]
    fn files_that_come_and_go_are_planned_and_forgotten() {
        let now = Instant::now();
        let mut pace = Pace::new(WatchOptions::default(), now);
        assert_eq!(pace.pause(now), Some(Duration::ZERO), "there may be files");
        let cost = Duration::from_micros(50);
        assert!(pace.is_plan_due(now) && pace.plan(now, &[]).is_empty());
        assert_eq!(pace.pause(now), None);
        pace.set_anew();
        let few = pace.plan(now, &[(1, cost)])[0];
        assert!(!pace.is_plan_due(now) && pace.is_plan_due(now + PLAN_INTERVAL));
        let many: Vec<_> = (1..=1000).map(|id| (id, cost)).collect();
        let interval = pace.plan(now, &many)[0];
        assert!(interval > few * 100);
        assert!(pace.due(now + interval / 2).is_empty(), "the first one goes by the interval of now, too");
        pace.quick_done(now, cost);
        pace.rest(now, cost);
        assert_eq!(pace.pause(now), Some(QUICK_INTERVAL_MIN));
        pace.forget(1);
        assert_eq!(pace.due(now + interval).len(), 999);
        pace.set_anew();
        assert_eq!(pace.pause(now), Some(pace.rest_until - now), "somebody woke it");
        pace.plan(now, &many[..10]);
        assert_eq!(pace.due(now + interval).len(), 10);
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

        /// The watch and the guard as they go by a clock that this test turns: whatever looks, waking up, planning and the guard's
        /// rounds cost, all together stay within the share.
        #[test]
        fn looks_make_way_for_what_goes_beside_them(
            costs in proptest::collection::vec(2_u64..400, 1..100), quick_ns in 500_u64..4000, own_us in 5_u64..200,
            own_ns_a_file in 0_u64..1000, guard_part in 0.0..0.4, noise in 1_u64..5,
        ) {
            let options = WatchOptions::default();
            let mut now = Instant::now();
            let begun = now;
            let mut pace = Pace::new(options, now);
            let files = costs.len() as u64;
            let own = Duration::from_micros(own_us) + Duration::from_nanos(own_ns_a_file * files);
            let (mut spent, mut counted_from, mut turns) = (Duration::ZERO, begun, 0);
            let mut told: Vec<_> = (0..).zip(costs.iter().map(|cost| Duration::from_micros(*cost))).collect();
            while now.duration_since(begun) < Duration::from_secs(60) {
                let pause = pace.pause(now).expect("there are files");
                now += pause;
                turns += 1;
                let mut looked = Duration::ZERO;
                if pace.is_plan_due(now) {
                    pace.plan(now, &told);
                }
                if pace.is_quick_due(now) {
                    let cost = Duration::from_nanos(quick_ns * files);
                    looked += cost;
                    now += cost;
                    pace.quick_done(now, cost);
                }
                for id in pace.due(now) {
                    let at = usize::try_from(id).expect("a small number");
                    let cost = Duration::from_micros(costs[at] * (1 + turns % noise));
                    told[at].1 = smoothed(told[at].1, cost);
                    looked += cost;
                    now += cost;
                    pace.done(id, now);
                }
                let guard = pause.mul_f64(guard_part * options.share);
                now += own;
                pace.worked(now, own + guard);
                pace.rest(now, own);
                spent += looked + own + guard;
                if now - begun < Duration::from_secs(20) {
                    (spent, counted_from) = (Duration::ZERO, now);
                }
            }
            let part = spent.as_secs_f64() / (now - counted_from).as_secs_f64();
            prop_assert!(part <= options.share, "{part}");
        }
    }
}
