# shellcheck shell=dash disable=SC1090,SC1091,SC2034,SC2154  # sourced by main.sh; parameters
# Role: the scenarios of fastice's own driver on the controllers of nvme-machine.sh. PART says which of two guests this
# is: `order` has everything that goes its regular way, `faults` what breaks a controller.
NSID=1
for part in guard devices storage serve live handover device-command pair faults guard-tests; do
    . "/hw/$part.sh"
done

# All controllers begin with the kernel, as on any host.
modprobe -a xfs ext4 nvme-tcp loop nvmet
start_nvme ''
export NVME_HOSTNQN="$HOST_NQN"
mkdir -p "$MNT" "$FASTICE_STATE_DIR"
mount -t configfs config /sys/kernel/config 2>/dev/null

# mark_all LETTER...: names every namespace of a controller for the tests.
mark_all() {
    for letter; do
        for nsid in $(namespaces_of "$letter" | cut -d' ' -f2); do
            guard_mark "$(pci_of "$letter")" $((nsid)) "$(guard_first "/sys/class/nvme/$(nvme_of "$letter")/serial")" || fail "cannot mark namespace $nsid of $letter"
        done
    done
}

# live_cases: each filesystem with each block size, whole namespaces and partitions; with LONG every combination.
live_cases() {
    live_case xfs-512 xfs A B 1 whole
    live_case ext4-4096 ext4 A B 2 whole
    live_case ext4-512-partition ext4 A B 3 partition
    live_case xfs-4096-partition xfs A B 4 partition
    [ "$LONG" = 1 ] || return 0
    live_case ext4-512 ext4 A B 1 whole
    live_case xfs-4096 xfs A B 2 whole
    live_case xfs-512-partition xfs A B 3 partition
    live_case ext4-4096-partition ext4 A B 4 partition
}

# needs_driver PREFIX COMMAND...: what cannot be shown through the kernel's driver is skipped in a test of these scripts.
needs_driver() {
    prefix=$1
    shift
    if [ "$DEVICE" = nvme ]; then "$@"; else ! wanted "$prefix" || tell "RESULT $prefix SKIP needs fastice's own driver, not device = \"$DEVICE\""; fi
}

order() {
    guard_tests E A C
    run mark 180 mark_all A C E
    device_tests A B E
    [ "$DEVICE" != nvme ] || run take-B-D 60 take B D
    live_cases
    pair_case A B C D
    needs_driver handover run handover-while-mounted 90 handover_mounted A B
    case_end
    needs_driver handover handover_case xfs xfs E 1 whole
    [ "$LONG" != 1 ] || needs_driver handover handover_case ext4-partition ext4 E 1 partition
    [ "$LONG" != 1 ] || needs_driver metal metal_runs
}

# The bare-metal suite, as an operator runs it. With two controllers one live case is enough: the others are above.
metal_runs() {
    run metal-run-single 300 metal_run '' "$PCI_E"
    # As the cases above left it.
    ! bound_to B vfio-pci || give B
    by_kernel B
    run metal-run-pair 600 metal_run '^(device|live-ext4-partition|reset)-' "$PCI_B" "$PCI_A"
}

# metal_run REGEX PCI...: its summary is the remark.
metal_run() {
    local code=0 only=$1
    shift
    HW_ONLY=$only sh /hw/metal-test.sh run "$@" >/tmp/metal || code=$?
    # For the reader of the console log.
    cat /tmp/metal >/dev/console
    [ $code = 0 ] || fail "$(grep -E '^(\[[0-9.]*\] )?RESULT [^ ]+ FAIL|^guard:' /tmp/metal | head -n 3)"
    note "$(tail -n 1 /tmp/metal)"
}

faults() {
    run mark 180 mark_all A C
    [ "$DEVICE" != nvme ] || run take-B-D 60 take B D
    needs_driver fault fault_case A B C D 1
    # For the reader of the console log: what was noticed when.
    [ ! -s "$SERVE_LOG" ] || cat "$SERVE_LOG"
}

# What the kernel says when filesystems, partitions and controllers come and go in good order.
KLOG_DEVICES='XFS [(]nvme[0-9n]+(p[0-9]+)?[)]: (Mounting|Ending clean mount|Unmounting)|EXT4-fs [(]nvme[0-9n]+(p[0-9]+)?[)]: (un)?mount(ed|ing) filesystem|nvme[0-9n]+: p1|nvme nvme[0-9]+: (pci function|[0-9]+/0/0 default/read/poll queues|Ignoring bogus Namespace Identifiers)|nvmet: adding nsid|Adding [0-9]+k swap on|Using fanotify permission checks may lead to deadlock'
# And when they do not, in the guest that breaks them.
KLOG_FENCED='critical target error, dev nvme[0-9cn]+|nvme[0-9cn]+: I/O Cmd[(]0x[12][)] @ LBA [0-9]+, [0-9]+ blocks, I/O Error [(]sct 0x0 / sc 0x82[)]|callbacks suppressed|nvme [0-9a-f:.]+: enabling device|pcieport .*: pciehp: Slot|drop_caches'
[ "$PART$LONG" = order0 ] || KLOG_DEVICES="$KLOG_DEVICES|$KLOG_AWAY|$KLOG_FENCED"

klog_mark
$PART
run "klog-$PART" 20 klog_judge "$KLOG_DEVICES"
# After the log was judged: the host's I/O has nowhere to go and fails, as it must.
[ "$PART" = order ] || needs_driver killed killed_case A B 2
