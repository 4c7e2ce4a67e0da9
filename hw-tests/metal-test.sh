#!/bin/sh
# The scenarios of vfio-test.sh on NVMe controllers of this very machine. It destroys what is on them: only namespaces
# that a tester has marked for it are touched, and only controllers all of whose namespaces are marked. What is checked
# before anything is written: guest/in-guest/guard.sh.
#
# usage: metal-test.sh list                                 the controllers of this machine, and what the guard says
#        metal-test.sh mark --serial SERIAL PCI NSID        names a blank namespace for tests
#        metal-test.sh unmark --serial SERIAL PCI NSID      takes the name, and the beginning, away
#        metal-test.sh check PCI...                         only asks the guard
#        metal-test.sh run PCI [KERNEL-PCI]                 the scenarios, fastice driving PCI
#   FASTICE=PATH      the binary (default: target/release/fastice, then target/debug/fastice, then the one in PATH)
#   HW_ONLY=REGEX     only scenarios whose names match
#   HW_NSID=N         the namespace of the live case (default: the first)
#
# With one controller: taking it, probing it, the handed-over mode. With a second controller of the same subsystem, which
# the kernel keeps: taking and probing, the live case with the target killed under I/O, and the controller reset under
# I/O. Controllers that vanish or are unplugged need a machine that can do that: vfio-test.sh has them.
# Root; an IOMMU; packages: busybox-static, nvme-cli, fio, xfsprogs, e2fsprogs, fdisk, util-linux.
# One line a scenario, a summary last; exit code 0 when none failed.
set -u

place=$(cd "$(dirname "$0")" && pwd)
parts=$place/guest/in-guest
# In a guest everything lies in one directory.
[ -d "$parts" ] || parts=$place

export PATH="$PATH:/usr/sbin:/sbin"
usage() { sed -n '/^# usage:/,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

# The same shell and tools as in the guest, where all of this is tested; and a /tmp and mounts of its own, which are
# gone with it.
if [ "${HW_METAL:-}" != 1 ]; then
    command -v busybox >/dev/null || { echo "metal-test.sh: needs busybox (package busybox-static)" >&2; exit 2; }
    [ "$(id -u)" = 0 ] || { echo "metal-test.sh: needs root" >&2; exit 2; }
    HW_METAL=1 exec unshare --mount --propagation slave busybox sh "$place/$(basename "$0")" "$@"
fi
mount -t tmpfs -o mode=1700 tmpfs /tmp

# What the guest's parameters are (see vfio-test.sh).
# shellcheck disable=SC2034  # used by the parts
{
    ONLY=${HW_ONLY:-} METAL=1 LIVE_KILL=1 DEVICE=nvme SERVE_CORES=2 FILE_MIB=64 CHUNK_KIB=256 MNT=/tmp/mnt
    TARGET_ADDRESS=127.0.0.1 TARGET_PORT=${HW_PORT:-4470}
    HOST_NQN=nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-000000000001
    HOST_ID=6d2a1a5e-9d43-4c11-9f0a-000000000001
}
# shellcheck source=guest/in-guest/lib.sh
. "$parts/lib.sh"
# shellcheck source=guest/in-guest/guard.sh
. "$parts/guard.sh"

need() {
    for program; do
        command -v "$program" >/dev/null || { echo "metal-test.sh: there is no $program" >&2; exit 2; }
    done
}

list() {
    for function in /sys/bus/pci/devices/*; do
        case $(cat "$function/class") in 0x0108*) ;; *) continue ;; esac
        address=$(basename "$function")
        if nvme=$(guard_nvme "$address"); then
            echo "$address  $nvme  serial $(guard_first "/sys/class/nvme/$nvme/serial")  $(guard_first "/sys/class/nvme/$nvme/model")"
            for disk in $(guard_disks "$nvme"); do
                if verdict=$(guard_disk "$disk"); then verdict='may be destroyed by tests'; fi
                echo "    namespace $(guard_nsid "$disk")  /dev/$disk  $(guard_bytes "$disk") bytes: $(echo "$verdict" | head -n 1)"
            done
        else
            echo "$nvme"
        fi
    done
}

# named SERIAL PCI NSID: the disk, if the serial number is the right one.
named() {
    nvme=$(guard_nvme "$2") || { echo "$nvme" >&2; return 1; }
    for disk in $(guard_disks "$nvme"); do
        [ "$(guard_nsid "$disk")" = "$3" ] || continue
        [ "$(guard_serial "$disk")" = "$1" ] || { guard_say "the serial number is '$(guard_serial "$disk")', not '$1'" >&2; return 1; }
        echo "$disk"
        return 0
    done
    guard_say "$2 has no namespace $3" >&2
    return 1
}

run_scenarios() { # PCI [KERNEL-PCI]
    for part in devices storage serve live handover device-command pair faults; do
        # shellcheck disable=SC1090  # one of ours
        . "$parts/$part.sh"
    done
    for address; do
        guard_controller "$address" || exit 3
    done
    for binary in "${FASTICE:-}" "$place/../target/release/fastice" "$place/../target/debug/fastice"; do
        [ ! -x "$binary" ] || break
    done
    # By its name, as in the guest.
    [ ! -x "$binary" ] || { mkdir /tmp/bin && ln -s "$(readlink -f "$binary")" /tmp/bin/fastice && export PATH="/tmp/bin:$PATH"; }
    need fastice fio mkfs.xfs xfs_repair xfs_io mkfs.ext4 e2fsck sfdisk
    modprobe -a nvme-tcp vfio-pci 2>/dev/null
    mkdir -p "$FASTICE_STATE_DIR" "$MNT"
    # shellcheck disable=SC2064  # the address of now
    trap "case_end; fastice device unbind $1 >/dev/null 2>&1" EXIT
    # shellcheck disable=SC2034  # by their letters
    PCI_B=$1 PCI_A=${2:-} NVME_LETTERS=B
    # (The kernel's names are in no order.)
    NSID=${HW_NSID:-$(for disk in $(guard_disks "$(guard_nvme "$1")"); do guard_nsid "$disk"; done | sort -n | head -n 1)}
    if [ $# = 1 ]; then
        namespaces_of B >/tmp/namespaces
        run device-list 30 t_device_list
        run device-last-path-single 60 t_last_path_single B
        unmount_all
        run device-other-uses 60 t_other_uses B
        run device-probe 90 t_probe_alone B
        handover_case xfs xfs B "$NSID" whole
        handover_case ext4-partition ext4 B "$NSID" partition
        return
    fi
    # shellcheck disable=SC2034  # used by the parts
    NVME_LETTERS='A B'
    [ "$(guard_nvme "$2" | xargs -I@ cat /sys/class/nvme/@/subsysnqn)" = "$(guard_nvme "$1" | xargs -I@ cat /sys/class/nvme/@/subsysnqn)" ] ||
        { echo "metal-test.sh: $1 and $2 are not of one subsystem" >&2; exit 2; }
    namespaces_of A >/tmp/namespaces
    namespaces_of B >>/tmp/namespaces
    run device-list 30 t_device_list
    chain device "second-path 60 t_second_path A B" "give-back 60 t_give_back A B"
    unmount_all
    by_kernel A
    run device-probe 90 t_probe B A
    bound_to B vfio-pci || take B
    live_case xfs xfs A B "$NSID" whole
    live_case ext4 ext4 A B "$NSID" whole
    live_case xfs-partition xfs A B "$NSID" partition
    live_case ext4-partition ext4 A B "$NSID" partition
    reset_case A B "$NSID"
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
    list) need nvme wipefs blockdev; list ;;
    check)
        [ $# -ge 1 ] || usage
        need nvme wipefs blockdev
        for address; do guard_controller "$address" || exit 3; done
        ;;
    mark)
        [ $# = 4 ] && [ "$1" = --serial ] || usage
        need nvme wipefs blockdev
        guard_mark "$3" "$4" "$2" || exit 3
        ;;
    unmark)
        [ $# = 4 ] && [ "$1" = --serial ] || usage
        need nvme wipefs blockdev
        disk=$(named "$2" "$3" "$4") || exit 3
        guard_wipe "$disk" all || exit 3
        ;;
    run)
        [ $# = 1 ] || [ $# = 2 ] || usage
        need nvme wipefs blockdev
        # What `tell` writes comes here, and is counted.
        results=$(mktemp)
        run_scenarios "$@" 5>"$results"
        failed=$(grep -cE '^RESULT [^ ]+ FAIL' "$results")
        echo "hw-tests: $(grep -cE '^RESULT [^ ]+ PASS' "$results") passed, $failed failed, $(grep -cE '^RESULT [^ ]+ SKIP' "$results") skipped"
        rm -f "$results"
        [ "$failed" = 0 ]
        ;;
    *) usage ;;
esac
