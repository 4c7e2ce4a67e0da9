# shellcheck shell=dash disable=SC2086  # loads are lists of words
# Handed over: a host with one controller. The file is pinned while it is mounted; then the filesystem is unmounted, the
# controller given to fastice, the file served, the controller given back, and the filesystem mounted again.

# handover_pin KIND LETTER NSID
handover_pin() {
    local file
    case_begin "$1" "$2" "$3" "$4"
    file=$MNT/served.img
    dd if=/dev/urandom of="$MNT/beside" bs=1000 count=777 status=none
    md5sum <"$MNT/beside" >/tmp/case/beside
    fastice pin "$file"
    frozen_map "$file" | diff /tmp/case/map - || fail "the frozen map is not the one that xfs_io shows"
    # While it is mounted it is refused; and the mounted filesystem keeps the controller.
    config_begin
    config_export live "$file" "$2" handed-over
    serve_refused 'mounted'
    must_fail take "$2"
    bound_to "$2" nvme || fail "the refused bind took the controller"
}

handover_take() {
    umount "$MNT"
    take "$1"
    bound_to "$1" vfio-pci || fail "the driver is '$(driver_of "$1")'"
    [ -z "$(nvme_of "$1")" ] || fail "the kernel still shows the disk"
}

handover_serve() {
    config_begin
    config_export live "$MNT/served.img" "$1" handed-over
    serve_start
    host_attach live
    dd if="$(host_disk live)" bs=1M iflag=direct status=none | md5sum | cmp -s - /tmp/case/sum || fail "the initiator reads other bytes than the file held"
}

handover_stop() {
    dd if="$(host_disk live)" of=/tmp/case/image bs=1M iflag=direct status=none
    host_detach live
    serve_stop
}

# Back at the kernel, the filesystem is clean before anything is mounted; the map is the recorded one.
handover_give() { # LETTER NSID
    local disk node
    give "$1"
    bound_to "$1" nvme || fail "the driver is '$(driver_of "$1")'"
    wait_for 20 disk_of "$1" "$2" || fail "the namespace did not come back"
    # It may have another name now.
    disk=$(disk_of "$1" "$2")
    node=$(sed "s/^nvme[0-9]*n[0-9]*/$disk/" /tmp/case/node)
    echo "$disk" >/tmp/case/disk
    echo "$node" >/tmp/case/node
    wait_for 10 test -b "/dev/$node" || fail "there is no /dev/$node"
    check_filesystem "$(cat /tmp/case/kind)" "$node" || fail "the filesystem is damaged"
    mount -t "$(cat /tmp/case/kind)" "/dev/$node" "$MNT"
    fastice map verify "$MNT/served.img" || fail "the map is not the recorded one"
    must_fail truncate -s 4096 "$MNT/served.img"
    fastice unpin "$MNT/served.img"
    md5sum <"$MNT/beside" | cmp -s - /tmp/case/beside || fail "a file beside it changed"
}

# handover_mounted LETTER OTHER: mounted through one controller, it must not be taken over through the other one.
handover_mounted() {
    case_begin xfs "$1" 1 whole
    fastice pin "$MNT/served.img"
    config_begin
    config_export live "$MNT/served.img" "$2" handed-over
    serve_refused 'mounted'
    fastice unpin "$MNT/served.img"
    case_clean
}

# handover_case NAME KIND LETTER NSID WHERE
handover_case() {
    by_kernel "$3"
    chain "handover-$1" \
        "pin 90 handover_pin $2 $3 $4 $5" \
        "take 60 handover_take $3" \
        "serve 90 handover_serve $3" \
        "fio 180 case_fio" \
        "stop 90 handover_stop" \
        "give-back 90 handover_give $3 $4" \
        "blocks 120 case_compare" \
        "map 30 case_map_unchanged" \
        "fsck 60 case_clean"
    case_end
    bound_to "$3" nvme || give "$3" || by_kernel "$3"
}
