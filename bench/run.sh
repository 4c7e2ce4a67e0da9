#!/usr/bin/env bash
# All benches, into bench/report.json, and of that bench/REPORT.md and its plots: the driver here, its instructions, the target over TCP,
# idle and as it grows, pins at scale, and in a guest the driver and the target, each beside the kernel's. Then profiles of what is not met.
# usage: run.sh [ARGUMENT]...      of `fastice-bench driver`, such as --rounds 15
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tuned build, as a target is run whose speed matters; without the tools for it the plain one. The reports say which.
if bench/tuned.sh; then
    built=target/tuned
else
    echo "SKIPPED: the tuned build, see above: everything is measured with the plain one" >&2
    built=target/release
    "${CARGO:-cargo}" build --release --locked -p fastice -p fastice-bench --bin fastice --bin fastice-bench
fi
bench=$built/fastice-bench
export FASTICE_BENCH_PROGRAM=$bench
# Before the report and what it is made of change.
FASTICE_BENCH_COMMIT=$(git describe --always --dirty 2>/dev/null || true)
export FASTICE_BENCH_COMMIT
# What the last run measured is a peer of this one, as soon as it is of another commit, or another program where no commit is known: of
# the same one there is nothing to learn, and a tuned build is never the same twice.
kept=target/bench
commit=$(git rev-parse --short HEAD 2>/dev/null || true)
is_other() {
    if [[ -n $commit && -f $kept/last/fastice.commit ]]; then
        [[ $(<"$kept/last/fastice.commit") != "$commit" ]]
    else
        if cmp -s "$kept/last/fastice" "$built/fastice"; then false; fi
    fi
}
if [[ -f $kept/last/fastice ]] && is_other; then
    rm -rf "$kept/previous"
    mv "$kept/last" "$kept/previous"
fi
# What fails is told, and the rest is measured all the same: a report is written in any case.
failed=()
section() {
    "$@" || {
        local status=$?
        # SIGHUP, SIGINT, SIGTERM: somebody had it end, and means all of it.
        ((status != 129 && status != 130 && status != 143)) || exit $status
        echo "SKIPPED: $*: it failed, see above" >&2
        failed+=("$*")
    }
}
section "$bench" driver "$@"
if command -v valgrind >/dev/null; then
    section "$bench" instructions
else
    echo "SKIPPED: instructions: there is no valgrind" >&2
fi
# Profiles of earlier runs explain nothing of this one.
rm -f bench/profiles/*.txt
section "$bench" target
section "$bench" idle
section "$bench" growth
if ((EUID == 0)); then
    section "$bench" scale
else
    echo "SKIPPED: scale: that takes root, for filesystems on loop devices" >&2
fi
if [[ $(uname -m) == x86_64 ]] && { ((EUID == 0)) || command -v qemu-system-x86_64 >/dev/null; }; then
    section bench/guest.sh
    # Where a guest does not come up, the other rows are no worse.
    bench/guest-nvmet.sh || "$bench" absent nvmet-tcp "its guest failed; see hw-tests/cache/last-run"
else
    why="the guest takes root, or qemu-system-x86 installed, and an x86_64 host"
    echo "SKIPPED: driver and target in the guest: $why" >&2
    "$bench" absent nvmet-tcp "$why"
fi
# Where the time goes in what was not met. The report is one without it too, but says so at each such row.
bench/profile.sh || echo "SKIPPED: profiles, or some of them, of what is not met: see above" >&2
"$bench" publish
if grep -q '<!-- bench: begin -->' README.md; then
    "$bench" readme
fi
mkdir -p "$kept/last"
cp "$built/fastice" "$kept/last/fastice"
rm -f "$kept/last/fastice.commit"
[[ -z $commit ]] || echo "$commit" >"$kept/last/fastice.commit"
if ((${#failed[@]})); then
    printf 'run.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
