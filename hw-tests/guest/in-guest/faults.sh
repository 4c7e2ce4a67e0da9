# shellcheck shell=dash disable=SC2086,SC3028  # loads are lists of words; busybox has RANDOM
# The controller is reset, vanishes, is unplugged and plugged in again while a host writes.
#
# While it is away the export is fenced: the host may get errors, or wait. What must hold: fastice lives, another
# export on another controller is served as if nothing had happened, and when the controller is back, so is the
# export, by itself, with every write that was acknowledged.

# The load: single blocks, one after the other, whose content names the round and the place. What was acknowledged is
# noted. (fio would have no answer to "either of two".) Beside it fio reads at depth, whatever happens.
block_of_load() { printf '%-4096s' "write $2 of block $1" >/tmp/case/block; }

fault_load() {
    local disk number=0 place
    trap '' PIPE
    disk=$(host_disk live)
    while [ ! -e /tmp/case/load-end ]; do
        number=$((number + 1))
        place=$((2048 + number % 2048))
        block_of_load $place $number
        if timeout 100 /bin/dd if=/tmp/case/block of="$disk" bs=4k seek=$place count=1 oflag=direct conv=notrunc status=none 2>/dev/null; then
            echo "$place $number" >>/tmp/case/acknowledged
        else
            # Neither the old nor the new content can be relied upon.
            echo "$place -" >>/tmp/case/acknowledged
            echo "$number" >>/tmp/case/load-errors
            usleep 100000
        fi
    done
}

load_start() {
    rm -f /tmp/case/load-end
    : >/tmp/case/acknowledged
    : >/tmp/case/load-errors
    fault_load >/tmp/case/load 2>&1 &
    echo $! >/tmp/case/load-pid
    (trap '' PIPE; fio --name=deep --filename="$(host_disk live)" --rw=randread --bs=4k --size=8m --iodepth=16 --ioengine=libaio --direct=1 --thread \
        --time_based --runtime=100 --continue_on_error=all --minimal --output=/tmp/case/deep) >/dev/null 2>&1 &
    echo $! >/tmp/case/deep-pid
    wait_for 60 test -s /tmp/case/acknowledged || { ps | grep -E 'dd|fio|fastice'; fail "the load does not run: $(cat /tmp/case/load)"; }
}

load_end() {
    touch /tmp/case/load-end
    kill "$(cat /tmp/case/deep-pid)" 2>/dev/null || true
    wait_for 110 load_gone || fail "the load's last write did not end"
}
load_gone() { ! kill -0 "$(cat /tmp/case/load-pid)" 2>/dev/null; }

# acknowledged_are_on FILE: the last acknowledged content of each place is there.
acknowledged_are_on() {
    local place number
    awk '{ last[$1] = $2 } END { for (place in last) if (last[place] != "-") print place, last[place] }' /tmp/case/acknowledged >/tmp/case/last
    [ -s /tmp/case/last ] || fail "nothing was acknowledged"
    while read -r place number; do
        block_of_load "$place" "$number"
        dd if="$1" bs=4k skip="$place" count=1 iflag=direct status=none | cmp -s - /tmp/case/block || fail "block $place does not hold what write $number of it was acknowledged for"
    done </tmp/case/last
}

# The other export is served, and at a usual pace.
other_is_served() { timeout 10 /bin/dd if="$(host_disk other)" of=/dev/null bs=64k count=16 skip=$((RANDOM % 64)) iflag=direct status=none; }

# back_again WHAT: by itself.
back_again() {
    local t0 back
    t0=$(cut -d. -f1 /proc/uptime)
    wait_for 90 host_reads live || { tail -n 4 "$SERVE_LOG"; fail "no I/O 90 s after $1"; }
    wait_for 30 host_live live || fail "the host's controller is not live after $1"
    back=$(($(cut -d. -f1 /proc/uptime) - t0))
    # Some of the load lands on the returned device.
    sleep 2
    load_end
    serve_running || fail "fastice is gone"
    acknowledged_are_on "$(host_disk live)"
    note "I/O again after $back s; $(grep -vc -- - /tmp/case/acknowledged) writes acknowledged, $(wc -l </tmp/case/load-errors) failed"
}

# fault_reset LETTER [OTHER]: the function is reset behind the driver's back: queues and all are gone. OTHER is 1 where
# another export is served beside it.
fault_reset() {
    # Bare metal may have functions that cannot be reset by themselves.
    [ -e "/sys/bus/pci/devices/$(pci_of "$1")/reset" ] || skip "the kernel knows no way to reset $(pci_of "$1")"
    load_start
    echo "resetting after $(wc -l </tmp/case/acknowledged) writes"
    echo 1 >"/sys/bus/pci/devices/$(pci_of "$1")/reset"
    echo "reset"
    [ "${2:-}" != 1 ] || other_is_served || fail "the other export suffers"
    back_again 'the reset'
}

# port_of LETTER: the config space of the root port above.
port_of() { echo "$(dirname "$(readlink -f "/sys/bus/pci/devices/$(pci_of "$1")")")/config"; }

# decoding LETTER on|off: the port's memory space enable, bit 1 of Command (4). Off, all below reads as ones and takes
# no write, as with a device that was pulled.
decoding() {
    local port value
    port=$(port_of "$1")
    value=$(dd if="$port" bs=1 skip=4 count=1 status=none | od -An -tu1 | tr -d ' ')
    if [ "$2" = off ]; then value=$((value & ~2)); else value=$((value | 2)); fi
    # shellcheck disable=SC2059  # an octal escape
    printf "\\$(printf %o $value)" | dd of="$port" bs=1 seek=4 conv=notrunc status=none
}

# fenced_since NUMBER: fastice has fenced an export since its log had so many lines.
fenced_since() { tail -n +$(($1 + 1)) "$SERVE_LOG" | grep 'export fenced' | grep -q "$(nqn_of live)"; }

# fault_vanish LETTER: no warning at all. It comes back only when the export is fenced.
fault_vanish() {
    local lines t0 noticed='' usual
    load_start
    lines=$(wc -l <"$SERVE_LOG")
    t0=$(cut -d. -f1 /proc/uptime)
    decoding "$1" off
    ! wait_for 100 fenced_since "$lines" || noticed=$(($(cut -d. -f1 /proc/uptime) - t0))
    other_is_served && serve_running && usual=1 || usual=
    decoding "$1" on
    [ -n "$noticed" ] || fail "100 s after the controller vanished its export is not fenced"
    [ -n "$usual" ] || fail "the other export suffers, or fastice is gone"
    back_again 'the return'
    note "fenced after $noticed s$(note_of)"
}

is_there() { [ -e "/sys/bus/pci/devices/$(pci_of "$1")" ]; }
is_away() { ! is_there "$1"; }

# fault_unplug LETTER: the orderly way. The kernel asks fastice to let go, and the slot is emptied only then.
fault_unplug() {
    load_start
    host_cmd unplug "$1" || fail "QEMU does not unplug"
    wait_for 60 is_away "$1" || { tail -n 4 "$SERVE_LOG"; fail "fastice does not let go of the controller"; }
    host_cmd unplugged "$1" || fail "QEMU has not seen it go"
    other_is_served || fail "the other export suffers"
    serve_running || fail "fastice is gone"
    sleep 2
    host_cmd plug "$1" || fail "QEMU does not plug it in"
    wait_for 30 is_there "$1" || fail "the kernel does not see it"
    # A new function: the kernel's driver has it, until the operator gives it to VFIO.
    wait_for 30 controller_live "$1" || fail "the kernel's driver does not take it"
    ! timeout 20 host_reads live || fail "the export is served although nobody has given the controller back"
    take "$1"
    back_again 'the controller was given to VFIO again'
}

fault_stop() {
    dd if="$(host_disk live)" of=/tmp/case/image bs=1M iflag=direct status=none
    dd if="$(host_disk other)" of=/tmp/case/other-image bs=1M iflag=direct status=none
    host_detach live
    host_detach other
    serve_stop
}

# The file, through its filesystem, holds what the initiator saw last and what was acknowledged; says how many blocks.
fault_compare_one() {
    local equal
    drop_page_cache
    equal=$(same_blocks /tmp/case/image "$MNT/served.img") || fail "the file through its filesystem: $equal"
    acknowledged_are_on "$MNT/served.img"
    md5sum <"$MNT/served.img.filler" | cmp -s - /tmp/case/filler || fail "the neighbour's blocks changed"
    note "$equal"
}

fault_compare() {
    local first second
    fault_compare_one
    first=$(note_of)
    second=$(same_blocks /tmp/case/other-image "$MNT2/other.img") || fail "the second file: $second"
    note "first file:${first#,}; second file: $second"
}

# fault_case KERNEL VFIO OTHER-KERNEL OTHER-VFIO PLUG: PLUG is 1 where a controller can be unplugged.
fault_case() {
    chain fault \
        "filesystems 120 pair_begin $1 $3" \
        "serve 90 pair_serve $2 $4" \
        "reset 260 fault_reset $2 1" \
        "${5:+vanish 400 fault_vanish $2}" \
        "${5:+unplug 360 fault_unplug $2}" \
        "stop 120 fault_stop" \
        "blocks 120 fault_compare" \
        "map 30 case_map_unchanged" \
        "fsck 90 pair_clean"
    touch /tmp/case/load-end 2>/dev/null || true
    pair_end
}

# reset_case KERNEL VFIO NSID: the part of it that any machine can do, with one export.
reset_case() {
    chain reset \
        "filesystem 90 case_begin xfs $1 $3 whole" \
        "serve 90 case_serve $2" \
        "under-io 260 fault_reset $2" \
        "stop 90 case_stop" \
        "blocks 120 fault_compare_one" \
        "map 30 case_map_unchanged" \
        "fsck 60 case_clean"
    touch /tmp/case/load-end 2>/dev/null || true
    case_end
}
