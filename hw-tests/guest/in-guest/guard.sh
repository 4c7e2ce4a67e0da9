# shellcheck shell=dash
# What may be destroyed by a test, and what may not. Nothing here trusts a name: a tester has to write a mark onto a
# namespace, with its serial number typed in, before any test writes to it.
#
#   0                                                              size - 1 MiB              size
#   |  filesystems and partition tables of the tests, labelled     | mark, 4 KiB |  zeros    |
#
# `guard_disk` lets a namespace through only if
#   - its mark says its own serial number, namespace identifier and size (the image of another one is refused);
#   - every signature on it (filesystem, partition table, RAID, LVM, encryption, swap, ...) is one that the tests leave:
#     XFS or ext4 with the label "fastice-test", a DOS partition table with identifier 0xfa571ce0;
#   - nobody uses it or a partition of it, by this controller or by another one.
# `guard_controller` lets a controller through only if all of its namespaces are so.
#
# Used by metal-test.sh on bare metal and by vfio-test.sh in the guest. Busybox sh, with wipefs and nvme-cli beside it.

GUARD_LABEL=fastice-test
GUARD_TABLE=fa571ce0
GUARD_MARK_FROM_END=1048576

guard_say() { echo "guard: $*"; }

# --- looking ---------------------------------------------------------------------------------------------

# (Little but builtins of the shell: under emulation, every process costs.)

# guard_first FILE: its first line without the blanks that sysfs pads with; nothing when there is none.
guard_first() {
    local line=''
    # shellcheck disable=SC2162  # the blanks shall go
    ! [ -r "$1" ] || read line <"$1" || true
    echo "$line"
}

guard_serial() { guard_first "/sys/block/$1/device/serial"; }
guard_nsid() { guard_first "/sys/block/$1/nsid"; }
guard_bytes() { echo $(($(guard_first "/sys/block/$1/size") * 512)); }

# guard_nvme PCI: the kernel's name of the controller there, or why there is none.
guard_nvme() {
    local function driver controller
    function=/sys/bus/pci/devices/$1
    [ -e "$function" ] || { guard_say "$1: there is no PCI function"; return 1; }
    case $(cat "$function/class") in
        0x0108*) ;;
        *) guard_say "$1: no NVMe controller (class $(cat "$function/class"))"; return 1 ;;
    esac
    driver=$(basename "$(readlink "$function/driver" || echo none)")
    [ "$driver" = nvme ] || { guard_say "$1: the driver '$driver' has it; what is on it can only be looked at through the kernel's nvme driver"; return 1; }
    for controller in "$function"/nvme/nvme*; do
        [ "$(cat "$controller/state" 2>/dev/null)" = live ] && basename "$controller" && return 0
    done
    guard_say "$1: the controller is not live"
    return 1
}

# guard_disks NVME: the block devices of its namespaces. A path (nvme0c1n2) stands for its head (nvme0n2).
guard_disks() {
    local path
    for path in "/sys/class/nvme/$1/nvme"*n*; do
        [ -e "$path" ] || continue
        basename "$path" | sed 's/c[0-9]*n/n/'
    done
}

# guard_same DISK: all block devices of the same namespace, by whatever controller: without native multipath, each shows
# its own.
guard_same() {
    local wanted_id same
    wanted_id="$(guard_serial "$1") $(guard_nsid "$1")"
    for same in /sys/block/nvme*n*; do
        [ "$(guard_first "$same/hidden")" = 0 ] && [ -e "$same/nsid" ] || continue
        same=${same##*/}
        [ "$(guard_serial "$same") $(guard_nsid "$same")" != "$wanted_id" ] || echo "$same"
    done
}

# guard_nodes DISK: it and its partitions.
guard_nodes() {
    local partition
    echo "$1"
    for partition in "/sys/block/$1/$1"p*; do
        [ ! -e "$partition/partition" ] || echo "${partition##*/}"
    done
}

# --- in use ----------------------------------------------------------------------------------------------

# guard_users NODE...: every use of these block devices, one a line; none is good.
guard_users() {
    local nodes=" $* " numbers=' ' node holder backing
    for node; do
        numbers="$numbers$(guard_first "/sys/class/block/$node/dev") "
        for holder in "/sys/class/block/$node/holders"/*; do
            [ ! -e "$holder" ] || echo "/dev/$node is held by ${holder##*/}"
        done
    done
    awk -v nodes="$nodes" -v numbers="$numbers" '
        function is_ours(path) { return sub("^/dev/", "", path) && index(nodes, " " path " ") }
        FILENAME == "/proc/swaps" { if (is_ours($1)) print $1 " is swapped to"; next }
        {
            source = ""
            for (i = 7; i < NF; i++) if ($i == "-") source = $(i + 2)
            if (index(numbers, " " $3 " ") || is_ours(source)) print source " is mounted on " $5
        }' /proc/swaps /proc/self/mountinfo || echo "the kernel's lists of mounts and swaps cannot be read"
    for backing in /sys/block/loop*/loop/backing_file /sys/kernel/config/nvmet/subsystems/*/namespaces/*/device_path; do
        [ -e "$backing" ] || continue
        node=$(guard_first "$backing")
        case $nodes in *" ${node#/dev/} "*) ;; *) continue ;; esac
        case $backing in
            */loop/*) echo "$node is under a loop device" ;;
            *) echo "$node is exported by nvmet" ;;
        esac
    done
    # shellcheck disable=SC2012  # the targets of links, for thousands of them at once
    ls -l /proc/[0-9]*/fd 2>/dev/null | awk -v nodes="$nodes" '
        /^\/proc\// { split($0, part, "/"); process = part[3] }
        NF > 1 && $(NF - 1) == "->" && sub("^/dev/", "", $NF) && index(nodes, " " $NF " ") { print "/dev/" $NF " is open in process " process }' ||
        echo "the open files of processes cannot be read"
}

guard_unused() {
    local disk users
    # What udev has open for a moment is no use.
    ! command -v udevadm >/dev/null || udevadm settle --timeout=10
    # shellcheck disable=SC2046  # lists of words
    users=$(guard_users $(for disk in $(guard_same "$1"); do guard_nodes "$disk"; done) | sort -u)
    [ -z "$users" ] || { echo "$users" | sed 's/^/guard: /'; return 1; }
    for disk in $(guard_same "$1"); do
        # Whoever claimed it in the kernel and shows nowhere (a ZFS pool, say): the kernel then refuses to look for
        # partitions again.
        blockdev --rereadpt "/dev/$disk" 2>/dev/null || { guard_say "/dev/$disk is claimed by something in the kernel"; return 1; }
    done
}

# (Reads go through the page cache, which is empty while nobody has the device open: whoever has is found otherwise. By
# the shell's own dd, which costs no exec.)

# --- the mark --------------------------------------------------------------------------------------------

guard_mark_text() {
    printf 'fastice test namespace, version 1\nserial=%s\nnsid=%s\nbytes=%s\n%s\n' "$(guard_serial "$1")" "$(guard_nsid "$1")" \
        "$(guard_bytes "$1")" 'Everything on this namespace may be destroyed by the hw-tests of fastice.'
}

guard_mark_block() { echo $((($(guard_bytes "$1") - GUARD_MARK_FROM_END) / 4096)); }

guard_is_marked() {
    guard_mark_text "$1" >/tmp/guard-expected
    command dd if="/dev/$1" bs=4096 skip="$(guard_mark_block "$1")" count=1 status=none |
        head -c "$(wc -c </tmp/guard-expected)" | cmp -s - /tmp/guard-expected
}

# guard_signatures NODE: what libblkid finds, as lines "type label"; fails when it cannot look.
guard_signatures() {
    wipefs --no-act --parsable "/dev/$1" >/tmp/guard-wipefs || return 1
    awk -F, '!/^#/ { print $4, ($3 == "" ? "-" : $3) }' /tmp/guard-wipefs
}

guard_table_id() { command dd if="/dev/$1" bs=4096 count=1 status=none | od -An -tx4 -j 440 -N 4 | tr -d ' '; }

# Whether everything that is recognised on it was left by the tests.
guard_contents_are_ours() {
    local node kind label
    for node in $(guard_nodes "$1"); do
        guard_signatures "$node" >/tmp/guard-signatures || { guard_say "/dev/$node cannot be searched for signatures"; return 1; }
        while read -r kind label; do
            case "$kind $label" in
                "xfs $GUARD_LABEL" | "ext4 $GUARD_LABEL") ;;
                "dos -")
                    [ "$(guard_table_id "$node")" = "$GUARD_TABLE" ] ||
                        { guard_say "/dev/$node holds a partition table that no test made"; return 1; }
                    ;;
                *) guard_say "/dev/$node holds '$kind' with label '$label', which no test made"; return 1 ;;
            esac
        done </tmp/guard-signatures
    done
}

# --- verdicts ----------------------------------------------------------------------------------------------

# guard_disk DISK: whether tests may destroy what is on this namespace.
guard_disk() {
    guard_is_marked "$1" || { guard_say "/dev/$1 (serial $(guard_serial "$1"), namespace $(guard_nsid "$1")) is not marked for tests"; return 1; }
    guard_contents_are_ours "$1" || return 1
    guard_unused "$1"
}

# guard_controller PCI: whether tests may take this controller.
guard_controller() {
    local nvme disks active one
    nvme=$(guard_nvme "$1") || { echo "$nvme"; return 1; }
    disks=$(guard_disks "$nvme")
    [ -n "$disks" ] || { guard_say "$1: no namespace with a block device"; return 1; }
    # A namespace that the kernel does not show (metadata, a command set) cannot be looked at.
    active=$(nvme list-ns "/dev/$nvme" | grep -c ':0x') || { guard_say "$1: cannot list its namespaces"; return 1; }
    [ "$active" = "$(echo "$disks" | wc -l)" ] || { guard_say "$1: $active namespaces are active, but the kernel shows $(echo "$disks" | wc -l)"; return 1; }
    for one in $disks; do
        guard_disk "$one" || return 1
    done
}

# --- marking -----------------------------------------------------------------------------------------------

# guard_is_blank DISK: the first and last 4 MiB and 30 places between hold nothing but zeros.
guard_is_blank() {
    local bytes pieces place
    bytes=$(guard_bytes "$1")
    pieces=$((bytes / 65536))
    {
        command dd if="/dev/$1" bs=1M count=4 status=none
        command dd if="/dev/$1" bs=64k skip=$((pieces - 64)) count=64 status=none
        place=1
        while [ "$place" -le 30 ]; do
            command dd if="/dev/$1" bs=64k skip=$((pieces / 31 * place)) count=1 status=none
            place=$((place + 1))
        done
    } | tr -d '\000' | head -c 1 >/tmp/guard-blank
    [ ! -s /tmp/guard-blank ]
}

# guard_mark PCI NSID SERIAL: the tester's consent. The namespace must be blank, and the serial number the right one.
guard_mark() {
    local nvme one
    nvme=$(guard_nvme "$1") || { echo "$nvme"; return 1; }
    for one in $(guard_disks "$nvme"); do
        [ "$(guard_nsid "$one")" = "$2" ] || continue
        [ "$(guard_serial "$one")" = "$3" ] || { guard_say "the serial number is '$(guard_serial "$one")', not '$3'"; return 1; }
        guard_unused "$one" || return 1
        [ $(($(guard_bytes "$one") % 4096)) = 0 ] && [ "$(guard_bytes "$one")" -ge 67108864 ] || { guard_say "/dev/$one is too small, or no multiple of 4096 bytes"; return 1; }
        guard_signatures "$one" >/tmp/guard-signatures || { guard_say "/dev/$one cannot be searched for signatures"; return 1; }
        [ ! -s /tmp/guard-signatures ] || { guard_say "/dev/$one holds: $(tr '\n' ';' </tmp/guard-signatures)"; return 1; }
        guard_is_blank "$one" || { guard_say "/dev/$one holds data. If it may go: blkdiscard -f /dev/$one, or nvme format"; return 1; }
        { guard_mark_text "$one"; cat /dev/zero; } | head -c 4096 >/tmp/guard-mark
        dd if=/tmp/guard-mark of="/dev/$one" bs=4096 seek="$(guard_mark_block "$one")" count=1 oflag=direct conv=notrunc,fsync status=none || return 1
        guard_is_marked "$one" || { guard_say "/dev/$one: the mark does not come back"; return 1; }
        return 0
    done
    guard_say "$1 has no namespace $2"
    return 1
}

# guard_wipe DISK: the beginning and the mark's surroundings, so that nothing of the tests is recognised. Only behind
# guard_disk. With a second argument the mark goes too.
guard_wipe() {
    guard_disk "$1" || return 1
    dd if=/dev/zero of="/dev/$1" bs=1M count=8 oflag=direct conv=notrunc,fsync status=none || return 1
    [ $# = 1 ] || dd if=/dev/zero of="/dev/$1" bs=4096 seek="$(guard_mark_block "$1")" count=1 oflag=direct conv=notrunc,fsync status=none || return 1
    blockdev --rereadpt "/dev/$1"
}
