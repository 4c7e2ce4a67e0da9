#!/usr/bin/env bash
# The target beside the kernel's own, nvmet-tcp, in the guest of hw-tests/vfio-test.sh: the kernel's initiator and fio, over loopback, to
# the same blocks of one namespace. nvmet-tcp has it through controller A and the kernel's driver, fastice through B and its own.
# Everything is emulated there, the processor too: only the ratios say something, and only of a machine that does nothing else.
#
# usage: guest-nvmet.sh [ARGUMENT]...      of `fastice-bench guest`, such as --rounds 3 --only nvme
#   REPORT=FILE   where the rows go (default: bench/report.json)
#   PROFILE=FILE  where a profile goes that perf makes meanwhile, in the guest; measured under perf, the rows are worth less
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bench=${FASTICE_BENCH_PROGRAM:-target/release/fastice-bench}
[[ -x $bench ]] || { echo "guest-nvmet.sh: build it first: cargo build --release -p fastice-bench" >&2; exit 1; }
report=${REPORT:-bench/report.json}
rows=$(mktemp "${TMPDIR:-/tmp}/fastice-bench.XXXXXX")
trap 'rm -f "$rows"' EXIT

# Namespace 2 has blocks of 4 KiB. One allocation group, so that the file is in one piece; its place is where nvmet-tcp is read from. All
# of it is written: an image that is all holes would be read at no cost.
# shellcheck disable=SC2016  # for the guest
setup='modprobe -a nvmet-tcp nvme-tcp && modprobe null_blk nr_devices=0 && mount -t configfs config /sys/kernel/config || exit 1
DISK=/dev/$(disk_of A 2) ADDRESS=$(pci_of B) FILE=/mnt/served.img
mkfs.xfs --unsupported -q -d agcount=1 $DISK && mount -t xfs $DISK /mnt || exit 1
tr "\0" Z </dev/zero | dd of=$FILE bs=1M count=32 iflag=fullblock oflag=direct conv=fsync 2>&1 | tail -n 1
OFFSET=$(xfs_io -r -c "bmap -v" $FILE | awk "NR == 3 { split(\$3, place, \"[.][.]\"); print place[1] * 512 } NR == 4 { exit 1 }") ||
    { echo "the file is not in one piece"; exit 1; }
export DISK ADDRESS FILE OFFSET'
# shellcheck disable=SC2016
program='/root/fastice-bench guest --file $FILE --offset $OFFSET --disk $DISK --pci $ADDRESS --report /root/report.json "$@" &&
    echo REPORT && cat /root/report.json'

with=(--with "$bench")
if [[ -n ${PROFILE:-} ]]; then
    perf=$(readlink -e "$(command -v perf)") || { echo "guest-nvmet.sh: there is no perf (Debian: linux-perf)" >&2; exit 1; }
    with+=(--with "$perf")
    # shellcheck disable=SC2016
    program='export FASTICE_BENCH_WINDOWS=/root/windows
    echo 0 >/proc/sys/kernel/kptr_restrict
    /root/perf record -q -a -k CLOCK_MONOTONIC -e cpu-clock -F 199 -g -o /root/data -- '$program' && echo PROFILE &&
    /root/perf script --ns --no-inline -i /root/data -F comm,tid,cpu,time,ip,sym,dso 2>/root/perf.log |
        /root/fastice-bench profiles shares --windows /root/windows'
fi

# Rows name the commit, and the guest has no repository.
commit=${FASTICE_BENCH_COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}

# A thread for each processor of the guest: target and initiator then run side by side. erms=off: "fast string" instructions are
# emulated byte by byte, so the kernel copies and clears pages eight times as fast without them; that is for both sides.
hw-tests/vfio-test.sh --env "FASTICE_BENCH_COMMIT=$commit" --timeout "${TIMEOUT:-1200}" --threads multi --features erms=off --fio "${with[@]}" --setup "$setup" \
    --run sh -c "$program" sh "$@" |
    awk -v rows="$rows" -v profile="${PROFILE:-/dev/null}" '{ sub(/\r$/, "") } /^REPORT$/ { into = rows; next } /^PROFILE$/ { into = profile; next }
        into { print >into; next } { print; fflush() }'
"$bench" merge "$rows" --report "$report"
