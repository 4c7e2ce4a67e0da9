#!/usr/bin/env bash
# Boots one guest under software emulation and stays until it powered off.
#
# usage: run-guest.sh --image DIR --overlay DIR --log FILE [--tap NAME] [--mac MAC] [--control PATH]
#                     [--drive FILE]... [--cpus N] [--memory SIZE] [--timeout SECONDS] [--append WORDS]
#                     [--fio 0|1] [--output FILE] [--qmp PATH] [--iommu 0|1] [--threads single|multi]
#                     [--features WORDS] [--qemu WORD]...
#
#   --image     what prepare-image.sh printed
#   --overlay   a directory that is laid over the image; it must hold /init
#   --log       console of the guest (kernel messages, output of the scripts)
#   --tap       an existing tap device of this network namespace, as the guest's eth0
#   --control   PATH.in and PATH.out are FIFOs joined to the guest's second serial port
#   --drive     a file or block device, opened past the page cache, as /dev/vda, /dev/vdb, ...; only read and
#               written (a discard does nothing, zeros are written out), so that its map stays
#   --fio       0 leaves fio out of the image, which saves 2 seconds of boot
#   --output    what the guest writes to its third serial port
#   --qmp       PATH.in and PATH.out are FIFOs joined to QEMU's own control protocol
#   --iommu     an emulated Intel IOMMU with interrupt remapping, switched on, in front of all devices
#   --threads   one thread of this machine for all processors of the guest (single), or one each (multi): see below
#   --features  of the processor, added or taken away, such as erms=off
#   --qemu      handed on to QEMU as it is
#
# Exit code: that of QEMU, 124 when the time was over.
set -euo pipefail

image='' overlay='' log=/dev/stdout tap='' mac=52:54:00:00:00:02 control='' cpus=4 memory=1G seconds=600 append=''
output='' qmp='' iommu=0 fio=1 threads=single features=''
drives=() words=()
while (($#)); do
    case $1 in
        --image) image=$2 ;;
        --overlay) overlay=$2 ;;
        --log) log=$2 ;;
        --tap) tap=$2 ;;
        --mac) mac=$2 ;;
        --control) control=$2 ;;
        --drive) drives+=("$2") ;;
        --cpus) cpus=$2 ;;
        --memory) memory=$2 ;;
        --timeout) seconds=$2 ;;
        --append) append=$2 ;;
        --fio) fio=$2 ;;
        --output) output=$2 ;;
        --qmp) qmp=$2 ;;
        --iommu) iommu=$2 ;;
        --threads) threads=$2 ;;
        --features) features=$2 ;;
        --qemu) words+=("$2") ;;
        *) echo "run-guest.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
[[ -s $image/vmlinux && -x $overlay/init ]] || { echo "run-guest.sh: --image and --overlay are needed" >&2; exit 2; }

work=$(mktemp -d)
qemu_pid=
# shellcheck disable=SC2317,SC2329  # called by the trap
finish() {
    [[ -z $qemu_pid ]] || kill "$qemu_pid" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

# The kernel unpacks concatenated archives in turn; later files win.
(cd "$overlay" && find . -print0 | sort -z | cpio --quiet --null -o -H newc --owner 0:0) >"$work/overlay.cpio"
archives=("$image/base.cpio" "$image/fio.cpio" "$work/overlay.cpio")
((fio)) || unset 'archives[1]'
cat "${archives[@]}" >"$work/initrd"

# The IOMMU has to stand before the devices behind it. (Interrupt remapping: without it, VFIO refuses interrupts.)
front=()
if ((iommu)); then
    front=(-device "intel-iommu,intremap=on,caching-mode=on")
    append="intel_iommu=on iommu=pt $append"
fi

# Why these: thread=single and tsc=reliable keep cross-CPU round trips and clock reads cheap under TCG, also on a busy machine
# (one that is quiet does more with a thread a processor);
# la57=off and mitigations=off spare the emulator work; everything not named is left out of the machine. The
# kernel's stall and lockup watchdogs are off: on a busy machine they bark at the emulation. tsc_early_khz: tsc-khz.c.
# no_timer_check: on a busy machine the emulated timer may miss the few ticks that the kernel panics without.
[[ ! -x $image/tsc-khz ]] || append="tsc_early_khz=$("$image/tsc-khz") $append"
options=(
    -machine q35 "${front[@]}" -accel "tcg,thread=$threads" -cpu "max,la57=off${features:+,$features}" -smp "$cpus" -m "$memory"
    -nodefaults -no-user-config -display none -no-reboot -monitor none
    -kernel "$image/vmlinux" -initrd "$work/initrd"
    -append "console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable net.ifnames=0 random.trust_cpu=on rcupdate.rcu_cpu_stall_suppress=1 nowatchdog no_timer_check $append"
    -serial "file:$log"
)
if [[ -n $control ]]; then
    options+=(-chardev "pipe,id=control,path=$control" -serial chardev:control)
fi
if [[ -n $output ]]; then
    # Ports are numbered in the order of their options.
    [[ -n $control ]] || options+=(-serial null)
    options+=(-serial "file:$output")
fi
if [[ -n $qmp ]]; then
    options+=(-chardev "pipe,id=qmp,path=$qmp" -mon "chardev=qmp,mode=control")
fi
if [[ -n $tap ]]; then
    options+=(-netdev "tap,id=n0,ifname=$tap,script=no,downscript=no" -device "virtio-net-pci,netdev=n0,mac=$mac,romfile=")
fi
for i in "${!drives[@]}"; do
    options+=(-drive "id=d$i,if=none,file=${drives[$i]},format=raw,cache=none,discard=ignore" -device "virtio-blk-pci,drive=d$i,write-zeroes=off")
done

options+=("${words[@]}")

# QEMU must not outlive this script, whatever ends it.
timeout --kill-after=5 "$seconds" setpriv --pdeathsig KILL qemu-system-x86_64 "${options[@]}" </dev/null &
qemu_pid=$!
code=0
wait "$qemu_pid" || code=$?
qemu_pid=
exit "$code"
