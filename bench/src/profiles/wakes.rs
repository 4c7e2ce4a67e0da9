//! What became of a target's thread under a light load, of the scheduler's events as `perf script` prints them: how often it slept, how
//! long it took from a wake-up until it ran, and who had its processor when it wanted to run and could not.
//!
//! ```text
//!   sched_switch away, asleep ... sched_wakeup ... sched_switch to it      a sleep; the last part is the wake's
//!   sched_switch away, runnable ............... sched_switch to it      it was pushed aside
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;

use super::windows::Window;
use crate::report::Row;

/// The thread of a target, by how its name begins.
const THREADS: [&str; 2] = ["core-", "bare"];
/// What a target that sleeps for nearly each command sleeps at least.
const SLEEPS_MIN: f64 = 0.5;

/// One thread, in the rounds of one side.
#[derive(Clone, Debug, Default)]
struct Side {
    name: String,
    commands: f64,
    sleeps: usize,
    woken_us: Vec<f64>,
    aside_us: Vec<f64>,
    by: HashMap<String, usize>,
}

/// Where a thread is that does not run.
#[derive(Clone, Debug)]
enum Away {
    Asleep,
    Woken(u64),
    Aside(u64, String),
}

/// A profile's text: what is its limit, then a line or some a side, then the rows.
#[must_use]
pub fn profile(script: &str, windows: &[Window], rows: &[Row]) -> (String, String) {
    let mut sides: Vec<Side> = Vec::new();
    for window in windows {
        match sides.iter_mut().find(|side| side.name == window.side) {
            Some(side) => side.commands += window.commands,
            None => {
                sides.push(Side { name: window.side.clone(), commands: window.commands, ..Side::default() });
            }
        }
    }
    let mut away: HashMap<u32, Away> = HashMap::new();
    for line in script.lines() {
        let Some((time_ns, event)) = event(line) else { continue };
        let Some(window) = windows.iter().find(|window| window.has(time_ns)) else { continue };
        let Some(side) = sides.iter_mut().find(|side| side.name == window.side) else { continue };
        side.take(time_ns, &event, &mut away);
    }
    let mut text = String::new();
    for side in &mut sides {
        // A string takes everything.
        let section = side.section();
        let _ = write!(text, "\n## {}\n{section}", side.name);
    }
    text.push_str("\n## As measured meanwhile\n");
    for row in rows {
        let _ = writeln!(text, "{row}");
    }
    (limit(&sides, rows), text)
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event<'t> {
    /// From this thread, asleep or not, to that one.
    Switch {
        from: (&'t str, u32),
        sleeps: bool,
        to: (&'t str, u32),
    },
    Wakeup(&'t str, u32),
}

fn event(line: &str) -> Option<(u64, Event<'_>)> {
    let (head, rest) = line.split_once(": sched:")?;
    let time_ns = super::nanoseconds(head.rsplit(' ').next()?)?;
    let (kind, fields) = rest.split_once(": ")?;
    // Names have blanks in them; what stands behind each is known.
    let between = |begin: &str, end: &str| Some(fields.split_once(begin)?.1.split_once(end)?.0);
    let event = match kind {
        "sched_switch" => Event::Switch {
            from: (between("prev_comm=", " prev_pid=")?, between("prev_pid=", " ")?.parse().ok()?),
            sleeps: !between("prev_state=", " ")?.starts_with('R'),
            to: (between("next_comm=", " next_pid=")?, between("next_pid=", " ")?.parse().ok()?),
        },
        "sched_wakeup" => Event::Wakeup(between("comm=", " pid=")?, between("pid=", " ")?.parse().ok()?),
        _ => return None,
    };
    Some((time_ns, event))
}

fn is_of_a_target(name: &str) -> bool {
    THREADS.iter().any(|thread| name.starts_with(thread))
}

impl Side {
    fn take(&mut self, now_ns: u64, event: &Event<'_>, away: &mut HashMap<u32, Away>) {
        match *event {
            Event::Wakeup(name, tid) if is_of_a_target(name) => {
                if matches!(away.get(&tid), Some(Away::Asleep)) {
                    away.insert(tid, Away::Woken(now_ns));
                }
            }
            Event::Wakeup(..) => {}
            Event::Switch { from, sleeps, to } => {
                if is_of_a_target(to.0) {
                    let us = |since_ns: u64| now_ns.saturating_sub(since_ns) as f64 / 1e3;
                    match away.remove(&to.1) {
                        Some(Away::Woken(since_ns)) => self.woken_us.push(us(since_ns)),
                        Some(Away::Aside(since_ns, by)) => {
                            self.aside_us.push(us(since_ns));
                            *self.by.entry(by).or_default() += 1;
                        }
                        Some(Away::Asleep) | None => {}
                    }
                }
                if is_of_a_target(from.0) {
                    self.sleeps += usize::from(sleeps);
                    let by = to.0.split(['/', ':', '-']).next().unwrap_or(to.0).to_owned();
                    away.insert(from.1, if sleeps { Away::Asleep } else { Away::Aside(now_ns, by) });
                }
            }
        }
    }

    fn sleeps_each(&self) -> f64 {
        self.sleeps as f64 / self.commands.max(1.0)
    }

    fn section(&mut self) -> String {
        let mut by: Vec<_> = self.by.iter().collect();
        by.sort_by(|one, other| other.1.cmp(one.1).then_with(|| one.0.cmp(other.0)));
        let by: Vec<_> = by.iter().take(4).map(|(name, count)| format!("{name} {count}")).collect();
        let by = if by.is_empty() { String::new() } else { format!(" (by {})", by.join(", ")) };
        format!(
            "{:.0} commands: its thread slept {} times, {:.2} a command; from a wake-up until it ran: {}. It was pushed aside {} \
             times{by}: {}.\n",
            self.commands,
            self.sleeps,
            self.sleeps_each(),
            spread(&mut self.woken_us),
            self.aside_us.len(),
            spread(&mut self.aside_us)
        )
    }
}

fn spread(values_us: &mut [f64]) -> String {
    values_us.sort_by(f64::total_cmp);
    let at =
        |part: usize| values_us.get((values_us.len() * part / 100).min(values_us.len().saturating_sub(1)));
    match (at(50), at(99), values_us.last()) {
        (Some(half), Some(most), Some(longest)) => {
            format!("p50 {half:.1} us, p99 {most:.1}, longest {longest:.1}")
        }
        _ => "never".to_owned(),
    }
}

/// What no target can get below.
fn limit(sides: &[Side], rows: &[Row]) -> String {
    let row = |name: &str| rows.iter().find(|row| row.name == name);
    let mut parts = Vec::new();
    if let Some(ours) = sides.iter().find(|side| side.name.starts_with(super::windows::OURS)) {
        parts.push(if ours.sleeps_each() < SLEEPS_MIN {
            format!(
                "at this load our core slept {:.2} times a command only, for it lingers: what is between the two sides is then mostly the \
                 machine's, not the wake's",
                ours.sleeps_each()
            )
        } else {
            format!("our core slept {:.2} times a command, and each wake is in its latency", ours.sleeps_each())
        });
    }
    let own_spread = row("idle/light/p99").and_then(|row| Some((row.peer_min?, row.peer_max?, row.rounds)));
    if let Some((least, most, rounds)) = own_spread
        && least > 0.0
    {
        parts.push(format!(
            "the {rounds} rounds of the very same target that polls always differ among themselves by a factor of {:.2} in p99",
            most / least
        ));
    }
    if let Some(row) = row("idle/light/bare/p99")
        && let Some(ratio) = row.ratio
    {
        let so = if ratio > 1.0 { ": no target that sleeps at each command has less" } else { "" };
        parts.push(format!(
            "a bare responder that sleeps in recv, with no target at all, has {ratio:.2} times the p99 of one that polls ({:.0} us){so}",
            row.ours
        ));
    }
    if parts.is_empty() { "not told: nothing was measured".to_owned() } else { parts.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "\
     core-0    55 [000]     1.000010000: sched:sched_switch: prev_comm=core-0 prev_pid=55 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
       host    56 [001]     1.000020000: sched:sched_wakeup: comm=core-0 pid=55 prio=120 target_cpu=000
    swapper     0 [000]     1.000027000: sched:sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=core-0 next_pid=55 next_prio=120
     core-0    55 [000]     1.000030000: sched:sched_switch: prev_comm=core-0 prev_pid=55 prev_prio=120 prev_state=R+ ==> next_comm=my job 1 next_pid=9 next_prio=120
   my job 1     9 [000]     1.004030000: sched:sched_switch: prev_comm=my job 1 prev_pid=9 prev_prio=120 prev_state=S ==> next_comm=core-0 next_pid=55 next_prio=120
     core-0    55 [000]     9.000030000: sched:sched_switch: prev_comm=core-0 prev_pid=55 prev_prio=120 prev_state=S ==> next_comm=x next_pid=9 next_prio=120
";

    #[test]
    fn sleeps_wakes_and_who_pushed_it_aside_are_told() {
        let side = "fastice as installed".to_owned();
        let window =
            Window { side, begun_ns: 1_000_000_000, ended_ns: 2_000_000_000, commands: 1.0, busy_us: None };
        let (limit, text) = profile(SCRIPT, &[window], &[]);
        assert!(
            text.contains("slept 1 times, 1.00 a command; from a wake-up until it ran: p50 7.0 us"),
            "{text}"
        );
        assert!(text.contains("pushed aside 1 times (by my job 1 1): p50 4000.0 us"), "{text}");
        assert!(limit.contains("slept 1.00 times a command, and each wake"), "{limit}");
    }

    #[test]
    fn a_core_that_does_not_sleep_has_no_wakes_to_pay_for() {
        let window = |side: &str| Window {
            side: side.to_owned(),
            begun_ns: 0,
            ended_ns: 5_000_000_000,
            commands: 100.0,
            busy_us: None,
        };
        let (limit, text) = profile("", &[window("fastice as installed"), window("the bare responder")], &[]);
        assert!(text.contains("slept 0 times") && text.contains("until it ran: never"), "{text}");
        assert!(limit.contains("slept 0.00 times a command only"), "{limit}");
    }
}
