#!/usr/bin/env bash
# Builds the guest: the newest Debian 6.12 kernel as a plain ELF (booted through PVH, which saves the
# decompression under emulation) and two cpio archives that QEMU loads one after the other.
#
#   base.cpio   busybox, nvme-cli, xfsprogs, kernel modules
#   fio.cpio    fio and the many libraries that Debian links it with
#
# Prints the directory of the finished image. Everything is cached in hw-tests/cache (HW_CACHE):
# the second run only compares a key made of the kernel, the packages and this script.
#
# usage: prepare-image.sh [--refresh]      --refresh looks for a newer kernel package
#   HW_KERNEL_SERIES=6.12    another series that apt knows, e.g. 6.1
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib.sh
source "$here/lib.sh"

cache=${HW_CACHE:-$here/../cache}
kernel_series=${HW_KERNEL_SERIES:-6.12}

# The programs of the guest besides busybox. One that only shows up in newer packages is no loss.
readonly GUEST_PROGRAMS=(
    nvme mkfs.xfs xfs_repair xfs_io blkdiscard dd stty modprobe
    mkfs.ext4 e2fsck sfdisk wipefs
)
readonly GUEST_MODULES=(
    virtio_pci virtio_net virtio_blk
    nvme vfio-pci vfio_iommu_type1
    nvme-tcp nvme-fabrics nvmet nvmet-tcp null_blk loop
    xfs ext4 crc32c_generic crc32c-intel crc32-pclmul
)

scratch=
trap '[[ -z $scratch ]] || rm -rf "$scratch"' EXIT

# Puts one kernel package into the cache and prints its path. Without --refresh a cached one will do.
kernel_package() {
    local deb name
    mkdir -p "$cache/deb"
    deb=$(find "$cache/deb" -name "linux-image-$kernel_series.*.deb" | sort -V | tail -n 1)
    if [[ -n $deb && $1 != --refresh ]]; then
        printf '%s' "$deb"
        return
    fi
    name=$(newest_kernel_name)
    if [[ -z $name ]]; then
        ((EUID == 0)) && apt-get update -qq >&2
        name=$(newest_kernel_name)
    fi
    [[ -n $name ]] || die "no package linux-image-$kernel_series.*-amd64 known to apt; the bookworm-security suite has it"
    say "downloading $name (about 100 MB, once)"
    # apt's own user may not write here; the warning about it is of no interest.
    (cd "$cache/deb" && apt-get download -q -o APT::Sandbox::User=root "$name" >&2) || {
        ((EUID == 0)) && apt-get update -qq >&2
        (cd "$cache/deb" && apt-get download -q -o APT::Sandbox::User=root "$name" >&2)
    } || die "cannot download $name"
    find "$cache/deb" -name "linux-image-$kernel_series.*.deb" | sort -V | tail -n 1
}

# The unsigned package holds the same kernel and depends on nothing; the signed one is taken where it is the only one.
newest_kernel_name() {
    local pattern="^linux-image-${kernel_series//./\\.}\.[0-9]+(\+[a-z0-9]+|-[0-9]+)?-amd64(-unsigned)?\$"
    apt-cache pkgnames "linux-image-$kernel_series" | grep -E "$pattern" | sort -V | tail -n 1
}

# bzImage -> vmlinux. The place of the compressed kernel stands in the setup header
# (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
extract_vmlinux() {
    local bzimage=$1 out=$2 sectors offset length magic tool
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$bzimage" | tr -d ' ')
    offset=$(od -An -tu4 -j $((0x248)) -N 4 "$bzimage" | tr -d ' ')
    length=$(od -An -tu4 -j $((0x24c)) -N 4 "$bzimage" | tr -d ' ')
    offset=$((offset + (sectors + 1) * 512))
    magic=$(od -An -tx1 -j "$offset" -N 4 "$bzimage" | tr -d ' ')
    case $magic in
        28b52ffd) tool=(zstd -dc) ;;
        fd377a58) tool=(xz -dc) ;;
        1f8b*) tool=(gzip -dc) length=$((length + 4)) ;;
        *) die "kernel payload of $bzimage has the unknown magic $magic" ;;
    esac
    # The build appends the unpacked size to the stream, except for gzip, whose own trailer has it.
    tail -c +$((offset + 1)) "$bzimage" | head -c $((length - 4)) | "${tool[@]}" >"$out" 2>/dev/null || true
    [[ $(od -An -tx1 -N 4 "$out" | tr -d ' ') == 7f454c46 ]] || die "no ELF kernel in $bzimage"
}

# Copies the wanted modules and what they depend on, unpacked and without debug sections.
copy_modules() {
    local from=$1 tree=$2 release=$3 module file target
    depmod -b "$from" "$release"
    for module in "${GUEST_MODULES[@]}"; do
        modprobe -d "$from" -S "$release" --show-depends "$module" 2>/dev/null || say "module $module is not in this kernel (or built in)"
    done | awk '$1 == "insmod" { print $2 }' | sort -u >"$from/wanted"
    while read -r file; do
        target=$tree/lib/modules/$release/${file#*"/lib/modules/$release/"}
        mkdir -p "$(dirname "$target")"
        case $file in
            *.xz) xz -dc "$file" >"${target%.xz}"; target=${target%.xz} ;;
            *.zst) zstd -dcq "$file" >"${target%.zst}"; target=${target%.zst} ;;
            *) cp "$file" "$target" ;;
        esac
        if command -v strip >/dev/null; then
            strip --strip-debug -R .BTF -R .BTF.base "$target"
        fi
    done <"$from/wanted"
    cp "$from/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$tree/lib/modules/$release/"
    depmod -b "$tree" "$release"
}

build_base() {
    local tree=$1 kernel=$2 release=$3 program path
    mkdir -p "$tree"/{bin,dev,proc,sys,run,tmp,mnt,etc/nvme,hw,root,var}
    mkdir -p "$tree/lib" "$tree/usr"
    ln -s bin "$tree/sbin"
    ln -s ../bin "$tree/usr/bin"
    ln -s ../bin "$tree/usr/sbin"
    install -m 755 "$(command -v busybox)" "$tree/bin/busybox"
    while read -r program; do
        ln -sf busybox "$tree/bin/$program"
    done < <(busybox --list | grep -v '^busybox$')
    for program in "${GUEST_PROGRAMS[@]}"; do
        path=$(command -v "$program") || die "no $program on this machine"
        rm -f "$tree/bin/$program"
        copy_program "$tree" "$(readlink -f "$path")"
        [[ $(basename "$(readlink -f "$path")") == "$program" ]] ||
            ln -sf "$(basename "$(readlink -f "$path")")" "$tree/bin/$program"
    done
    # mkfs.xfs is configured by a directory that it wants to see, XFS by nothing else.
    ln -sf /proc/mounts "$tree/etc/mtab"
    copy_modules "$kernel" "$tree" "$release"
}

pack() { (cd "$1" && find . -print0 | sort -z | cpio --quiet --null -o -H newc --owner 0:0) >"$2"; }

build() {
    local deb=$1 out=$2 release
    scratch=$(mktemp -d "$cache/build.XXXXXX")
    mkdir "$scratch"/{kernel,base,fio,out}
    say "unpacking $(basename "$deb")"
    dpkg-deb --fsys-tarfile "$deb" | tar -C "$scratch/kernel" -x ./boot ./lib/modules
    release=$(basename "$scratch"/kernel/lib/modules/*)
    extract_vmlinux "$scratch/kernel/boot/vmlinuz-$release" "$scratch/out/vmlinux"
    say "building the image for $release"
    build_base "$scratch/base" "$scratch/kernel" "$release"
    copy_program "$scratch/fio" "$(command -v fio)"
    # The cpios are laid over each other: /bin and /lib must be real directories in both.
    pack "$scratch/base" "$scratch/out/base.cpio"
    pack "$scratch/fio" "$scratch/out/fio.cpio"
    # A machine without a compiler does without: its guests measure for themselves.
    ! command -v cc >/dev/null || cc -O1 -o "$scratch/out/tsc-khz" "$here/tsc-khz.c" || die "cannot compile tsc-khz.c"
    printf '%s\n' "$release" >"$scratch/out/release"
    rm -rf "$out"
    mv "$scratch/out" "$out"
}

main() {
    local deb key out
    install_missing
    mkdir -p "$cache"
    cache=$(cd "$cache" && pwd)
    # Two runs at once: the second waits and finds the image ready.
    exec 9>"$cache/lock"
    flock 9
    deb=$(kernel_package "${1:-}")
    key=$({
        basename "$deb"
        sha256sum <"${BASH_SOURCE[0]}"
        sha256sum "$here/lib.sh" "$here/tsc-khz.c" | cut -d' ' -f1
        dpkg-query -W -f '${Package} ${Version}\n' busybox-static nvme-cli fio xfsprogs e2fsprogs fdisk kmod libc6 2>/dev/null || true
    } | sha256sum | head -c 12)
    out=$cache/guest-$kernel_series-$key
    if [[ ! -s $out/release ]]; then
        # A half-built image has no release file; an old key is of no use to anyone.
        find "$cache" -maxdepth 1 -name "guest-$kernel_series-*" -exec rm -rf {} +
        build "$deb" "$out"
    fi
    printf '%s\n' "$out"
}

main "$@"
