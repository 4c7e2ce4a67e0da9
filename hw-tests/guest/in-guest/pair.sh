# shellcheck shell=dash disable=SC2086  # loads are lists of words
# Two controllers of two subsystems driven by one fastice at once.

MNT2=/tmp/mnt2

# pair_begin KERNEL OTHER-KERNEL: a filesystem behind each.
pair_begin() {
    local other
    case_begin xfs "$1" 1 whole
    mkdir -p "$MNT2"
    other=$(scratch "$2" 1)
    guard_wipe "$other"
    make_filesystem ext4 "$other" "$(room_of "$other")"
    mount -t ext4 "/dev/$other" "$MNT2"
    write_fragmented "$MNT2/other.img" "$FILE_MIB" "$CHUNK_KIB"
    living_map "$MNT2/other.img" 0 ext4 >/tmp/case/other-map
    md5sum <"$MNT2/other.img" >/tmp/case/other-sum
    echo "$other" >/tmp/case/other
}

# pair_serve VFIO OTHER-VFIO
pair_serve() {
    config_begin
    config_export live "$MNT/served.img" "$1"
    config_export other "$MNT2/other.img" "$2"
    serve_start
    host_attach live
    host_attach other
    dd if="$(host_disk live)" bs=1M iflag=direct status=none | md5sum | cmp -s - /tmp/case/sum || fail "other bytes than the first file held"
    dd if="$(host_disk other)" bs=1M iflag=direct status=none | md5sum | cmp -s - /tmp/case/other-sum || fail "other bytes than the second file held"
}

# Both are written at the same time, with different bytes at the same places.
pair_fio() {
    local other
    (fio_crc other "$(host_disk other)" $LOAD_4K --randseed=7 --do_verify=1) >/tmp/case/fio-other 2>&1 &
    other=$!
    fio_crc 4k "$(host_disk live)" $LOAD_4K --do_verify=1
    wait $other || fail "$(cat /tmp/case/fio-other)"
    fio_crc 4k "$(host_disk live)" $LOAD_4K --verify_only
    fio_crc other "$(host_disk other)" $LOAD_4K --randseed=7 --verify_only
    note "first: $(fio_speed 4k); second: $(fio_speed other)"
}

pair_stop() {
    dd if="$(host_disk live)" of=/tmp/case/image bs=1M iflag=direct status=none
    dd if="$(host_disk other)" of=/tmp/case/other-image bs=1M iflag=direct status=none
    host_detach live
    host_detach other
    serve_stop
}

pair_compare() {
    local first second
    case_compare
    first=$(note_of)
    second=$(same_blocks /tmp/case/other-image "$MNT2/other.img") || fail "the second file: $second"
    living_map "$MNT2/other.img" 0 ext4 | diff /tmp/case/other-map - || fail "the second map changed"
    note "first file${first#,}; second file: $second"
}

pair_clean() {
    umount "$MNT2"
    check_filesystem ext4 "$(cat /tmp/case/other)" || fail "the second filesystem is damaged"
    guard_wipe "$(cat /tmp/case/other)"
    case_clean
}

pair_end() {
    ! controller_of "$(nqn_of other)" >/dev/null || timeout 60 nvme disconnect -n "$(nqn_of other)" || true
    # Before the filesystems go, what serves them.
    case_end
    ! grep -q " $MNT2 " /proc/mounts || { chattr -i "$MNT2"/other.img 2>/dev/null; fastice unpin --force "$MNT2/other.img"; umount "$MNT2"; } >/dev/null 2>&1 || true
}

# pair_case KERNEL VFIO OTHER-KERNEL OTHER-VFIO
pair_case() {
    chain pair \
        "filesystems 120 pair_begin $1 $3" \
        "serve 90 pair_serve $2 $4" \
        "fio 180 pair_fio" \
        "stop 90 pair_stop" \
        "blocks 120 pair_compare" \
        "fsck 90 pair_clean"
    pair_end
}
