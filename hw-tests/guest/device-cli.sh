# shellcheck shell=sh disable=SC2154,SC3045  # in the guest: PCI_* are parameters, the functions those of devices.sh
# Goal: `fastice device` on a real kernel: controllers change hands only when nothing loses its last path, and come
# back with what was on them, also from half way.
#
#   hw-tests/vfio-test.sh --vfio '' --with hw-tests/guest/device-cli.sh --with target/debug/fastice \
#       --setup '. /root/device-cli.sh' --run true
#
# Prints a line for each check; the first that fails ends it with 1.
fastice=/root/fastice
export FASTICE_STATE_DIR=/var/lib/fastice

die() {
    echo "FAIL  $*"
    cat /tmp/out
    exit 1
}

# exits STATUS TEXT COMMAND...: the command ends so, and says so.
exits() {
    wanted=$1 text=$2
    shift 2
    "$@" >/tmp/out 2>&1
    code=$?
    [ "$code" = "$wanted" ] || die "exit $code, not $wanted: $*"
    grep -qF -- "$text" /tmp/out || die "does not say '$text': $*"
    echo "ok    $* ($wanted: $text)"
}

# is DRIVER LETTER
is() { [ "$(driver_of "$2")" = "$1" ] || die "controller $2 is with '$(driver_of "$2")', not $1"; }

# held FILE COMMAND...: while a process has FILE open.
held() {
    sleep 100 <>"$1" &
    holder=$!
    shift
    "$@"
    kill $holder
    wait $holder 2>/dev/null
}

# Past the page cache, which would not see what another path wrote.
sum_of_disk() {
    echo 3 >/proc/sys/vm/drop_caches
    md5sum <"$(disk "$1")"
}

disk() { echo "/dev/$(disk_of "$1" 1)"; }

# filesystem_on LETTER DIRECTORY: with a file of the letter.
filesystem_on() {
    mkdir -p "$2"
    mkfs.xfs --unsupported -q "$(disk "$1")" 2>/tmp/out || die "no XFS on $1"
    mount "$(disk "$1")" "$2" || die "the XFS on $1 cannot be mounted"
    echo "$1" >"$2/file"
    sync
}

filesystem_on A /mnt
filesystem_on E /mnt2

echo "--- what is mounted keeps its last path"
exits 3 'is mounted on /mnt2 (xfs), and no other live path' $fastice device bind "$PCI_E"
exits 3 'is mounted on /mnt (xfs), and no other live path' $fastice device bind "$PCI_A" "$PCI_B"
is nvme A && is nvme B && is nvme E
exits 0 'echo vfio-pci >' $fastice device bind --dry-run "$PCI_B"
is nvme B
exits 0 "taken (driver before: nvme)" $fastice device bind "$PCI_B"
is vfio-pci B && is nvme A
exits 0 'is with VFIO already (driver before: nvme)' $fastice device bind "$PCI_B"
exits 3 'no other live path' $fastice device bind "$PCI_A"
echo more >>/mnt/file || die "the filesystem on A is not what it was"
sync

echo "--- driven beside the mounted filesystem"
before=$(sum_of_disk A)
exits 0 'namespace 4  96 MiB  4096 B blocks' $fastice device probe "$PCI_B"
[ "$before" = "$(sum_of_disk A)" ] || die "the probe changed the namespace"
held "/dev/vfio/$(group_of B)" exits 3 'in use' $fastice device probe "$PCI_B"
held "/dev/vfio/$(group_of B)" exits 3 'is in use by process' $fastice device unbind "$PCI_B"
exits 0 'given back, driver nvme' $fastice device unbind "$PCI_B"
exits 0 'was not taken' $fastice device unbind "$PCI_B"
is nvme B

echo "--- handed over, and back"
umount /mnt2
held "$(disk E)" exits 3 'is open in process' $fastice device bind "$PCI_E"
held "/dev/$(nvme_of E)" exits 3 'is open in process' $fastice device bind "$PCI_E"
exits 0 'taken' $fastice device bind "$PCI_E"
exits 0 'namespace 1' $fastice device probe "$PCI_E" --seconds 0
exits 0 'given back' $fastice device unbind "$PCI_E"
mount "$(disk E)" /mnt2 || die "E came back without its filesystem"
[ "$(cat /mnt2/file)" = E ] || die "E came back without its file"
umount /mnt2
xfs_repair -n "$(disk E)" >/tmp/out 2>&1 || die "the XFS on E is not clean"

echo "--- from half way: the override is set, the driver gone, as after a crash"
exits 0 'taken' $fastice device bind "$PCI_E"
echo "$PCI_E" >/sys/bus/pci/drivers/vfio-pci/unbind
exits 0 'was cut short' $fastice device list
exits 0 'given back' $fastice device unbind "$PCI_E"
is nvme E
[ "$(cat "/sys/bus/pci/devices/$PCI_E/driver_override")" = '(null)' ] || die "the override stayed"
[ -z "$(ls $FASTICE_STATE_DIR/devices/*.json 2>/dev/null)" ] || die "a record stayed"

echo "--- hugepages"
exits 0 '80 wanted' $fastice device hugepages --count 80
[ "$(cat /proc/sys/vm/nr_hugepages)" = 80 ] || die "not 80 pages"
exits 3 'would leave too little' $fastice device hugepages --count 200000
exits 0 'asks for 64 at each boot' $fastice device hugepages --count 64 --node 0 --persist
umount /mnt
if dmesg | grep -iE 'DMAR.*fault|hung task|Corruption'; then die "the kernel complains"; fi
echo "all of fastice device passed"
