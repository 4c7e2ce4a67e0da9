//! What the host's processor did beside each target, where the host is SPDK's initiator: a host that has work for nearly all of its time is
//! what limits the rate, whatever the target does.
//!
//! Like a target it polls, and a look at its socket that finds nothing is told from none that does by what the kernel goes on to do. So
//! what remains without looks is a guess: its own code around looks in vain is taken to be the same part as the looks are of the kernel's.

use std::fmt::Write as _;

use super::samples::{self, Side, limit, sides};
use super::windows::{OURS, Window};

/// How the names of its threads begin.
const THREADS: [&str; 2] = ["spdk_nvme_perf", "reactor_"];

/// A profile's text: what is its limit, then a section a side of both processors. `processors` are those of target and host.
#[must_use]
pub fn profile(script: &str, windows: &[Window], processors: (u32, u32)) -> (String, String) {
    let targets = sides(script, windows, processors.0, &samples::THREADS);
    let hosts = sides(script, windows, processors.1, &THREADS);
    let hosts: Vec<_> = hosts.into_iter().map(Side::without_account).collect();
    let mut text = String::new();
    for (sides, what) in [(&hosts, "SPDK's initiator, beside "), (&targets, "")] {
        for side in sides {
            // A string takes everything, here and below.
            let _ = write!(text, "\n## {what}{}\n{}", side.name, side.section());
        }
    }
    let mut told = of_hosts(&hosts);
    let _ = write!(told, ". The targets: {}", limit(&targets, false));
    (told, text)
}

fn of_hosts(hosts: &[Side]) -> String {
    let mut told = hosts.iter().filter(|side| side.is_told());
    let (Some(ours), Some(peer)) = (told.next().filter(|side| side.name == OURS), told.next()) else {
        return "not told of the initiator: there are no samples of it beside both".to_owned();
    };
    let work = |side: &Side| (side.each_us() * side.at_work(), 100.0 * side.at_work());
    let ((ours_us, ours_percent), (peer_us, peer_percent)) = (work(ours), work(peer));
    format!(
        "the initiator has work for about {ours_us:.2} us a command beside ours ({ours_percent:.0} % of its time), and for {peer_us:.2} beside {} \
         ({peer_percent:.0} %): with a target that answered at once it would have about {:.2} times the rate that it has beside {0}",
        peer.name,
        peer.each_us() / ours_us.min(peer_us)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(comm: &str, cpu: u32, at_s: u32, chain: &str, count: usize) -> String {
        format!("{comm}  123 [{cpu:03}]  {at_s}.000000500: \n\t{chain} ([kernel.kallsyms])\n\n").repeat(count)
    }

    #[test]
    fn what_the_initiator_can_do_at_most_follows_from_its_work() {
        const SEND: &str = "ffffffff81a31aa4 tcp_sendmsg_locked";
        const LOOK: &str = "ffffffff81a31aa4 tcp_recvmsg_locked";
        let window = |side: &str, at_s: u64, commands| Window {
            side: side.to_owned(),
            begun_ns: at_s * 1_000_000_000,
            ended_ns: (at_s + 1) * 1_000_000_000,
            commands,
            busy_us: Some(500_000.0),
        };
        let windows = [window(OURS, 1, 1e6), window("SPDK's target", 2, 5e5)];
        let script = sampled("spdk_nvme_perf", 1, 1, SEND, 900)
            + &sampled("spdk_nvme_perf", 1, 1, LOOK, 100)
            + &sampled("spdk_nvme_perf", 1, 2, SEND, 500)
            + &sampled("spdk_nvme_perf", 1, 2, LOOK, 500)
            + &sampled("core-0", 0, 1, SEND, 200)
            + &sampled("reactor_0", 0, 2, SEND, 200);
        let (limit, text) = profile(&script, &windows, (0, 1));
        // 0.9 of 1 us beside ours; 1 of 2 us beside the peer.
        assert!(
            limit.contains("about 0.90 us a command beside ours (90 % of its time), and for 1.00 beside SPDK's target (50 %)"),
            "{limit}"
        );
        assert!(limit.contains("about 2.22 times the rate that it has beside SPDK's target"), "{limit}");
        assert!(
            text.contains("## SPDK's initiator, beside fastice\n") && text.contains("\n## SPDK's target\n"),
            "{text}"
        );
        let sections: Vec<_> = text.split("\n## ").collect();
        assert!(
            !sections[1].contains("By its own account") && sections[3].contains("By its own account"),
            "{text}"
        );
        let alone = profile(&script, &windows[..1], (0, 1)).0;
        assert!(alone.starts_with("not told of the initiator"), "{alone}");
    }
}
