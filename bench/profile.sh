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
    "$bench" target --only "$case" --depths "$depth" --rounds 3 --round-ms 2000 --spare 0 --report "$work/report.json" >"$work/run.log" 2>&1 ||
    { cat "$work/run.log" >&2; exit 1; }

# A side is known by the name of its thread. All of them in one table: perf shows a function that several have only once else.
perf report -i "$work/data" --no-children --stdio -g none --sort comm,symbol 2>/dev/null |
    sed -n 's/^ *\([0-9.]*\)% *\([^ ]*\) *\[\([.k]\)\] \(.*\)$/\1 \2 \3 \4/p' | sed 's/ *-  *- *$//; s/ *$//' >"$work/table.txt"
side() {
    awk -v comm="$1" '
        $2 ~ comm { share = $1; kind = $3; $1 = $2 = $3 = ""; sub(/^ +/, ""); all += share; shares[++count] = share; names[count] = kind " " $0 }
        END { for (at = 1; at <= count && at <= 30; at++) printf "%5.1f %% %s\n", 100 * shares[at] / all, names[at] }' "$work/table.txt"
}
{
    echo "# perf, samples of a clock, of the target's processor while $case is measured; per cent of each side's own samples."
    echo "# Targets poll between the rounds as well: what is called for nothing then has a larger part than under load."
    echo "# k: in the kernel. On loopback what the kernel sends it also receives, in the same call."
    echo "# $(git describe --always --dirty 2>/dev/null || echo "no commit"), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r)"
    echo "# rows: $rows"
    for pair in "fastice:^core-" "the bare responder:^bare$" "SPDK's target:^reactor_"; do
        lines=$(side "${pair#*:}")
        [[ -z $lines ]] || printf '\n## %s\n%s\n' "${pair%%:*}" "$lines"
    done
} >"$work/profile.txt"
mkdir -p bench/profiles
mv "$work/profile.txt" "bench/profiles/$name.txt"
echo "bench/profiles/$name.txt"
