# shellcheck shell=dash
# `fastice device`: what it shows, what it takes and gives back, and what it refuses to take.

refused_as() { # EXIT-STATUS PATTERN COMMAND...
    local status=$1 pattern=$2 code=0
    shift 2
    "$@" >/tmp/refused 2>&1 || code=$?
    cat /tmp/refused
    [ $code = "$status" ] || fail "exit status $code instead of $status: $*"
    grep -qE "$pattern" /tmp/refused || fail "it does not say '$pattern': $*"
}

# while_open FILE COMMAND...: another process has FILE open while COMMAND runs.
while_open() {
    local holder code=0
    exec 8<>"$1"
    sleep 60 &
    holder=$!
    exec 8>&-
    shift
    ("$@") || code=$?
    kill $holder
    wait $holder || true
    return $code
}

t_device_list() {
    local letter
    fastice device list --json >/tmp/list
    for letter in $NVME_LETTERS; do
        grep -q "\"address\": \"$(pci_of "$letter")\"" /tmp/list || fail "$(pci_of "$letter") is not listed"
    done
    fastice device list
}

mount_on() { # LETTER NSID
    local mounted
    mounted=$(scratch "$1" "$2")
    guard_wipe "$mounted"
    make_filesystem xfs "$mounted" "$(room_of "$mounted")"
    mount -t xfs "/dev/$mounted" "$MNT"
    date >"$MNT/date"
}
unmount_all() { ! grep -q " $MNT " /proc/mounts || umount "$MNT"; }

still_mounted() {
    bound_to "$1" nvme || fail "controller $1 was taken: driver '$(driver_of "$1")'"
    dd if=/dev/urandom of="$MNT/more" bs=64k count=4 oflag=direct status=none
    sync
}

# t_last_path_single LETTER: the only controller of a mounted filesystem.
t_last_path_single() {
    mount_on "$1" "$NSID"
    refused_as 3 "$MNT" fastice device bind "$(pci_of "$1")"
    refused_as 3 "$MNT" fastice device bind --dry-run "$(pci_of "$1")"
    still_mounted "$1"
    umount "$MNT"
}

# t_other_uses LETTER: nothing is mounted, but the disk is used all the same.
t_other_uses() {
    local disk node loop
    disk=$(scratch "$1" "$NSID")
    guard_wipe "$disk"
    while_open "/dev/$disk" refused_as 3 'is open in process' fastice device bind "$(pci_of "$1")"
    # As nvme-cli has it.
    while_open "/dev/$(nvme_of "$1")" refused_as 3 'is open in process' fastice device bind "$(pci_of "$1")"
    # (The guard's room: the mark is not swapped over.)
    node=$(make_partition "$disk")
    mkswap "/dev/$node"
    swapon "/dev/$node"
    refused_as 3 'swap' fastice device bind "$(pci_of "$1")"
    swapoff "/dev/$node"
    dd if=/dev/zero of="/dev/$node" bs=64k count=1 oflag=direct conv=notrunc status=none
    loop=$(losetup -f)
    losetup "$loop" "/dev/$node"
    refused_as 3 'loop' fastice device bind "$(pci_of "$1")"
    losetup -d "$loop"
    guard_wipe "$disk"
    bound_to "$1" nvme || fail "it was taken"
}

# t_second_path KERNEL OTHER: one of two may go, the last one not; nor both at once.
t_second_path() {
    mount_on "$1" "$NSID"
    refused_as 3 "$MNT" take "$1" "$2"
    bound_to "$2" nvme || fail "controller $2 was taken although the other could not be"
    still_mounted "$1"
    take "$2"
    bound_to "$2" vfio-pci || fail "the driver of $2 is '$(driver_of "$2")'"
    still_mounted "$1"
    refused_as 3 "$MNT" take "$1"
    still_mounted "$1"
}

# t_give_back KERNEL OTHER: after the unmount the last one may go too; both come back with all they had.
t_give_back() {
    local before
    umount "$MNT"
    before=$(sort /tmp/namespaces)
    take "$1"
    bound_to "$1" vfio-pci || fail "the driver of $1 is '$(driver_of "$1")'"
    give "$1" "$2"
    bound_to "$1" nvme && bound_to "$2" nvme || fail "the drivers are '$(driver_of "$1")' and '$(driver_of "$2")'"
    wait_for 20 disk_of "$1" "$NSID"
    [ "$(namespaces_of "$1"; namespaces_of "$2")" = "$before" ] || fail "the namespaces are not those of before"
    mount -t xfs "/dev/$(disk_of "$1" "$NSID")" "$MNT"
    [ -s "$MNT/date" ] || fail "a file is gone"
    umount "$MNT"
    # Given back once more, nothing happens.
    give "$1" "$2"
    bound_to "$1" nvme || fail "giving back twice took it"
}

# namespaces_of LETTER: lines "letter nsid".
namespaces_of() {
    nvme list-ns "/dev/$(nvme_of "$1")" | sed -n "s/.*:\(0x[0-9a-f]*\).*/$1 \1/p" | sort
}

# facts_of LETTER: what the kernel's driver says of it, as lines "what value".
facts_of() {
    local nvme word nsid
    nvme=/sys/class/nvme/$(nvme_of "$1")
    for word in serial model firmware_rev; do
        echo "$word \"$(guard_first "$nvme/$word")\""
    done
    for nsid in $(namespaces_of "$1" | cut -d' ' -f2); do
        echo "bytes-of-namespace-$((nsid)) : $(guard_bytes "$(disk_of "$1" $((nsid)))")"
    done
}

# t_probe LETTER KERNEL: what our driver says of the controller that VFIO has is what the kernel's says of the other one
# of its subsystem; or said of the same one before, where both letters are the same.
t_probe() {
    local what value
    facts_of "$2" >/tmp/facts
    grep -q '^bytes-of' /tmp/facts || fail "the kernel shows no namespace of $2"
    take "$1"
    fastice device probe --json "$(pci_of "$1")" >/tmp/probe
    cat /tmp/probe
    while read -r what value; do
        awk -v value="$value" '{ sub(/,$/, "") } substr($0, length($0) - length(value) + 1) == value { found = 1 } END { exit !found }' /tmp/probe ||
            fail "it does not say $what '$value'"
    done </tmp/facts
    fastice device probe "$(pci_of "$1")"
}

# t_probe_alone LETTER: the only controller of its subsystem, which then comes back as it was.
t_probe_alone() {
    t_probe "$1" "$1"
    give "$1"
    bound_to "$1" nvme || fail "the driver is '$(driver_of "$1")'"
    wait_for 20 facts_are "$1" || { facts_of "$1"; fail "the kernel says other things of it than before"; }
}
facts_are() { [ "$(facts_of "$1")" = "$(cat /tmp/facts)" ]; }

# t_held LETTER: with VFIO, and in a process: it is left to that one.
t_held() {
    local group
    fastice device bind --dry-run "$(pci_of "$1")" >/tmp/dry-run
    grep -q 'echo vfio-pci >' /tmp/dry-run || fail "the dry run does not say what it would do: $(cat /tmp/dry-run)"
    bound_to "$1" nvme || fail "the dry run took it"
    take "$1"
    group=/dev/vfio/$(group_of "$1")
    while_open "$group" refused_as 3 'in use' fastice device probe "$(pci_of "$1")"
    while_open "$group" refused_as 3 'is in use by process' fastice device unbind "$(pci_of "$1")"
    bound_to "$1" vfio-pci || fail "it was given away"
    give "$1"
    bound_to "$1" nvme || fail "the driver is '$(driver_of "$1")'"
}

# t_half_way LETTER: the override is set and the driver gone, as after a crash in the middle.
t_half_way() {
    take "$1"
    pci_of "$1" >/sys/bus/pci/drivers/vfio-pci/unbind
    fastice device list >/tmp/list
    grep -q 'was cut short' /tmp/list || fail "the list does not say it: $(cat /tmp/list)"
    give "$1"
    bound_to "$1" nvme || fail "the driver is '$(driver_of "$1")'"
    [ "$(cat "/sys/bus/pci/devices/$(pci_of "$1")/driver_override")" = '(null)' ] || fail "the override stayed"
    ! ls "$FASTICE_STATE_DIR"/devices/*.json 2>/dev/null || fail "a record stayed"
}

# Only in a guest: these are pages of the whole machine.
t_hugepages() {
    local before
    before=$(cat /proc/sys/vm/nr_hugepages)
    fastice device hugepages --count $((before + 8))
    [ "$(cat /proc/sys/vm/nr_hugepages)" = $((before + 8)) ] || fail "not $((before + 8)) pages but $(cat /proc/sys/vm/nr_hugepages)"
    refused_as 3 'would leave too little' fastice device hugepages --count 200000
    [ "$(cat /proc/sys/vm/nr_hugepages)" = $((before + 8)) ] || fail "the refused number changed something"
    fastice device hugepages --count "$before" --node 0 --persist >/tmp/hugepages
    grep -q "asks for $before at each boot" /tmp/hugepages || fail "it does not say what was made persistent: $(cat /tmp/hugepages)"
    [ "$(cat /proc/sys/vm/nr_hugepages)" = "$before" ] || fail "not $before pages again"
}

device_tests() { # KERNEL OTHER SINGLE
    namespaces_of "$1" >/tmp/namespaces
    namespaces_of "$2" >>/tmp/namespaces
    run device-list 30 t_device_list
    run device-last-path-single 60 t_last_path_single "$3"
    unmount_all
    run device-other-uses 60 t_other_uses "$3"
    chain device \
        "second-path 60 t_second_path $1 $2" \
        "give-back 60 t_give_back $1 $2"
    unmount_all
    by_kernel "$1"
    by_kernel "$2"
    run device-probe 60 t_probe "$2" "$1"
    give "$2"
    by_kernel "$2"
    run device-held 60 t_held "$3"
    run device-half-way 60 t_half_way "$3"
    by_kernel "$3"
    run device-hugepages 60 t_hugepages
}
