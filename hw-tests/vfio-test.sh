#!/usr/bin/env bash
# NVMe controllers under fastice's own driver: a Debian guest under software emulation, in which fastice runs and
# reaches emulated controllers by VFIO, behind an emulated IOMMU. Nothing of this machine is touched.
#
# usage: vfio-test.sh [--long]                       the scenarios
#   --long             every combination of filesystem, block size and partition, kills, the bare-metal suite
#   FASTICE=PATH       the binary (default: target/release/fastice, then target/debug/fastice)
#   HW_ONLY=REGEX      only the scenarios whose names match (for the development of one thing)
#   HW_PART=order      only one of the two guests: order (what goes its regular way), faults (what breaks)
#   HW_DEVICE=uring    a test of the scenarios themselves: fastice serves through the kernel's driver
#
# usage: vfio-test.sh --run PROGRAM [ARGUMENT]...    one program in such a guest; its output and its exit code come back
#   --vfio 'B D'       before it: the controllers that vfio-pci gets, by letter (default B); '' for none. The kernel's
#                      nvme driver has the others
#   --setup 'SHELL'    run in the guest before PROGRAM; functions of guest/in-guest/ can be used, e.g.
#                      'mkfs.xfs --unsupported -q /dev/$(disk_of A 1) && mount /dev/$(disk_of A 1) /mnt'
#   --with FILE        copied into the guest, as /root/NAME, with its libraries; may be repeated
#   --env NAME=VALUE   may be repeated
#   --fio              with fio in the guest
#   --threads multi    a thread of this machine for each processor of the guest: faster, when the machine is quiet
#   --features WORDS   of the guest's processor, such as erms=off
# and for all:
#   --hugepages N      2 MiB each, reserved at boot (default 64)
#   --kernel WORDS     further words on the kernel's command line, e.g. 'nvme_core.multipath=N'
#   --timeout SECONDS  the end of each guest, come what may (900; with --long 1800, with --run 300)
#   --keep             leave the working directory for a look
#   HW_CACHE=DIR       kernel package and image (default: hw-tests/cache)
#   HW_KERNEL_SERIES   another kernel that apt knows, e.g. 6.1
#
# PROGRAM is a file here; `sh` and other commands of the guest also go: --run sh -c 'ls /sys/kernel/iommu_groups'.
# The controllers, their letters and addresses: guest/nvme-machine.sh. Logs of the last run: hw-tests/cache/last-vfio/,
# with --run last-run/. As an ordinary user it works too, once the packages are there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/guest" && pwd)
# shellcheck source=guest/lib.sh
source "$here/lib.sh"
# shellcheck source=guest/harness.sh
source "$here/harness.sh"
# shellcheck source=guest/nvme-machine.sh
source "$here/nvme-machine.sh"

outer() {
    local keep=0 limit='' last=last-run
    HW_VFIO=B HW_SETUP='' HW_WITH='' HW_ENV='' HW_HUGEPAGES=64 HW_FIO=0 HW_COMMAND='' HW_LONG=0 HW_KERNEL='' HW_THREADS=single HW_FEATURES=''
    while (($#)); do
        case $1 in
            --long) HW_LONG=1 ;;
            --vfio) HW_VFIO=$2; shift ;;
            --setup) HW_SETUP=$2; shift ;;
            --with) HW_WITH+=$(readlink -e "$2")$'\n' || die "no file $2"; shift ;;
            --env) HW_ENV+="export $(printf '%q' "$2")"$'\n'; shift ;;
            --hugepages) HW_HUGEPAGES=$2; shift ;;
            --kernel) HW_KERNEL=$2; shift ;;
            --fio) HW_FIO=1 ;;
            --threads) HW_THREADS=$2; shift ;;
            --features) HW_FEATURES=$2; shift ;;
            --keep) keep=1 ;;
            --timeout) limit=${2:?}; shift ;;
            --run) shift; (($#)) || die "nothing to run (see --help)"; name_command "$@"; break ;;
            -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
            *) die "unknown option $1 (see --help)" ;;
        esac
        shift
    done
    [[ $(uname -m) == x86_64 ]] || die "the guest is x86_64, this machine is $(uname -m)"
    if [[ -z $HW_COMMAND ]]; then
        find_fastice
        limit=${limit:-$((HW_LONG ? 1800 : 900))} last=last-vfio
    fi
    export HW_VFIO HW_SETUP HW_WITH HW_ENV HW_HUGEPAGES HW_FIO HW_COMMAND HW_LONG HW_KERNEL HW_THREADS HW_FEATURES FASTICE
    install_missing
    run_inside "${BASH_SOURCE[0]}" "$keep" "${limit:-300}" "$last"
}

# name_command PROGRAM [ARGUMENT]...: as the guest will call it.
name_command() {
    HW_COMMAND=$(basename "$1")
    if [[ -f $1 ]]; then
        HW_WITH+=$(readlink -e "$1")$'\n'
        HW_COMMAND=/root/$HW_COMMAND
    fi
    shift
    (($# == 0)) || HW_COMMAND+=$(printf ' %q' "$@")
}

find_fastice() {
    local binary
    for binary in "${FASTICE:-}" "$here/../../target/release/fastice" "$here/../../target/debug/fastice"; do
        [[ ! -x $binary || ! -f $binary ]] || { FASTICE=$(readlink -e "$binary"); return 0; }
        # A binary that was named is the one to test, or none.
        [[ -z ${FASTICE:-} ]] || die "FASTICE=$FASTICE is no program"
    done
    die "no fastice binary; build it (cargo build --release) or set FASTICE=PATH"
}

# --- inside: QEMU's own control protocol -----------------------------------------------------------------

# What the guest may ask for: a controller pulled out of its slot and put in again.
obey() {
    case $1 in
        unplug) qmp device_del "\"id\": \"$2\"" ;;
        # The slot is empty when QEMU says so, which it does once.
        unplugged) qmp_until "\"DEVICE_DELETED\".*\"device\": \"$2\"" ;;
        plug) qmp device_add "$(json_of "$(nvme_device "$2")")" ;;
        *) return 1 ;;
    esac
}

# json_of driver,key=value,...: as device_add takes it.
json_of() {
    local word words
    IFS=, read -r -a words <<<"$1"
    printf '"driver": "%s"' "${words[0]}"
    for word in "${words[@]:1}"; do
        # Numbers are numbers.
        if [[ ${word#*=} =~ ^[0-9]+$ ]]; then printf ', "%s": %s' "${word%%=*}" "${word#*=}"; else printf ', "%s": "%s"' "${word%%=*}" "${word#*=}"; fi
    done
}

qmp_seen='' qmp_match=''

# qmp_until REGEX: reads answers and events until one matches, which is qmp_match then; what was read before counts.
qmp_until() {
    local line part='' deadline=$((SECONDS + 30))
    while ! grep -qE "$1" <<<"$qmp_seen"; do
        ((SECONDS < deadline)) || return 1
        if IFS= read -r -t 1 line <&"$from_qmp"; then
            printf 'qmp: %s\n' "$part$line" >>"$work/host.log"
            qmp_seen+=$part$line$'\n' part=''
        else
            part+=$line
        fi
    done
    qmp_match=$(grep -E "$1" <<<"$qmp_seen")
    # Told once, used once.
    qmp_seen=$(grep -vE "$1" <<<"$qmp_seen" || true)$'\n'
}

qmp_number=0

# qmp COMMAND [ARGUMENTS]: fails when QEMU says it failed.
qmp() {
    qmp_number=$((qmp_number + 1))
    printf '{"execute": "%s", "arguments": {%s}, "id": %d}\n' "$1" "${2:-}" "$qmp_number" >&"$to_qmp"
    qmp_until "\"id\": ${qmp_number}[,}]" && [[ $qmp_match != *'"error"'* ]]
}

qmp_open() {
    rm -f "$work"/qmp.{in,out}
    mkfifo "$work/qmp.in" "$work/qmp.out"
    exec {to_qmp}<>"$work/qmp.in" {from_qmp}<>"$work/qmp.out"
    qmp_seen=''
    # Negotiation, answered when QEMU has come up.
    printf '{"execute": "qmp_capabilities"}\n' >&"$to_qmp"
}

# --- inside: one program ----------------------------------------------------------------------------------

program_code=

guest_said() {
    [[ ${1:-} == EXIT ]] || return 1
    program_code=$2
}

# put FILE [DIRECTORY]: into /root of the guest. Debug sections are of no use there and cost seconds of boot.
put() {
    local to=$work/overlay${2:-/root}
    copy_program "$work/overlay" "$1"
    mkdir -p "$to"
    [[ $to == "$work/overlay/bin" ]] || mv "$work/overlay/bin/$(basename "$1")" "$to/"
    ! command -v strip >/dev/null || strip --strip-debug "$to/$(basename "$1")" 2>/dev/null || true
}

run_program() {
    local file reader code=0
    lay_overlay "$work/overlay" run <<PARAMS
VFIO_LETTERS='$HW_VFIO'
$(nvme_params)
PARAMS
    while IFS= read -r file; do
        [[ -z $file ]] || put "$file"
    done <<<"$HW_WITH"
    printf '. /hw/params.sh\n. /hw/lib.sh\n. /hw/devices.sh\n%s%s\n%s\n' "$HW_ENV" "$HW_SETUP" "$HW_COMMAND" >"$work/overlay/hw/command.sh"
    nvme_machine "$work"
    mkfifo "$work/output"
    cat "$work/output" &
    reader=$!
    converse --iommu 1 --cpus 2 --memory 1536M --fio "$HW_FIO" --threads "$HW_THREADS" --features "$HW_FEATURES" --output "$work/output" \
        --append "hugepages=$HW_HUGEPAGES $HW_KERNEL" "${machine_options[@]}" || code=$?
    kill "$reader" 2>/dev/null || true
    [[ -n $program_code ]] || die "the guest ended with $code before the program did (124: time over); console: $HW_CACHE/last-run/console.log"
    exit "$program_code"
}

# --- inside: the scenarios ----------------------------------------------------------------------------------

# run_part PART: one guest with everything in it.
run_part() {
    local part=$1 code=0
    rm -rf "$work/overlay"
    lay_overlay "$work/overlay" vfio <<PARAMS
PART='$part'
LONG='$HW_LONG'
LIVE_KILL='${HW_LONG/0/}'
DEVICE='${HW_DEVICE:-nvme}'
SERVE_CORES=2
FILE_MIB=$((HW_LONG ? 48 : 24))
CHUNK_KIB=96
TARGET_ADDRESS=127.0.0.1
TARGET_PORT=4420
HOST_NQN=nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-000000000001
HOST_ID=6d2a1a5e-9d43-4c11-9f0a-000000000001
$(nvme_params)
PARAMS
    install -m 755 "$here/../metal-test.sh" "$work/overlay/hw/metal-test.sh"
    put "$FASTICE" /bin
    [[ $(basename "$FASTICE") == fastice ]] || mv "$work/overlay/bin/$(basename "$FASTICE")" "$work/overlay/bin/fastice"
    rm -f "$work"/s?-*.img
    nvme_machine "$work"
    qmp_open
    converse --iommu 1 --cpus 2 --memory 1536M --qmp "$work/qmp" \
        --append "hugepages=$HW_HUGEPAGES $HW_KERNEL" "${machine_options[@]}" || code=$?
    exec {to_qmp}>&- {from_qmp}<&-
    guest_ended "$code" "guest-$part"
    mv "$work/console.log" "$work/console-$part.log"
}

run_scenarios() {
    local started part
    started=$(now_ms)
    say "fastice: $FASTICE"
    for part in ${HW_PART:-order faults}; do
        run_part "$part"
    done
    summary "$started"
}

inner() {
    work=$HW_WORK image=$HW_IMAGE
    # What is not the first of a process namespace has to end its children itself.
    # shellcheck disable=SC2046  # a list of words on purpose
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    trap 'exit 143' TERM INT HUP
    : >"$work/console.log"
    : >"$work/host.log"
    if [[ -n $HW_COMMAND ]]; then run_program; else run_scenarios; fi
}

if [[ ${HW_INNER:-} == 1 ]]; then
    inner
else
    outer "$@"
fi
