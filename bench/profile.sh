#!/usr/bin/env bash
# Why a row is what it is: where the time goes while its case runs, and what limit follows, into bench/profiles/NAME.txt. The report links
# a profile at each row that is not met and that its `# rows:` names, with its `# limit:`. Which profile explains which rows, and how
# it is made, stands in bench/profiles/table.
#
# usage: profile.sh [NAME]...
#   NAME   of the table; without any, all that explain rows of bench/report.json that are not met
#   SECONDS_MAX=N               what is not begun after so long is left out and named (default: 900)
#   FASTICE_BENCH_PROGRAM=FILE  what is run (default: target/release/fastice-bench)
# Takes perf, and root, or kernel.perf_event_paranoid of -1: the kernel's functions are most of it. Those of driver and lookups take valgrind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ ${1:-} != -* ]] || { sed -n '6,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bench=${FASTICE_BENCH_PROGRAM:-target/release/fastice-bench}
table=bench/profiles/table
# The guest's profile is made in the guest.
command -v perf >/dev/null || { echo "profile.sh: there is no perf (Debian: linux-perf)" >&2; exit 1; }
[[ -x $bench ]] || { echo "profile.sh: build it first: cargo build --release -p fastice-bench" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/fastice-profile.XXXXXX")
trap 'rm -rf "$work"' EXIT
export FASTICE_BENCH_WINDOWS=$work/windows

# Targets are on the first processor, the host on the last.
processor=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*\([0-9]*\).*/\1/p' /proc/self/status)
host=$(sed -n 's/^Cpus_allowed_list:.*[^0-9]\([0-9]*\)$/\1/p' /proc/self/status)

# recorded OPTION... -- PROGRAM [ARGUMENT]...: under perf, by the clock that the bench notes its rounds by. All processors: a program
# that was started on another one than it is sampled on has no names of functions else.
recorded() {
    perf record -q -a -k CLOCK_MONOTONIC -o "$work/data" "$@" >"$work/run.log" 2>&1 || { tail -n 20 "$work/run.log" >&2; return 1; }
}

# script FIELDS: what was recorded, as text.
script() {
    perf script --ns --no-inline -i "$work/data" -F "$1" 2>/dev/null
}

# Each kind prints the lines that say how it was made, with #, then the limit and the sections.

# A target that polls, its peers, and the light host, for all sides are to have one host. Samples of a clock: virtual machines show no
# counters of the processor.
kind_target() {
    local what=$1 depth=$2 flag=()
    ((depth > 1)) || flag=(--at-depth-1)
    recorded -e cpu-clock -F 1999 -g -- \
        "$bench" target --peers bare,spdk,unpinned --only "target/$what" --depths "$depth" --rounds 2 --round-ms 1000 --spare 0 --report "$work/report.json" || return 1
    echo "# perf, samples of a clock, of the target's processor in the rounds of $what, by the light host; per cent of each side's own samples."
    echo "# k: in the kernel. On loopback what the kernel sends it also receives, in the same call."
    script comm,tid,cpu,time,ip,sym,dso | "$bench" profiles samples --windows "$work/windows" --processor "$processor" ${flag[@]+"${flag[@]}"}
}

# Ours and SPDK's target by SPDK's initiator, which is on the other processor.
kind_perf() {
    local what=$1 depth=$2
    recorded -e cpu-clock -F 1999 -g -- \
        "$bench" target --peers spdk-perf --only "target/$what" --depths "$depth" --rounds 4 --round-ms 3000 --spare 0 --report "$work/report.json" || return 1
    [[ -s $work/windows ]] || { echo "profile.sh: SPDK's target or its initiator is not here" >&2; return 1; }
    echo "# perf, samples of a clock, of both processors in the rounds of $what, by SPDK's initiator; per cent of each side's own samples."
    echo "# k: in the kernel. On loopback what the kernel sends it also receives, in the same call."
    script comm,tid,cpu,time,ip,sym,dso | "$bench" profiles samples --windows "$work/windows" --processor "$processor" --host "$host"
}

# A target that may sleep: what the scheduler did with its thread.
kind_idle() {
    recorded -e sched:sched_switch -e sched:sched_wakeup -- \
        "$bench" idle --only "$1" --rounds 3 --idle-ms 3000 --round-ms 1000 --spare 0 --report "$work/report.json" || return 1
    echo "# perf, events of the scheduler, in the rounds of $1."
    script comm,tid,cpu,time,event,trace | "$bench" profiles wakes --windows "$work/windows" --report "$work/report.json"
}

# one_by_one FIELD: of our cycles a read, or the bare loop's, in the report that `fastice-bench show` prints.
one_by_one() {
    awk -v field="$1" '$1 == "driver/replay/qd128/cycles-one-by-one" {
        if (field == "ours") print $2; else for (at = 1; at < NF; at++) if ($at == "peer") print $(at + 1) }'
}

# instructions COUNT ARGUMENT...: by function, as valgrind counts them in the functions `inside` while the bench does so many of what is
# counted; what is inlined belongs to whom it is in. Where a cache is simulated, which valgrind is told by `simulated`, also how often what
# was read was not in it.
instructions() {
    local count=$1 shown=Ir
    shift
    ((${#simulated[@]})) && shown=Ir,DLmr
    valgrind --tool=callgrind --vgdb=no --callgrind-out-file="$work/callgrind" ${simulated[@]+"${simulated[@]}"} "${inside[@]/#/--toggle-collect=}" "$bench" "$@" >"$work/run.log" 2>&1 ||
        { tail -n 20 "$work/run.log" >&2; return 1; }
    callgrind_annotate --auto=no --threshold=100 --show="$shown" "$work/callgrind" |
        awk -v count="$count" -v missed="${#simulated[@]}" '/^ *[0-9,]+ \( *[0-9.]+%\) / && !/PROGRAM TOTALS/ {
            name = rest = $0; sub(/^[^)]*\) *[^:]*:/, "", name); sub(/ \[[^]]*\]$/, "", name); gsub(/,/, "", $1); all[name] += $1
            sub(/^[^)]*\) */, "", rest); sub(/ .*/, "", rest); gsub(/,/, "", rest); lines[name] += rest }
            END { for (name in all) if (all[name] >= count / 10) {
                printf "%8.1f", all[name] / count; if (missed) printf " %6.2f", lines[name] / count; print " " name } }' | sort -rn
}

# The driver with one completion a poll and with 32, on the device that costs nothing: instructions by function, and samples.
kind_driver() {
    local batch ours bare told simulated=() inside=('fastice_bench::load::Load::fill*' 'fastice_bench::load::Load::reap*')
    command -v valgrind >/dev/null || { echo "profile.sh: there is no valgrind" >&2; return 1; }
    "$bench" driver --device replay --depths 128 --rounds 3 --report "$work/report.json" >"$work/rows" || return 1
    for batch in 1 32; do
        instructions 20000 count --depth 128 --batch "$batch" --reads 20000 >"$work/instructions.$batch" || return 1
        recorded -e cpu-clock -F 1999 -- "$bench" count --depth 128 --batch "$batch" --reads 30000000 || return 1
        perf report -i "$work/data" --comm "$(basename "$bench")" --percentage relative --no-children --stdio -g none --sort symbol 2>/dev/null |
            sed -n 's/^ *\([0-9.]*\)% *\[\([.k]\)\] \(.*\)$/\1 % \2 \3/p' | sed 's/ *-  *- *$//; s/ *$//' | head -n 12 >"$work/samples.$batch"
    done
    ours=$(one_by_one ours <"$work/rows") bare=$(one_by_one peer <"$work/rows")
    told=$("$bench" show | one_by_one peer)
    [[ -n $ours && -n $bare && -s $work/instructions.1 && -s $work/instructions.32 ]] || { echo "profile.sh: the driver's cycles or instructions lack" >&2; return 1; }
    echo "# valgrind, instructions a read in caller and driver, and perf, samples of a clock, of the driver at depth 128 on the replayed device."
    awk -v ours="$ours" -v bare="$bare" -v told="$told" '
        { sum[FILENAME] += $1; files[FILENAME]; if (FNR == 1) order[++count] = FILENAME }
        END {
            printf "# limit: one completion a poll takes %.0f instructions a read where 32 take %.0f; ", sum[order[1]], sum[order[2]]
            printf "they took %s cycles while this was made, where 300 are demanded, and the bare loop, which does the least that any driver must, %s", ours, bare
            if (told != "") printf "; while the report was, the bare loop took %s: the machine was %.1f times as slow", told, told / bare
            print "" }' "$work/instructions.1" "$work/instructions.32"
    for batch in 1 32; do
        printf '\n## %s at a time: instructions a read, by function\n' "$batch"
        cat "$work/instructions.$batch"
        printf '\n## %s at a time: samples, the replayed device and the loop among them\n' "$batch"
        cat "$work/samples.$batch"
    done
    printf '\n## As measured meanwhile\n'
    cat "$work/rows"
}

# The pin of a million extents beside the bare calls that read the map once. The kernel cuts names of threads at 15 bytes.
kind_scale() {
    local name
    name=$(basename "$bench")
    recorded -e cpu-clock -F 999 -g -- \
        "$bench" scale --only-pin "$1" --rounds 5 --rest 60 --report "$work/report.json" || return 1
    echo "# perf, samples of a clock, of all processors while a file of a million extents is pinned on $1, and while its map is read bare; per cent"
    echo "# of each side's own samples. k: in the kernel."
    script comm,tid,cpu,time,ip,sym,dso | "$bench" profiles pins --windows "$work/windows" --hz 999 --threads "${name:0:15},map-pages"
}

# cache LEVEL: size, ways and length of lines of a cache for data, as valgrind takes them; of one that is not told a common one.
cache() {
    local what=LEVEL$1_CACHE value told=()
    (($1 > 1)) || what=LEVEL1_DCACHE
    for value in SIZE ASSOC LINESIZE; do
        value=$(getconf "${what}_$value" 2>/dev/null) || value=0
        [[ $value =~ ^[1-9][0-9]*$ ]] && told+=("$value")
    done
    if ((${#told[@]} == 3)); then (IFS=,; echo "${told[*]}"); elif (($1 > 1)); then echo 524288,8,64; else echo 32768,8,64; fi
}

# The lookups of a turn among many extents, beside those in a map of one, and the map's memory read bare. What is asked for beyond the core's
# own caches is simulated, for virtual machines show no counters of the processor: nothing is fetched ahead there, so each line counts.
kind_lookup() {
    local extents=$1 at name own lookups=50000 simulated inside=('fastice_bench::scale::lookup::turn')
    command -v valgrind >/dev/null || { echo "profile.sh: there is no valgrind" >&2; return 1; }
    own=$(cache 2)
    simulated=(--cache-sim=yes --D1="$(cache 1)" --LL="$own")
    name=$(basename "$bench")
    recorded -e cpu-clock -F 1999 -g -- \
        "$bench" scale --only-waits --extents "$extents" --rounds 15 --rest 60 --report "$work/report.json" || return 1
    for at in "$extents" 1; do
        instructions "$lookups" count-lookups --extents "$at" --lookups "$lookups" >"$work/instructions.$at" || return 1
        [[ -s $work/instructions.$at ]] || { echo "profile.sh: no instructions of lookups were counted" >&2; return 1; }
    done
    # sum COLUMN EXTENTS: of all functions.
    sum() { awk -v column="$1" '{ sum += $column } END { printf "%.2f", sum }' "$work/instructions.$2"; }
    echo "# valgrind, instructions a lookup, and perf, samples of a clock, of the lookups of a turn, $2 at a time, among $extents extents, and of the"
    echo "# same memory read bare."
    script comm,tid,time,ip,sym,dso | "$bench" profiles lookups --windows "$work/windows" --report "$work/report.json" --threads "${name:0:15}" \
        --instructions "$(sum 1 "$extents")" --instructions-in-one "$(sum 1 1)" --lines "$(sum 2 "$extents")" || return 1
    for at in "$extents" 1; do
        printf '\n## Extents: %s; instructions a lookup, and lines that a cache of %s KiB had not, by function\n' "$at" "$((${own%%,*} / 1024))"
        cat "$work/instructions.$at"
    done
}

# The target beside nvmet-tcp, in the guest: perf is taken there.
kind_guest() {
    local left=$((${SECONDS_MAX:-900} - SECONDS))
    TIMEOUT=$((left > 120 ? left : 120)) PROFILE=$work/guest REPORT=$work/report.json FASTICE_BENCH_PROGRAM=$bench bench/guest-nvmet.sh --only "$1" --rounds 3 >"$work/run.log" 2>&1 ||
        { tail -n 20 "$work/run.log" >&2; return 1; }
    echo "# perf, samples of a clock, of both processors of the emulated guest, in the middle of the rounds of fio."
    cat "$work/guest"
}

# made NAME KIND WHAT DEPTH ROWS: a profile, whole or not at all. Where it is called from, no failure ends anything by itself.
made() {
    local name=$1 kind=$2 what=$3 depth=$4 rows=$5
    rm -f "$work"/{windows,report.json,data}
    case $kind in
        target) kind_target "$what" "$depth" ;;
        perf) kind_perf "$what" "$depth" ;;
        idle) kind_idle "$what" ;;
        driver) kind_driver ;;
        guest) kind_guest "$what" ;;
        scale) kind_scale "$what" ;;
        lookup) kind_lookup "$what" "$depth" ;;
        *) echo "profile.sh: $table knows a kind $kind that is none" >&2; false ;;
    esac >"$work/body" || return 1
    {
        sed -n '/^#/{/^# limit:/q;/^##/q;p}' "$work/body"
        echo "# ${FASTICE_BENCH_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo "no commit")}, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r)"
        echo "# rows: ${rows//,/, }"
        sed -n '/^# limit:/,$p' "$work/body"
    } >"$work/profile.txt"
    grep -q '^# limit: ' "$work/profile.txt" || { echo "profile.sh: $name: no limit was told" >&2; return 1; }
    mv "$work/profile.txt" "bench/profiles/$name.txt"
    echo "bench/profiles/$name.txt"
}

if (($#)); then
    for name; do
        awk -v name="$name" '$1 == name { print; found = 1 } END { exit !found }' "$table" ||
            { echo "profile.sh: $table has no $name" >&2; exit 2; }
    done
else
    "$bench" profiles unmet --table "$table"
fi >"$work/wanted"
# What is made anew is not of another day in the meantime, or when it fails.
while read -r name _; do
    rm -f "bench/profiles/$name.txt"
done <"$work/wanted"
failed=0
while read -r name kind what depth rows; do
    if ((SECONDS >= ${SECONDS_MAX:-900})); then
        echo "profile.sh: not made, time is over: $name" >&2
        failed=1
    elif ! made "$name" "$kind" "$what" "$depth" "$rows" </dev/null; then
        echo "profile.sh: not made: $name" >&2
        failed=1
    fi
done <"$work/wanted"
exit "$failed"
