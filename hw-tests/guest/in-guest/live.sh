# shellcheck shell=dash disable=SC2086  # loads are lists of words
# The live case: the kernel has a filesystem mounted through one controller, fastice serves a file of it through
# another controller of the same subsystem, and the kernel's initiator connects to it.
#
#   kernel: XFS or ext4 --- A ---.                     .--- B (VFIO) --- fastice --- TCP --- nvme-tcp, fio
#                                 >--- namespace -----<
#   written, compared -----------'                     `--- written, read
#
# One case is one filesystem on one namespace. Its scenarios stand on each other: they share /tmp/case.

MNT=${MNT:-/mnt}

# case_begin KIND LETTER NSID WHERE: filesystem, controller of the kernel, namespace, whole or partition.
case_begin() {
    local disk node bytes file extents
    rm -rf /tmp/case
    mkdir -p /tmp/case "$MNT"
    disk=$(scratch "$2" "$3")
    guard_wipe "$disk"
    node=$disk bytes=$(room_of "$disk")
    if [ "$4" = partition ]; then
        node=$(make_partition "$disk")
        bytes=$((bytes - PARTITION_AT))
    fi
    make_filesystem "$1" "$node" "$bytes"
    mount -t "$1" "/dev/$node" "$MNT"
    echo "$1" >/tmp/case/kind
    echo "$disk" >/tmp/case/disk
    echo "$node" >/tmp/case/node
    file=$MNT/served.img
    write_fragmented "$file" "$FILE_MIB" "$CHUNK_KIB"
    living_map "$file" "$(start_of "$node")" "$1" >/tmp/case/map
    ! grep -q '[a-z]' /tmp/case/map || fail "$(grep '[a-z]' /tmp/case/map | head -n 2)"
    extents=$(wc -l </tmp/case/map)
    [ "$extents" -gt 60 ] || fail "the file has only $extents extents"
    md5sum <"$file" >/tmp/case/sum
    md5sum <"$file.filler" >/tmp/case/filler
    note "$extents extents, blocks of $(lbs_of "$disk"), filesystem at byte $(start_of "$node") of $disk"
}

# What the frozen map says is what xfs_io says, and what the initiator reads is what the file held.
case_serve() {
    config_begin
    config_export live "$MNT/served.img" "$1"
    serve_start
    frozen_map "$MNT/served.img" >/tmp/case/frozen
    diff /tmp/case/map /tmp/case/frozen || fail "the frozen map is not the one that xfs_io shows"
    host_attach live
    [ "$(cat "/sys/block/$(basename "$(host_disk live)")/size")" = $((FILE_MIB * 2048)) ] || fail "wrong size"
    [ "$(lbs_of "$(basename "$(host_disk live)")")" = "$(lbs_of "$(cat /tmp/case/disk)")" ] || fail "wrong block size"
    dd if="$(host_disk live)" bs=1M iflag=direct status=none | md5sum | cmp -s - /tmp/case/sum || fail "the initiator reads other bytes than the file held"
}

case_pin_holds() {
    local command
    for command in "truncate -s 4096" "rm -f" "head -c 1" "xfs_io -c fpunch\ 0\ 64k"; do
        must_fail eval "timeout 10 $command $MNT/served.img"
    done
    [ "$(stat -c %s "$MNT/served.img")" = $((FILE_MIB * 1048576)) ] || fail "the size changed"
}

case_fio() {
    fio_crc 4k "$(host_disk live)" $LOAD_4K --do_verify=1
    note "$(fio_speed 4k)"
    fio_crc mixed "$(host_disk live)" $LOAD_MIXED --do_verify=1
    fio_crc 4k "$(host_disk live)" $LOAD_4K --verify_only
}

# Killed under I/O, the target's device is reset by the kernel; started again, it compares the map and goes on.
case_killed() {
    local killer
    (sleep 1; serve_kill; serve_start) >/tmp/case/killed 2>&1 &
    killer=$!
    fio_crc killed "$(host_disk live)" --bs=4k --size=4m --loops=3 --do_verify=1
    wait $killer || { cat /tmp/case/killed; fail "the target did not come back"; }
    wait_for 60 host_reads live || fail "no I/O 60 s after the restart"
    fio_crc 4k "$(host_disk live)" $LOAD_4K --do_verify=1
}

# Killed under writes, and the file let go without a successor that would reset the controller: from then on nothing of
# what the dead process had given to it reaches the disk.
case_killed_for_good() {
    local writer then now
    # However slow the machine is, something was written before.
    tr '\0' K </dev/zero | dd of="$(host_disk live)" bs=64k count=4 iflag=fullblock oflag=direct conv=notrunc status=none
    (trap '' PIPE; fio --name=last --filename="$(host_disk live)" --rw=randwrite --bs=4k --size=8m --iodepth=32 --ioengine=libaio --direct=1 --thread \
        --time_based --runtime=60 --minimal --output=/tmp/case/last-words) >/dev/null 2>&1 &
    writer=$!
    sleep 2
    ls "$FASTICE_STATE_DIR"/processes/*.places || fail "what fastice drives is not written down"
    kill -9 "$(cat /tmp/serve.pid)"
    # Refused as long as the process is not quite gone.
    wait_for 20 fastice unpin "$MNT/served.img" || fail "the file of the dead process cannot be let go"
    drop_page_cache
    then=$(md5sum <"$MNT/served.img")
    rm -f /tmp/serve.pid
    ! ls "$FASTICE_STATE_DIR"/processes/*.places || fail "the controller is still written down"
    sleep 3
    drop_page_cache
    now=$(md5sum <"$MNT/served.img")
    [ "$then" = "$now" ] || fail "blocks changed after the file was let go"
    [ "$now" != "$(cat /tmp/case/sum)" ] || fail "nothing was written before"
    timeout 60 nvme disconnect -n "$(nqn_of live)"
    wait $writer || true
    xfs_io -c quit "$MNT/served.img" || fail "still held or immutable"
}

# The last look of the initiator; then everything is let go.
case_stop() {
    dd if="$(host_disk live)" of=/tmp/case/image bs=1M iflag=direct status=none
    host_detach live
    serve_stop
    # Opens it for writing.
    xfs_io -c quit "$MNT/served.img" || fail "still held or immutable after an orderly end"
}

# Block by block: what the initiator saw last, what the filesystem reads now, what lies at the mapped addresses. The
# checksums that the initiator wrote are verified once more, by fio on the file itself.
case_compare() {
    local file=$MNT/served.img through_filesystem by_map
    drop_page_cache
    through_filesystem=$(same_blocks /tmp/case/image "$file") || fail "the file through its filesystem: $through_filesystem"
    truncate -s 0 /tmp/case/raw
    read_by_map "$(cat /tmp/case/disk)" /tmp/case/map /tmp/case/raw
    by_map=$(same_blocks /tmp/case/image /tmp/case/raw) || fail "the device at the mapped addresses: $by_map"
    rm -f /tmp/case/raw
    fio_crc file "$file" $LOAD_4K --verify_only
    md5sum <"$file.filler" | cmp -s - /tmp/case/filler || fail "the neighbour's blocks changed"
    [ "$(md5sum <"$file")" != "$(cat /tmp/case/sum)" ] || fail "nothing was written"
    note "of 4096 bytes, through the filesystem: $through_filesystem; by the map: $by_map"
}

case_map_unchanged() {
    living_map "$MNT/served.img" "$(start_of "$(cat /tmp/case/node)")" "$(cat /tmp/case/kind)" | diff /tmp/case/map - || fail "the map changed"
}

case_clean() {
    umount "$MNT"
    check_filesystem "$(cat /tmp/case/kind)" "$(cat /tmp/case/node)" || fail "the filesystem is damaged"
    guard_wipe "$(cat /tmp/case/disk)"
}

# case_end: so that the next case finds nothing of this one, however it ended.
case_end() {
    ! controller_of "$(nqn_of live)" >/dev/null || timeout 60 nvme disconnect -n "$(nqn_of live)" || true
    serve_kill
    ! grep -q " $MNT " /proc/mounts || { chattr -i "$MNT"/served.img 2>/dev/null; fastice unpin --force "$MNT/served.img"; umount "$MNT"; } >/dev/null 2>&1 || true
    rm -rf /tmp/case
}

# killed_case KERNEL-LETTER VFIO-LETTER NSID
killed_case() {
    chain killed \
        "filesystem 90 case_begin xfs $1 $3 whole" \
        "serve 90 case_serve $2" \
        "for-good 120 case_killed_for_good" \
        "map 30 case_map_unchanged" \
        "fsck 60 case_clean"
    case_end
}

# live_case NAME KIND KERNEL-LETTER VFIO-LETTER NSID WHERE
live_case() {
    chain "live-$1" \
        "filesystem 90 case_begin $2 $3 $5 $6" \
        "serve 90 case_serve $4" \
        "pin-holds 60 case_pin_holds" \
        "fio 180 case_fio" \
        "${LIVE_KILL:+killed 180 case_killed}" \
        "stop 90 case_stop" \
        "blocks 120 case_compare" \
        "map 30 case_map_unchanged" \
        "fsck 60 case_clean"
    case_end
}
