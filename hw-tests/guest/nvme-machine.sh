# shellcheck shell=bash disable=SC2034,SC2154  # joined to vfio-test.sh by the names of variables
# The NVMe side of the guest in which fastice itself runs: three subsystems, five controllers.
#
#   s0   A 0000:01:00.0   B 0000:02:00.0    four shared namespaces, see below: A for the kernel, B for VFIO
#   s1   C 0000:03:00.0   D 0000:04:00.0    one shared namespace: C for the kernel, D for VFIO
#   s2   E 0000:05:00.0                     one namespace and no second path: for handed-over mode
#
# Every controller sits behind a root port of its own: each gets its own IOMMU group, and can be plugged.
#
#   nsid of s0        1     2     3     4
#   block size      512  4096   512  4096

readonly nvme_letters=(A B C D E)
readonly -A nvme_subsystem_of=([A]=s0 [B]=s0 [C]=s1 [D]=s1 [E]=s2)
# subsystem nsid block-size MiB
readonly nvme_namespaces=(
    's0 1 512 96'
    's0 2 4096 96'
    's0 3 512 96'
    's0 4 4096 96'
    's1 1 512 96'
    's2 1 512 96'
)

nvme_pci_of() { # LETTER
    local i
    for i in "${!nvme_letters[@]}"; do
        [[ ${nvme_letters[i]} != "$1" ]] || printf '0000:%02x:00.0' "$((i + 1))"
    done
}

# The serial number must be the same on all controllers of a subsystem, or QEMU refuses.
nvme_serial_of() { printf 'FASTICE-%s' "${nvme_subsystem_of[$1]}"; }

# nvme_device LETTER: the controller as QEMU's -device takes it.
nvme_device() { printf 'nvme,id=%s,bus=port%s,serial=%s,subsys=%s,max_ioqpairs=8' "$1" "$1" "$(nvme_serial_of "$1")" "${nvme_subsystem_of[$1]}"; }

# nvme_machine DIR: fills machine_options (words for run-guest.sh). The namespaces are sparse files in DIR.
nvme_machine() {
    local letter subsystem nsid block mib drive i=0 known=' ' words=()
    for letter in "${nvme_letters[@]}"; do
        i=$((i + 1))
        subsystem=${nvme_subsystem_of[$letter]}
        words+=(-device "pcie-root-port,id=port$letter,bus=pcie.0,chassis=$i,slot=$i,addr=$(printf '%x' $((i + 1))).0")
        [[ $known == *" $subsystem "* ]] || words+=(-device "nvme-subsys,id=$subsystem,nqn=$subsystem")
        words+=(-device "$(nvme_device "$letter")")
        known+="$subsystem "
    done
    for i in "${!nvme_namespaces[@]}"; do
        read -r subsystem nsid block mib <<<"${nvme_namespaces[i]}"
        drive=$1/$subsystem-$nsid.img
        truncate -s "${mib}M" "$drive"
        words+=(-drive "id=$subsystem-$nsid,if=none,file=$drive,format=raw,cache=unsafe")
        # `bus` names one controller of the subsystem; `shared` shows the namespace to all of them.
        for letter in "${nvme_letters[@]}"; do
            [[ ${nvme_subsystem_of[$letter]} != "$subsystem" ]] || break
        done
        words+=(-device "nvme-ns,drive=$subsystem-$nsid,bus=$letter,nsid=$nsid,shared=on,logical_block_size=$block,physical_block_size=$block,eui64=$((0x0fa57ce000000000 + i + 1)),uuid=7d2a1a5e-9d43-4c11-9f0a-00000000000$i")
    done
    machine_options=()
    for i in "${words[@]}"; do
        machine_options+=(--qemu "$i")
    done
}

# The same, as parameters of the guest.
nvme_params() {
    local letter
    printf "NVME_LETTERS='%s'\n" "${nvme_letters[*]}"
    for letter in "${nvme_letters[@]}"; do
        printf "PCI_%s='%s'\n" "$letter" "$(nvme_pci_of "$letter")"
    done
}
