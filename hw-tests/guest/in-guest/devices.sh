# shellcheck shell=sh disable=SC2154  # PCI_* and NVME_LETTERS are parameters
# Guest side: NVMe controllers by their letters (see nvme-machine.sh), and who drives them.

pci_of() { eval "echo \$PCI_$1"; }

# driver_of LETTER: nvme, vfio-pci, or nothing.
driver_of() { basename "$(readlink "/sys/bus/pci/devices/$(pci_of "$1")/driver")" 2>/dev/null; }

# group_of LETTER: number of the IOMMU group.
group_of() { basename "$(readlink "/sys/bus/pci/devices/$(pci_of "$1")/iommu_group")"; }

# drive LETTER DRIVER: hands the controller to another driver (nvme, vfio-pci, or none). Before anything is loaded,
# this only sets who will take it.
drive() {
    device=/sys/bus/pci/devices/$(pci_of "$1")
    [ ! -e "$device/driver" ] || pci_of "$1" >"$device/driver/unbind"
    echo "$2" >"$device/driver_override"
    [ "$2" = none ] || pci_of "$1" >/sys/bus/pci/drivers_probe
}

# start_nvme LETTERS: these go to VFIO, all others to the kernel, which is waited for.
start_nvme() {
    modprobe vfio_iommu_type1
    modprobe vfio-pci
    for letter in $NVME_LETTERS; do
        case " $1 " in *" $letter "*) drive "$letter" vfio-pci ;; esac
    done
    modprobe nvme
    for letter in $NVME_LETTERS; do
        case " $1 " in
            *" $letter "*) ;;
            *) wait_for 30 controller_live "$letter" || echo "controller $letter is not live: driver '$(driver_of "$letter")'" ;;
        esac
    done
}

# nvme_of LETTER: the kernel's name of the controller, e.g. nvme0.
nvme_of() {
    for c in "/sys/bus/pci/devices/$(pci_of "$1")"/nvme/nvme*; do
        [ -e "$c" ] && basename "$c" && return 0
    done
    return 1
}

controller_live() { [ "$(cat "/sys/class/nvme/$(nvme_of "$1")/state")" = live ]; }

# disk_of LETTER NSID: the block device that a user sees of it, e.g. nvme0n1.
disk_of() {
    subsystem=$(cat "/sys/class/nvme/$(nvme_of "$1")/subsysnqn")
    block_of "$subsystem" "$2"
}
