#!/usr/bin/env bash
# NVMe controllers under fastice's own driver: a Debian guest under software emulation, in which fastice runs and
# reaches emulated controllers by VFIO, behind an emulated IOMMU. Nothing of this machine is touched.
#
# usage: vfio-test.sh --run PROGRAM [ARGUMENT]...    one program in such a guest; its output and its exit code come back
#   --vfio 'B D'       before it: the controllers that vfio-pci gets, by letter (default B); '' for none. The kernel's
#                      nvme driver has the others
#   --setup 'SHELL'    run in the guest before PROGRAM; functions of guest/in-guest/ can be used, e.g.
#                      'mkfs.xfs --unsupported -q /dev/$(disk_of A 1) && mount /dev/$(disk_of A 1) /mnt'
#   --with FILE        copied into the guest, as /root/NAME, with its libraries; may be repeated
#   --env NAME=VALUE   may be repeated
#   --hugepages N      2 MiB each, reserved at boot (default 64)
#   --fio              with fio in the guest
# and for all:
#   --timeout SECONDS  the end of the guest, come what may (300)
#   --keep             leave the working directory for a look
#   HW_CACHE=DIR       kernel package and image (default: hw-tests/cache)
#
# PROGRAM is a file here; `sh` and other commands of the guest also go: --run sh -c 'ls /sys/kernel/iommu_groups'.
# The controllers, their letters and addresses: guest/nvme-machine.sh. Logs of the last run: hw-tests/cache/last-run/.
# As an ordinary user it works too, once the packages are there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/guest" && pwd)
# shellcheck source=guest/lib.sh
source "$here/lib.sh"
# shellcheck source=guest/harness.sh
source "$here/harness.sh"
# shellcheck source=guest/nvme-machine.sh
source "$here/nvme-machine.sh"

outer() {
    local keep=0 limit=300 last=last-run
    HW_VFIO=B HW_SETUP='' HW_WITH='' HW_ENV='' HW_HUGEPAGES=64 HW_FIO=0 HW_COMMAND=''
    while (($#)); do
        case $1 in
            --vfio) HW_VFIO=$2; shift ;;
            --setup) HW_SETUP=$2; shift ;;
            --with) HW_WITH+=$(readlink -e "$2")$'\n' || die "no file $2"; shift ;;
            --env) HW_ENV+="export $(printf '%q' "$2")"$'\n'; shift ;;
            --hugepages) HW_HUGEPAGES=$2; shift ;;
            --fio) HW_FIO=1 ;;
            --keep) keep=1 ;;
            --timeout) limit=${2:?}; shift ;;
            --run) shift; break ;;
            -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
            *) die "unknown option $1 (see --help)" ;;
        esac
        shift
    done
    (($#)) || die "nothing to run (see --help)"
    [[ $(uname -m) == x86_64 ]] || die "the guest is x86_64, this machine is $(uname -m)"
    HW_COMMAND=$(basename "$1")
    if [[ -f $1 ]]; then
        HW_WITH+=$(readlink -e "$1")$'\n'
        HW_COMMAND=/root/$HW_COMMAND
    fi
    shift
    (($# == 0)) || HW_COMMAND+=$(printf ' %q' "$@")
    export HW_VFIO HW_SETUP HW_WITH HW_ENV HW_HUGEPAGES HW_FIO HW_COMMAND
    install_missing
    run_inside "${BASH_SOURCE[0]}" "$keep" "$limit" "$last"
}

obey() { return 1; }

program_code=

guest_said() {
    [[ ${1:-} == EXIT ]] || return 1
    program_code=$2
}

# put FILE: into /root of the guest. Debug sections are of no use there and cost seconds of boot.
put() {
    copy_program "$work/overlay" "$1"
    mkdir -p "$work/overlay/root"
    mv "$work/overlay/bin/$(basename "$1")" "$work/overlay/root/"
    ! command -v strip >/dev/null || strip --strip-debug "$work/overlay/root/$(basename "$1")" 2>/dev/null || true
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
    converse --iommu 1 --cpus 2 --memory 1536M --fio "$HW_FIO" --output "$work/output" \
        --append "hugepages=$HW_HUGEPAGES" "${machine_options[@]}" || code=$?
    kill "$reader" 2>/dev/null || true
    [[ -n $program_code ]] || die "the guest ended with $code before the program did (124: time over); console: $HW_CACHE/last-run/console.log"
    exit "$program_code"
}

inner() {
    work=$HW_WORK image=$HW_IMAGE
    # What is not the first of a process namespace has to end its children itself.
    # shellcheck disable=SC2046  # a list of words on purpose
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    trap 'exit 143' TERM INT HUP
    : >"$work/console.log"
    : >"$work/host.log"
    run_program
}

if [[ ${HW_INNER:-} == 1 ]]; then
    inner
else
    outer "$@"
fi
