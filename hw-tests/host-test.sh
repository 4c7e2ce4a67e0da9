#!/usr/bin/env bash
# The real Linux host: a Debian guest under software emulation connects over NVMe/TCP to a target that
# runs out here and serves pinned files of a real XFS on a loop device.
#
#        network namespace (private)                        QEMU guest, Debian 6.12
#   +--------------------------------------+          +--------------------------------+
#   |  XFS on /dev/loopN                   |   tap0   |  nvme-cli, fio, mkfs.xfs       |
#   |    rw.img, ro.img <- target 10.0.9.1 |<-------->|  nvme-tcp 10.0.9.2             |
#   |  this script  <---- FIFOs -----------|--ttyS1---|  in-guest/scenario.sh          |
#   +--------------------------------------+          +--------------------------------+
#
# usage: host-test.sh [--keep] [--timeout SECONDS]
#   HW_TARGET=fastice   what serves: targets/fastice.sh (default) or targets/nvmet.sh (self-test of the harness)
#   FASTICE=PATH        the binary (default: target/release/fastice, then target/debug/fastice)
#   HW_ONLY=REGEX       only the guest's scenarios whose name matches (for the development of one thing)
#   HW_CACHE=DIR        kernel package and image (default: hw-tests/cache)
#
# One line a scenario, a summary last: "N passed, N failed, N skipped". Exit code 0 when none failed.
# Logs of the last run: hw-tests/cache/last/.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/guest" && pwd)
# shellcheck source=guest/lib.sh
source "$here/lib.sh"
# shellcheck source=guest/harness.sh
source "$here/harness.sh"
# shellcheck source=guest/recall.sh
source "$here/recall.sh"

readonly address=10.0.9.1 port=4420 discovery_port=8009 guest_address=10.0.9.2/24
readonly nqn_rw=nqn.2026-11.io.fastice:test nqn_ro=nqn.2026-11.io.fastice:guarded
readonly host_nqn=nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-000000000001
readonly host_id=6d2a1a5e-9d43-4c11-9f0a-000000000001
readonly foreign_nqn=nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-0000000000ff
readonly foreign_id=6d2a1a5e-9d43-4c11-9f0a-0000000000ff
readonly rw_mib=64 ro_mib=4 chunk_kib=256

# --- outside: packages, image, then this script again in its own namespaces ------------------------

outer() {
    local keep=0 limit=600
    while (($#)); do
        case $1 in
            --keep) keep=1 ;;
            --timeout) limit=${2:?}; shift ;;
            -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
            *) die "unknown option $1 (see --help)" ;;
        esac
        shift
    done
    [[ $(uname -m) == x86_64 ]] || die "the guest is x86_64, this machine is $(uname -m)"
    ((EUID == 0)) || die "needs root (loop device, mount, network namespace): sudo $0"
    install_missing
    [[ -c /dev/net/tun ]] || die "no /dev/net/tun; try: modprobe tun"
    [[ -e /dev/loop-control ]] || die "no loop devices; try: modprobe loop"
    run_inside "${BASH_SOURCE[0]}" "$keep" "$limit" last
}

# --- inside: storage --------------------------------------------------------------------------------

loop='' mounted=0

# A file whose blocks lie in descending runs of 256 KiB, each followed by a run of another file: as far from
# one extent as a file system can get it, all of it written.
write_fragmented() {
    local file=$1 mib=$2 chunks i
    chunks=$((mib * 1024 / chunk_kib))
    for ((i = chunks - 1; i >= 0; i--)); do
        printf 'pwrite -q %dk %dk\n' $((i * chunk_kib)) $chunk_kib
        # The neighbour takes the blocks that would have made the next run contiguous.
        printf 'open -f -d %s\npwrite -q %dk 64k\nclose\n' "$file.filler" $((i * 64))
        printf 'file 0\n'
    done >"$work/commands"
    # xfs_io goes on after an error; what counts is the map, looked at below.
    xfs_io -f -d "$file" <"$work/commands" 2>>"$work/host.log" >/dev/null || true
    # Known bytes in the last 4 MiB, or in all of a small file.
    dd if=/dev/urandom of="$file" bs=1M seek=$((mib - 4)) count=4 oflag=direct conv=notrunc,fsync status=none
}

# One line a run: file offset, device offset, length in sectors, flags. Records that continue each other are
# joined, as the filesystem may split and join them at will.
map_of() {
    xfs_io -r -c 'bmap -vp' "$1" | awk '
        NR <= 2 { next }
        { gsub(/[^0-9.]/, "", $2); sub(/:$/, "", $3); split($2, f, "[.][.]"); split($3, d, "[.][.]"); hole = $3 == "hole" }
        { file = f[1]; device = hole ? "hole" : d[1]; count = f[2] - f[1] + 1; flags = hole ? "-" : $NF }
        n && !hole && last_device != "hole" && flags == last_flags && file == last_file + n && device == last_device + n { n += count; next }
        n { print last_file, last_device, n, last_flags }
        { last_file = file; last_device = device; n = count; last_flags = flags }
        END { if (n) print last_file, last_device, n, last_flags }'
}

make_storage() {
    truncate -s 512M "$work/xfs.img"
    mkfs.xfs -q "$work/xfs.img"
    loop=$(losetup --find --show --direct-io=on "$work/xfs.img" 2>/dev/null || losetup --find --show "$work/xfs.img")
    mkdir "$work/mnt"
    mount -t xfs "$loop" "$work/mnt"
    mounted=1
    # From now on the device goes away with its last user.
    losetup -d "$loop"
    rw_file=$work/mnt/rw.img
    ro_file=$work/mnt/ro.img
    write_fragmented "$rw_file" "$rw_mib"
    write_fragmented "$ro_file" "$ro_mib"
    sync -f "$work/mnt"
    prefill_sum=$(tail -c $((4 << 20)) "$rw_file" | md5sum | cut -d' ' -f1)
    ro_sum=$(md5sum <"$ro_file" | cut -d' ' -f1)
    map_of "$rw_file" >"$work/rw.map"
    map_of "$ro_file" >"$work/ro.map"
    (($(wc -l <"$work/rw.map") > 100)) || die "rw.img has only $(wc -l <"$work/rw.map") extents"
    [[ $(stat -c %s "$rw_file") == $((rw_mib << 20)) ]] || die "rw.img has $(stat -c %s "$rw_file") bytes"
    ! grep -qw hole "$work/rw.map" "$work/ro.map" || die "the files have holes"
    say "rw.img: $rw_mib MiB in $(wc -l <"$work/rw.map") extents on $loop"
}

drop_storage() {
    ((mounted)) || return 0
    umount "$work/mnt"
    mounted=0
}

# --- inside: network and guests ---------------------------------------------------------------------

# The target listens on the bridge; with a target in a second guest, that guest has the address.
make_network() {
    local tap
    ip link set lo up
    ip link add br0 type bridge
    for tap in tap0 tap1; do
        ip tuntap add "$tap" mode tap
        ip link set "$tap" master br0 up
    done
    ip link set br0 up
    ((target_in_guest)) || ip addr add "$address/24" dev br0
}

# make_overlay DIR ROLE GUEST_ADDRESS
make_overlay() {
    lay_overlay "$1" "$2" <<PARAMS
GUEST_ADDRESS='$3'
TARGET_ADDRESS='$address'
TARGET_PORT='$port'
DISCOVERY_PORT='$discovery_port'
NQN_RW='$nqn_rw'
NQN_RO='$nqn_ro'
HOST_NQN='$host_nqn'
HOST_ID='$host_id'
FOREIGN_NQN='$foreign_nqn'
FOREIGN_ID='$foreign_id'
RW_MIB='$rw_mib'
RO_MIB='$ro_mib'
PREFILL_SUM='$prefill_sum'
RO_SUM='$ro_sum'
$(policy_params)
WWID_PATTERN='$target_wwid_pattern'
AWAY_VERBS='$target_away_verbs'
STRICT_STATUS='$target_strict_status'
PARAMS
}

obey() {
    case $1 in
        kill-restart) target_kill && target_start ;;
        restart) target_stop && target_start ;;
        *) obey_policy "$@" ;;
    esac
}

host_sums=() fs_sum=''

guest_said() {
    case ${1:-} in
        HOSTSUM) host_sums+=("${*:2}") ;;
        FSSUM) fs_sum=$2 ;;
        *) guest_said_of_recall "$@" ;;
    esac
}

run_scenarios() {
    local code=0
    make_overlay "$work/overlay" scenario "$guest_address"
    converse --tap tap0 || code=$?
    guest_ended "$code"
}

# --- inside: judged on this side ----------------------------------------------------------------------

# A failure, unless HW_ONLY may have left the guest's part out.
left_out() {
    echo "$1"
    [[ -z ${HW_ONLY:-} ]] || return 77
    return 1
}

# refused COMMAND...: it fails, and at once.
refused() {
    local code=0
    timeout 10 "$@" || code=$?
    ((code != 0)) || { echo "went through: $*"; return 1; }
    ((code != 124)) || { echo "neither done nor refused after 10 s: $*"; return 1; }
}

# While served: what would change the map is refused, nothing has changed, and the file can be read.
pin_refuses() {
    refused truncate -s 4096 "$rw_file" && refused xfs_io -c 'fpunch 0 1m' "$rw_file" && refused rm -f "$rw_file" &&
        refused head -c 1 "$rw_file" && refused cp --reflink=always "$rw_file" "$rw_file.copy" &&
        [[ $(stat -c %s "$rw_file") == $((rw_mib << 20)) ]]
}

map_unchanged() {
    map_of "$rw_file" | diff "$work/rw.map" - && map_of "$ro_file" | diff "$work/ro.map" -
}

read_only_file_unchanged() { [[ $(md5sum <"$ro_file" | cut -d' ' -f1) == "$ro_sum" ]]; }

file_holds_what_the_guest_saw() {
    local entry offset length sum
    ((${#host_sums[@]})) || left_out "the guest named no sums" || return
    for entry in "${host_sums[@]}"; do
        read -r offset length sum <<<"$entry"
        [[ $(dd if="$rw_file" bs=64k skip=$((offset / 64)) count=$((length / 64)) status=none | md5sum | cut -d' ' -f1) == "$sum" ]] ||
            { echo "KiB $offset + $length differs"; return 1; }
    done
}

# The filesystem that the guest made, found inside the file.
guests_filesystem_intact() {
    local code=0
    [[ -n $fs_sum ]] || left_out "the guest wrote no filesystem" || return
    mkdir -p "$work/inner"
    mount -t xfs -o ro,loop,nouuid "$rw_file" "$work/inner"
    {
        [[ $(sha256sum <"$work/inner/SUMS" | cut -d' ' -f1) == "$fs_sum" ]] &&
            (cd "$work/inner" && sha256sum -c --quiet SUMS)
    } || code=1
    umount "$work/inner"
    return "$code"
}

filesystem_clean() { xfs_repair -n "$work/xfs.img"; }

cleanup() {
    trap - EXIT TERM INT HUP
    [[ -z ${target_pid:-} ]] || target_kill || true
    if ((mounted)); then
        chattr -i "$work"/mnt/*.img 2>/dev/null || true
        umount "$work/mnt" || umount -l "$work/mnt" || true
    fi
    if ((recall_mounted)); then
        chattr -i "$work"/recall/*.img 2>/dev/null || true
        umount "$work/recall" || umount -l "$work/recall" || true
    fi
    # Whatever else was started here ends with this process: it is the first of its process namespace.
}

inner() {
    work=$HW_WORK image=$HW_IMAGE
    HW_TARGET=${HW_TARGET:-fastice}
    [[ -r $here/targets/$HW_TARGET.sh ]] || die "no targets/$HW_TARGET.sh"
    trap cleanup EXIT
    trap 'exit 143' TERM INT HUP
    : >"$work/console.log"
    : >"$work/host.log"
    # shellcheck source=guest/targets/fastice.sh
    source "$here/targets/$HW_TARGET.sh"
    local started
    started=$(now_ms)
    target_check
    make_storage
    ((!target_policies)) || make_policy_storage
    make_network
    target_configure
    target_start || die "the target did not start; see $HW_CACHE/last/target.log"
    say "target ready after $((($(now_ms) - started) / 1000)) s, booting the guest"

    ((target_pins)) && judge host-pin-refuses pin_refuses
    run_scenarios
    ((target_pins)) && judge host-pin-still-refuses pin_refuses
    judge host-target-stops target_stop
    judge host-target-releases target_release
    ((!target_policies)) || judge_recall
    # What the filesystem cached before the target wrote underneath must not hide what is on the device.
    drop_storage
    judge host-filesystem-clean filesystem_clean
    mount -t xfs -o loop "$work/xfs.img" "$work/mnt" && mounted=1
    judge host-map-unchanged map_unchanged
    judge host-file-equals-namespace file_holds_what_the_guest_saw
    judge host-guests-filesystem-intact guests_filesystem_intact
    judge host-read-only-file-unchanged read_only_file_unchanged
    drop_storage
    summary "$started"
}

if [[ ${HW_INNER:-} == 1 ]]; then
    inner
else
    outer "$@"
fi
