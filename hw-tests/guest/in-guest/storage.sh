# shellcheck shell=dash
# Filesystems for a test on NVMe namespaces, fragmented files in them, and where these lie: as the filesystem says it
# (xfs_io), as fastice froze it, and as the device holds it.
#
# Everything that is written to a device by itself goes through `scratch`: only to a namespace that guard.sh lets
# through.

SECTOR=512
# A partition begins here, which is a multiple of every block.
PARTITION_AT=4194304

# scratch LETTER NSID: the block device of a namespace that tests may destroy; the scenario ends when they may not.
scratch() {
    local disk
    disk=$(disk_of "$1" "$2") || fail "controller $1 shows no namespace $2" >&2
    guard_disk "$disk" >/tmp/guard-verdict || fail "$(cat /tmp/guard-verdict)" >&2
    echo "$disk"
}

# room_of DISK: bytes for a filesystem. The mark at the end stays, and nobody waits for a terabyte.
room_of() {
    local room
    room=$(($(guard_bytes "$1") - 2 * GUARD_MARK_FROM_END))
    [ "$room" -le 1073741824 ] || room=1073741824
    echo "$room"
}

# make_partition DISK: one partition; prints its name.
make_partition() {
    printf 'label: dos\nlabel-id: 0x%s\nstart=%s, size=%s, type=83\n' "$GUARD_TABLE" $((PARTITION_AT / $(lbs_of "$1"))) \
        $((($(room_of "$1") - PARTITION_AT) / $(lbs_of "$1"))) | sfdisk --quiet --wipe never --no-reread "/dev/$1" >&2
    # sfdisk has asked the kernel already, if nothing else had the device open.
    wait_for 10 has_partition "$1" || blockdev --rereadpt "/dev/$1" >&2
    wait_for 10 has_partition "$1" || fail "the kernel shows no partition of $1" >&2
    echo "${1}p1"
}
has_partition() { [ -b "/dev/${1}p1" ] && [ -e "/sys/class/block/${1}p1" ]; }

lbs_of() { cat "/sys/block/$1/queue/logical_block_size"; }

# start_of NODE: where it begins on its disk, in bytes.
start_of() { echo $(($(cat "/sys/class/block/$1/start" 2>/dev/null || echo 0) * SECTOR)); }

# make_filesystem KIND NODE BYTES: with the label that the guard knows.
make_filesystem() {
    case $1 in
        # (mkfs.xfs wants 300 MB, unless it is told that nobody supports this.)
        xfs) mkfs.xfs --unsupported -q -f -K -L "$GUARD_LABEL" -d "size=$3" "/dev/$2" ;;
        ext4) mkfs.ext4 -q -F -m 0 -E nodiscard -L "$GUARD_LABEL" "/dev/$2" $(($3 / 1024))k ;;
        *) fail "no such filesystem: $1" ;;
    esac
}

# check_filesystem KIND NODE: whether it is clean; nothing is mended.
check_filesystem() {
    case $1 in
        xfs) xfs_repair -n "/dev/$2" ;;
        ext4) e2fsck -f -n "/dev/$2" ;;
    esac
}

# drop_page_cache: what the kernel read before somebody else wrote to the device.
drop_page_cache() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# --- a file as far from one extent as it gets -----------------------------------------------------------------

# write_fragmented FILE MIB CHUNK_KIB: into a filesystem without room but for holes of CHUNK_KIB, which are punched into
# another file; what is left of that one, FILE.filler, are its neighbours on the device, and holds bytes too. (To write
# two files in turn is not enough: ext4 sees through it.)
write_fragmented() {
    local chunks=$(($2 * 1024 / $3)) stride=$(($3 + 16)) chunk=0 free
    xfs_io -f -c "falloc 0 $((chunks * stride))k" "$1.filler"
    # All other room but a little, in pieces as large as there are.
    for piece in 16384 4096 1024 256; do
        while free=$(free_kib "$1.filler") && [ "$free" -gt $((piece + 3072)) ] &&
            xfs_io -f -c "falloc $(($(stat -c %s "$1.rest" 2>/dev/null || echo 0) / 1024))k ${piece}k" "$1.rest" 2>/dev/null; do
            :
        done
    done
    while [ "$chunk" -lt "$chunks" ]; do
        printf 'pwrite -q -S 0x%02x %dk 16k\nfpunch %dk %dk\n' $((chunk % 255 + 1)) $((chunk * stride)) $((chunk * stride + 16)) "$3"
        chunk=$((chunk + 1))
    done >/tmp/commands
    # What was freed can be had again when it was written down.
    { cat /tmp/commands; echo fsync; } | xfs_io "$1.filler" >/tmp/commands.out 2>&1
    sync
    dd if=/dev/urandom of="$1" bs=1M count="$2" oflag=direct iflag=fullblock status=none
    rm -f "$1.rest"
    sync
}

free_kib() { df -k "$1" | awk 'NR == 2 { print $4 }'; }

# --- maps -----------------------------------------------------------------------------------------------------

# Lines "file-offset device-offset length", in bytes, device offsets from the beginning of the whole disk; what
# continues the line before is joined to it, as filesystems split and join at will. Anything but plain written blocks
# is a line of its own.
join_map() {
    awk '
        NF != 3 { if (n) print file, device, n; n = 0; print; next }
        n && $1 == file + n && $2 == device + n { n += $3; next }
        n { print file, device, n }
        { file = $1; device = $2; n = $3 }
        END { if (n) print file, device, n }'
}

# map_by COMMAND FILE START: of xfs_io, `fiemap -v` or `bmap -vp`; START is where the filesystem begins on its disk.
map_by() {
    xfs_io -r -c "$1" "$2" | awk -v start="$3" '
        NR <= 2 { next }
        {
            gsub(/[^0-9.]/, "", $2); split($2, f, "[.][.]"); split($3, d, "[.][.]"); flags = $NF
            if (d[2] == "" || flags !~ /^(0x[01]|0+)$/) { print "not plain:", $0; next }
            print f[1] * 512, d[1] * 512 + start, (f[2] - f[1] + 1) * 512
        }' | join_map
}

# living_map FILE START KIND: FIEMAP, and for XFS the filesystem's own answer, which must be the same.
living_map() {
    map_by 'fiemap -v' "$1" "$2" >/tmp/fiemap
    [ -s /tmp/fiemap ] || fail "no map of $1" >&2
    if [ "$3" = xfs ]; then
        map_by 'bmap -vp' "$1" "$2" | cmp -s - /tmp/fiemap || fail "fiemap and bmap differ on $1" >&2
    fi
    cat /tmp/fiemap
}

# frozen_map FILE: what fastice recorded.
frozen_map() {
    fastice map export "$1" | awk '
        { sub(/,$/, "", $2) }
        /"file_offset_bytes":/ { file = $2 }
        /"device_offset_bytes":/ { device = $2 }
        /"len_bytes":/ { print file + 0, device + 0, $2 + 0 }' | join_map
}

# read_by_map DISK MAP OUT: the file, put together from the device alone. Only after drop_page_cache.
read_by_map() {
    local at device length size
    while read -r at device length; do
        # In one piece, unless it is a large one. (The shell's own dd: one call for each extent.)
        size=4096
        [ "$length" -gt 4194304 ] || size=$length
        command dd if="/dev/$1" of="$3" bs="$size" count=$((length / size)) iflag=skip_bytes skip="$device" \
            oflag=seek_bytes seek="$at" conv=notrunc status=none || return 1
    done <"$2"
}

# same_blocks ONE OTHER: 4096 by 4096 bytes; says how many, or which differ.
same_blocks() {
    local blocks
    [ "$(stat -c %s "$1")" = "$(stat -c %s "$2")" ] || { echo "$(stat -c %s "$1") bytes and $(stat -c %s "$2")"; return 1; }
    blocks=$(($(stat -c %s "$1") / 4096))
    if cmp -s "$1" "$2"; then
        echo "$blocks blocks equal"
        return 0
    fi
    cmp -l "$1" "$2" | awk -v all=$blocks '
        { block = int(($1 - 1) / 4096); if (!(block in seen)) { seen[block] = 1; n++; if (n <= 5) list = list " " block } }
        END { print n " of " all " blocks differ, the first:" list }'
    return 1
}
