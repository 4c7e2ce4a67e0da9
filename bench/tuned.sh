#!/usr/bin/env bash
# A release build that is tuned by a profile of the target at work: target/tuned/fastice, and fastice-bench built the same way. It
# builds twice and serves on loopback in between, some ten minutes on two processors. What is served then are null devices, maps
# on them, and an image by our own driver from a controller in software; as root also files on XFS on a loop device.
#
# The profile is of this source and this compiler, and is not kept: whoever wants the same program again builds it again.
# usage: tuned.sh
#   LLVM_PROFDATA=PROGRAM  of the compiler's own LLVM (default: that of the rustup component llvm-tools, which is added where it lacks)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo=${CARGO:-cargo}
place=$PWD/target/tuned
if [[ $place == *[[:space:]]* ]]; then
    echo "tuned.sh: RUSTFLAGS cannot name a path with blanks: $place" >&2
    exit 1
fi
host=$(rustc --version --verbose | sed -n 's/^host: //p')
merge=${LLVM_PROFDATA:-$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata}
merge=$(command -v "$merge" || echo "$merge")
if [[ ! -x $merge ]] && command -v rustup >/dev/null; then
    rustup component add llvm-tools
fi
if [[ ! -x $merge ]]; then
    echo "tuned.sh: there is no $merge; install the rustup component llvm-tools, or name the llvm-profdata of the compiler's LLVM by" \
        "LLVM_PROFDATA" >&2
    exit 1
fi

programs=(-p fastice -p fastice-bench --bin fastice --bin fastice-bench)
raw=$place/raw
rm -rf "$raw"
mkdir -p "$raw"
echo "== builds what counts its own branches"
LLVM_PROFILE_FILE=$raw/build-%p-%m.profraw RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-generate=$raw" \
    "$cargo" build --release --locked -p fastice-bench --bin fastice-bench --target-dir "$place/counting"
# Build scripts count as well: of no use.
rm -f "$raw"/*

learn() {
    LLVM_PROFILE_FILE=$raw/%p-%m.profraw "$place/counting/release/fastice-bench" "$@" --report "$place/unused.json" >"$place/served.log" 2>&1 ||
        { cat "$place/served.log" >&2; return 1; }
}

echo "== serves, to be counted"
export FASTICE_BENCH_NVMF_TGT=/nonexistent FASTICE_BENCH_SPDK_NVME_PERF=/nonexistent FASTICE_BENCH_PREVIOUS=/nonexistent
for work in null/randread null/randwrite/ null/randrw 128k digests 64x4 map- model/; do
    learn target --only "$work" --depths 1,32,128 --rounds 3 --round-ms 200 --spare 0 --rest 0
done
# What nobody has used is taken for code that nobody will use, and made small: our driver on its own, a core that sleeps, io_uring.
learn driver --device replay,model --rounds 1 --round-ms 30
learn idle --only full --rounds 1 --round-ms 200 --spare 0 --rest 0
# That takes root, and a filesystem on a loop device in memory.
learn target --only file- --depths 1,32 --rounds 1 --round-ms 200 --spare 0 --rest 0 ||
    echo "tuned.sh: no file is pinned to be counted, see above: the code that reads and writes by io_uring is taken for unused, and made small" >&2
rm -f "$place/unused.json"
"$merge" merge -o "$place/profile" "$raw"/*.profraw
rm -rf "$raw"

echo "== builds what the profile says"
RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-use=$place/profile" FASTICE_TUNED=1 \
    "$cargo" build --release --locked "${programs[@]}" --target-dir "$place/build"
# One may be running.
cp --remove-destination "$place/build/release/fastice" "$place/build/release/fastice-bench" "$place/"
