#!/usr/bin/env bash
# The driver through VFIO beside the kernel's driver, both on one emulated namespace, in the guest of
# hw-tests/vfio-test.sh: our driver has controller B, the kernel controller A, with poll queues. Everything is emulated
# there, the processor too: only the ratios say something.
#
# usage: guest.sh [ARGUMENT]...      of `fastice-bench driver` (default: --rounds 9 --round-ms 500)
#   REPORT=FILE  where the rows go (default: bench/report.json)
set -euo pipefail
(($#)) || set -- --rounds 9 --round-ms 500
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bench=${FASTICE_BENCH_PROGRAM:-target/release/fastice-bench}
[[ -x $bench ]] || { echo "guest.sh: build it first: cargo build --release -p fastice-bench" >&2; exit 1; }
report=${REPORT:-bench/report.json}
rows=$(mktemp "${TMPDIR:-/tmp}/fastice-bench.XXXXXX")
trap 'rm -f "$rows"' EXIT

# The kernel's driver is loaded anew for its poll queues; B stays with vfio-pci. Namespace 2 has blocks of 4 KiB. It is
# written first: an image that is all holes would be read at no cost.
# shellcheck disable=SC2016  # for the guest
setup='modprobe -r nvme && modprobe nvme poll_queues=1 && wait_for 30 controller_live A
export DISK=/dev/$(disk_of A 2) ADDRESS=$(pci_of B)
tr "\0" Z </dev/zero | dd of=$DISK bs=1M count=96 iflag=fullblock conv=fsync 2>&1 | tail -n 1'
# shellcheck disable=SC2016
program='/root/fastice-bench driver --device vfio:$ADDRESS --nsid 2 --kernel $DISK --emulated --report /root/report.json "$@" &&
    echo REPORT && cat /root/report.json'

# Rows name the commit, and the guest has no repository.
commit=${FASTICE_BENCH_COMMIT:-$(git describe --always --dirty 2>/dev/null || true)}

hw-tests/vfio-test.sh --env "FASTICE_BENCH_COMMIT=$commit" --timeout "${TIMEOUT:-900}" --with "$bench" --setup "$setup" \
    --run sh -c "$program" sh "$@" |
    awk -v rows="$rows" '/^REPORT\r?$/ { report = 1; next } report { print >rows; next } { print; fflush() }'
"$bench" merge "$rows" --report "$report"
