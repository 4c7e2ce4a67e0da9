#!/usr/bin/env bash
# Where the processor of a target is while it answers: samples by perf of fastice, of the bare responder and of SPDK's target, in one
# run of one case, into bench/profiles/NAME.txt. The report links a profile at each row that is not met and that its `# rows:` names.
#
# usage: profile.sh NAME CASE DEPTH ROWS
#   NAME   of the file
#   CASE   of `fastice-bench target --only`, such as null/randread/qd128
#   ROWS   how the names of its rows begin, with commas between
#   FASTICE_BENCH_PROGRAM=FILE  what is run (default: target/release/fastice-bench)
# Takes root, or kernel.perf_event_paranoid of -1: the kernel's functions are most of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

(($# == 4)) || { sed -n '5,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1 case=$2 depth=$3 rows=$4
bench=${FASTICE_BENCH_PROGRAM:-target/release/fastice-bench}
command -v perf >/dev/null || { echo "profile.sh: there is no perf (Debian: linux-perf)" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/fastice-profile.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Targets are on the first processor, the host on the last.
processor=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*\([0-9]*\).*/\1/p' /proc/self/status)
# Samples of a clock: virtual machines show no counters of the processor.
perf record -q -C "$processor" -e cpu-clock -F 1999 -o "$work/data" -- \
    "$bench" target --only "$case" --depths "$depth" --rounds 5 --round-ms 1000 --spare 0 --report "$work/report.json" >"$work/run.log" 2>&1 ||
    { cat "$work/run.log" >&2; exit 1; }

# A side is known by the name of its thread: core-N fastice, fastice-bench the bare responder, reactor_N SPDK's target.
top() {
    perf report -i "$work/data" --no-children --stdio -g none --percentage relative --comm "$1" --sort symbol 2>/dev/null |
        sed -n 's/^ *\([0-9.]*%\) *\[\([.k]\)\] \(.*[^ ]\) *$/\1 \2 \3/p' | head -n "${2:-30}"
}
{
    echo "# perf, samples of a clock, of the target's processor while $case is measured; per cent of each side's own samples."
    echo "# k: in the kernel. On loopback what the kernel sends it also receives, in the same call."
    echo "# $(git describe --always --dirty 2>/dev/null || echo "no commit"), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r)"
    echo "# rows: $rows"
    echo
    echo "## What was measured meanwhile"
    grep -E '/(iops|rate|p50|p99|cpu) ' "$work/run.log" | cut -c 1-160 || true
    comms=$(perf report -i "$work/data" --no-children --stdio -g none --sort comm 2>/dev/null | sed -n 's/^ *[0-9.]*% *\([^ ]*\) *$/\1/p')
    for comm in $comms; do
        case $comm in
            core-*) side=fastice ;;
            reactor_*) side="SPDK's target" ;;
            fastice-bench) side="the bare responder" ;;
            *) continue ;;
        esac
        printf '\n## %s\n' "$side"
        top "$comm"
    done
} >"$work/profile.txt"
mkdir -p bench/profiles
mv "$work/profile.txt" "bench/profiles/$name.txt"
echo "bench/profiles/$name.txt"
