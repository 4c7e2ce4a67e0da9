# shellcheck shell=sh disable=SC2046,SC2154  # lists of words; PCI_* and NVME_LETTERS are parameters
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
    # The kernel's driver needs no override.
    echo "$(echo "$2" | grep -vx nvme)" >"$device/driver_override"
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

# disk_of LETTER NSID: the block device that a user sees of it, e.g. nvme0n1. With native multipathing the controller
# shows a hidden path (nvme0c1n1) to it.
disk_of() {
    for path in "/sys/class/nvme/$(nvme_of "$1")/nvme"*n*; do
        found=$(basename "$path" | sed 's/c[0-9]*n/n/')
        [ "$(cat "/sys/block/$found/nsid" 2>/dev/null)" = "$2" ] && echo "$found" && return 0
    done
    return 1
}

# bound_to LETTER DRIVER
bound_to() { [ "$(driver_of "$1")" = "$2" ]; }

# take LETTER..., give LETTER...: as an operator does it.
take() { fastice device bind $(for letter; do pci_of "$letter"; done); }
give() { fastice device unbind $(for letter; do pci_of "$letter"; done); }

# by_kernel LETTER: the kernel has it, and shows its namespaces; whatever was before.
by_kernel() {
    bound_to "$1" nvme || drive "$1" nvme
    wait_for 30 controller_live "$1" || fail "the kernel does not get controller $1 back: driver '$(driver_of "$1")'"
}

# by_vfio LETTER: a process can have it.
by_vfio() { bound_to "$1" vfio-pci || take "$1" || fail "fastice device bind $1 failed"; }
