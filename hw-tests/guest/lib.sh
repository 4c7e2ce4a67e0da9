# shellcheck shell=bash
# Shared by the host-side scripts: messages, and the packages that a fresh Debian machine lacks.

# Command -> Debian package that holds it. Needed to build the image and to run the guest.
readonly -A HW_PACKAGE_OF=(
    [qemu-system-x86_64]=qemu-system-x86
    [busybox]=busybox-static
    [cpio]=cpio
    [depmod]=kmod
    [modprobe]=kmod
    [xz]=xz-utils
    [zstd]=zstd
    [nvme]=nvme-cli
    [fio]=fio
    [mkfs.xfs]=xfsprogs
    [xfs_io]=xfsprogs
    [filefrag]=e2fsprogs
    [mkfs.ext4]=e2fsprogs
    [sfdisk]=fdisk
    [wipefs]=util-linux
    [setpriv]=util-linux
    [ip]=iproute2
    [losetup]=mount
    [unshare]=util-linux
)

say() { printf '%s\n' "hw-tests: $*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# Succeeds when every command of HW_PACKAGE_OF is there and busybox is a static one
# (the guest has no C library of its own until the dynamic programs are copied in).
missing_packages() {
    local command missing=()
    for command in "${!HW_PACKAGE_OF[@]}"; do
        command -v "$command" >/dev/null 2>&1 || missing+=("${HW_PACKAGE_OF[$command]}")
    done
    if command -v busybox >/dev/null 2>&1 && ldd "$(command -v busybox)" >/dev/null 2>&1; then
        missing+=(busybox-static)
    fi
    ((${#missing[@]} == 0)) || printf '%s\n' "${missing[@]}" | sort -u
}

# Installs what is missing; as an ordinary user it only says what to install.
install_missing() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    [[ -z $missing ]] && return 0
    ((EUID == 0)) || die "missing packages: ${missing}; run: sudo apt-get install ${missing}"
    command -v apt-get >/dev/null || die "missing packages: ${missing}; this is no Debian, install them by hand"
    say "installing: ${missing}"
    # shellcheck disable=SC2086  # a list of words on purpose
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2 ||
        { apt-get update -qq >&2 &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2; } ||
        die "cannot install: ${missing}"
}

# Seconds since the epoch with milliseconds, without a fork.
now_ms() {
    local t=${EPOCHREALTIME/[.,]/}
    printf '%s' "$((t / 1000))"
}

# Process ids of the children of a process; none when it is gone.
children_of() { { tr ' ' '\n' <"/proc/$1/task/$1/children"; } 2>/dev/null || true; }

# Copies a program and the libraries it is linked with into the tree of a guest.
copy_program() { # TREE PROGRAM
    local tree=$1 program=$2 library
    install -D -m 755 "$program" "$tree/bin/$(basename "$program")"
    while read -r library; do
        [[ -e $tree$library ]] || install -D -m 755 "$library" "$tree$library"
    done < <(ldd "$program" 2>/dev/null | grep -oE '/[^ ]+\.so[^ ]*' || true)
}
