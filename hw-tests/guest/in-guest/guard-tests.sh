# shellcheck shell=dash
# The guard of the bare-metal suite, tested on the guest's controllers: what it refuses, and what it lets through.
# SINGLE has one namespace, PAIRED several, OTHER is of another subsystem.

serial_of() { guard_first "/sys/class/nvme/$(nvme_of "$1")/serial"; }

refuses() { # PATTERN COMMAND...
    local pattern=$1
    shift
    must_fail "$@"
    cat /tmp/must_fail
    grep -qE "$pattern" /tmp/must_fail || fail "refused, but it does not say '$pattern': $*"
}

# zero DISK: all of it, past the guard: it is a disk of the guest.
zero() {
    blkdiscard -f -z "/dev/$1"
    blockdev --rereadpt "/dev/$1"
}

single() { pci_of "$SINGLE"; }
single_disk() { disk_of "$SINGLE" 1; }
mark_single() { guard_mark "$(single)" 1 "$(serial_of "$SINGLE")"; }
check() { guard_controller "$(single)"; }

t_guard_unmarked() {
    zero "$(single_disk)"
    # Blank, and still not named for any test.
    refuses 'is not marked for tests' check
    refuses 'no PCI function' guard_controller 0000:7f:1f.7
    refuses 'no NVMe controller' guard_controller 0000:00:00.0
    drive "$SINGLE" vfio-pci
    refuses "driver 'vfio-pci' has it" check
    by_kernel "$SINGLE"
}

# What a signature looks like, where the guest has no program to make it.
plant() { # DISK OFFSET PRINTF-TEXT
    # shellcheck disable=SC2059  # an escape each
    printf "$3" >/tmp/planted
    dd if=/tmp/planted of="/dev/$1" bs=1 seek="$2" conv=notrunc,fsync status=none
}

# One kind of content after the other: what is on it is refused, by name, before and after somebody would mark it.
t_guard_contents() {
    local disk seen content pattern
    disk=$(single_disk)
    seen=''
    for content in gpt dos swap ext4 xfs luks lvm raid beginning middle end; do
        zero "$disk"
        pattern=$content
        case $content in
            gpt) printf 'label: gpt\n,,\n' | sfdisk --quiet "/dev/$disk" ;;
            dos) printf 'label: dos\n,,\n' | sfdisk --quiet "/dev/$disk" ;;
            swap) mkswap "/dev/$disk" >/dev/null ;;
            ext4) mkfs.ext4 -q -F -E nodiscard -L data "/dev/$disk" ;;
            xfs) mkfs.xfs --unsupported -q -f -K -L data "/dev/$disk" ;;
            luks) plant "$disk" 0 'LUKS\272\276\000\001'; pattern=crypto_LUKS ;;
            # A physical volume's label in sector 1: its number and a checksum over its rest (CRC-32, seed 0xf597a6cf).
            lvm) plant "$disk" 512 "$LVM_LABEL"; pattern=LVM2_member ;;
            # MD superblock 1.2, 4096 bytes in: little-endian magic, version 1, and its own place in sectors.
            raid) plant "$disk" 4096 '\374\116\053\251\001'; plant "$disk" 4224 '\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\010'; pattern=linux_raid_member ;;
            # Bytes of somebody, which no program recognises; in the middle, at one of the places that are looked at.
            beginning) plant "$disk" 100 'x'; pattern='holds data' ;;
            middle) plant "$disk" $(($(guard_bytes "$disk") / 65536 / 31 * 13 * 65536 + 4711)) 'x'; pattern='holds data' ;;
            end) plant "$disk" $(($(guard_bytes "$disk") - 1)) 'x'; pattern='holds data' ;;
        esac
        refuses "$pattern" mark_single
        refuses 'is not marked' check
        seen="$seen $content"
    done
    note "refused:$seen"
    zero "$disk"
}

t_guard_mark() {
    local disk other
    disk=$(single_disk)
    zero "$disk"
    refuses 'the serial number is' guard_mark "$(single)" 1 WRONG
    refuses 'has no namespace 9' guard_mark "$(single)" 9 "$(serial_of "$SINGLE")"
    check && fail 'it passed without a mark'
    mark_single
    check
    # Marked twice: a mark is data.
    refuses 'holds data' mark_single
    # A mark that was copied from another namespace says another serial number.
    other=$(disk_of "$OTHER" 1)
    zero "$other"
    dd if="/dev/$disk" of="/dev/$other" bs=4096 count=1 skip="$(guard_mark_block "$disk")" seek="$(guard_mark_block "$other")" oflag=direct conv=notrunc status=none
    refuses 'is not marked' guard_disk "$other"
    zero "$other"
}

# Marked once, used for something else since: refused. What the tests themselves leave: let through.
t_guard_marked_contents() {
    local disk node
    disk=$(single_disk)
    check
    mkfs.ext4 -q -F -E nodiscard -L "$GUARD_LABEL" "/dev/$disk" 64m
    check
    mkfs.ext4 -q -F -E nodiscard -L data "/dev/$disk" 64m
    refuses "holds 'ext4' with label 'data'" check
    guard_wipe_by_hand "$disk"
    mkfs.xfs --unsupported -q -f -K -L "$GUARD_LABEL" -d size=64m "/dev/$disk"
    check
    guard_wipe_by_hand "$disk"
    printf 'label: dos\nstart=8192\n' | sfdisk --quiet --wipe never "/dev/$disk"
    refuses 'partition table that no test made' check
    guard_wipe_by_hand "$disk"
    node=$(make_partition "$disk")
    check
    mkswap "/dev/$node" >/dev/null
    refuses "/dev/$node holds 'swap'" check
    make_filesystem xfs "$node" 50331648
    check
    guard_wipe "$disk"
    check
    [ -z "$(guard_signatures "$disk")" ] || fail "the guard's own wipe leaves $(guard_signatures "$disk")"
}
guard_wipe_by_hand() { dd if=/dev/zero of="/dev/$1" bs=1M count=8 oflag=direct conv=notrunc,fsync status=none; blockdev --rereadpt "/dev/$1"; }

t_guard_uses() {
    local disk node loop
    disk=$(single_disk)
    node=$(make_partition "$disk")
    make_filesystem ext4 "$node" 50331648
    check
    mount -t ext4 "/dev/$node" "$MNT"
    refuses "/dev/$node is mounted on $MNT" check
    # From elsewhere too: a test must not write to it either.
    refuses "is mounted" guard_wipe "$disk"
    umount "$MNT"
    loop=$(losetup -f)
    losetup "$loop" "/dev/$node"
    refuses 'loop device' check
    losetup -d "$loop"
    exec 8<"/dev/$node"
    refuses 'open in process' check
    exec 8<&-
    check
    mkdir -p /sys/kernel/config/nvmet/subsystems/guard/namespaces/1
    printf '/dev/%s' "$node" >/sys/kernel/config/nvmet/subsystems/guard/namespaces/1/device_path
    refuses 'exported by nvmet' check
    rmdir /sys/kernel/config/nvmet/subsystems/guard/namespaces/1 /sys/kernel/config/nvmet/subsystems/guard
    check
    # The program that reads its signatures sees the swap space first; so only who uses it counts here.
    mkswap "/dev/$node" >/dev/null
    swapon "/dev/$node"
    refuses 'swapped to' guard_unused "$disk"
    swapoff "/dev/$node"
    make_filesystem ext4 "$node" 50331648
    guard_wipe "$disk"
}

# One marked namespace does not name the others of its controller.
t_guard_siblings() {
    local first
    first=$(disk_of "$PAIRED" 1)
    zero "$first"
    guard_mark "$(pci_of "$PAIRED")" 1 "$(serial_of "$PAIRED")"
    guard_disk "$first"
    refuses 'is not marked' guard_controller "$(pci_of "$PAIRED")"
    zero "$first"
}

# As the tester does it.
t_guard_command() {
    local metal
    metal=/hw/metal-test.sh
    guard_wipe "$(single_disk)" all
    refuses 'is not marked' sh $metal check "$(single)"
    refuses 'is not marked' sh $metal run "$(single)"
    refuses 'the serial number is' sh $metal mark --serial WRONG "$(single)" 1
    refuses 'usage' sh $metal mark "$(single)" 1
    sh $metal mark --serial "$(serial_of "$SINGLE")" "$(single)" 1
    sh $metal check "$(single)"
    sh $metal list
    sh $metal unmark --serial "$(serial_of "$SINGLE")" "$(single)" 1
    refuses 'is not marked' sh $metal check "$(single)"
}

guard_tests() { # SINGLE PAIRED OTHER
    SINGLE=$1 PAIRED=$2 OTHER=$3
    # "LABELONE", sector 1, its CRC, the offset of the rest (32), "LVM2 001"; then an identifier of 32 characters.
    LVM_LABEL='LABELONE\001\000\000\000\000\000\000\000\221\007\333\053\040\000\000\000LVM2 001abcdefghijklmnopqrstuvwxyz012345'
    mkdir -p "$MNT"
    run guard-unmarked 60 t_guard_unmarked
    run guard-contents 120 t_guard_contents
    run guard-mark 60 t_guard_mark
    run guard-marked-contents 90 t_guard_marked_contents
    run guard-uses 90 t_guard_uses
    run guard-siblings 60 t_guard_siblings
    run guard-command 90 t_guard_command
}
