# shellcheck shell=sh disable=SC3028  # busybox has RANDOM
# Role: the host (initiator). Every scenario of the real Linux host, in one boot.
#
# Layout of the read-write namespace while this runs (RW_MIB long):
#   0 .. 32 MiB        fio, and the small writes of the connection scenarios; later the XFS covers everything
#   last 4 MiB         written by the outside host before the target started; read here, never written before mkfs

modprobe nvme-tcp
modprobe xfs
export NVME_HOSTNQN="$HOST_NQN"

# shellcheck source=fences.sh
. /hw/fences.sh

rw() { echo "/dev/$(block_of "$NQN_RW" 1)"; }
rw_ctrl() { echo "/dev/$(controller_of "$NQN_RW")"; }

# --- discovery -----------------------------------------------------------------------------------

discover() { timeout 60 nvme discover -t tcp -a "$TARGET_ADDRESS" -s "$1" --hostnqn "$2" --hostid "$3"; }

t_discover() {
    discover "$1" "$HOST_NQN" "$HOST_ID" >/tmp/log || { cat /tmp/log; fail "nvme discover failed"; }
    cat /tmp/log
    grep -q "subnqn: *$NQN_RW\$" /tmp/log || fail "$NQN_RW is not listed"
    grep -q "subnqn: *$NQN_RO\$" /tmp/log || fail "$NQN_RO is not listed, although this host may use it"
    grep -q "trtype: *tcp" /tmp/log || fail "no entry of type tcp"
    grep -q "traddr: *$TARGET_ADDRESS\$" /tmp/log || fail "no entry with the address $TARGET_ADDRESS"
}

# A host sees only what it may connect to (NVM Express Base, Discovery Log Page).
t_discover_foreign() {
    discover "$DISCOVERY_PORT" "$FOREIGN_NQN" "$FOREIGN_ID" >/tmp/log || { cat /tmp/log; fail "nvme discover failed"; }
    grep -q "subnqn: *$NQN_RW\$" /tmp/log || fail "$NQN_RW is open to all, but not listed"
    ! grep -q "subnqn: *$NQN_RO\$" /tmp/log || fail "$NQN_RO is listed for a host that may not connect"
}

t_connect_all() {
    timeout 100 nvme connect-all -t tcp -a "$TARGET_ADDRESS" -s "$DISCOVERY_PORT" --hostnqn "$HOST_NQN" --hostid "$HOST_ID" ||
        fail "nvme connect-all failed"
    wait_for 20 size_is_known "$NQN_RW" 1 || fail "no namespace of $NQN_RW"
    wait_for 20 size_is_known "$NQN_RO" 1 || fail "no namespace of $NQN_RO"
    timeout 60 nvme disconnect-all
    [ -z "$(ls /sys/class/nvme)" ] || fail "controllers left: $(ls /sys/class/nvme)"
}

# --- connection ----------------------------------------------------------------------------------

# t_connect QUEUES [digest options]: connect, look, write and read, disconnect.
t_connect() {
    queues=$1
    shift
    attach "$NQN_RW" --nr-io-queues "$queues" "$@"
    ctrl=$(controller_of "$NQN_RW")
    [ "$(cat "/sys/class/nvme/$ctrl/state")" = live ] || fail "state $(cat "/sys/class/nvme/$ctrl/state")"
    # queue_count counts the admin queue too.
    [ "$(cat "/sys/class/nvme/$ctrl/queue_count")" = $((queues + 1)) ] ||
        fail "$(cat "/sys/class/nvme/$ctrl/queue_count") queues instead of $queues + 1"
    [ "$(cat "/sys/block/$(block_of "$NQN_RW" 1)/size")" = $((RW_MIB * 2048)) ] || fail "wrong size"
    round_trip "$(rw)"
    detach "$NQN_RW"
}

t_attach_main() { attach "$NQN_RW" --nr-io-queues 4; }

t_disconnect_reconnect() {
    first=$(cat "/sys/block/$(block_of "$NQN_RW" 1)/wwid")
    detach "$NQN_RW"
    ! block_of "$NQN_RW" 1 || fail "the block device is still there"
    attach "$NQN_RW" --nr-io-queues 4
    [ "$(cat "/sys/block/$(block_of "$NQN_RW" 1)/wwid")" = "$first" ] || fail "the identity changed"
}

# --- admin commands ------------------------------------------------------------------------------

t_id_ctrl() {
    nvme id-ctrl "$(rw_ctrl)" >/tmp/log
    cat /tmp/log
    grep -q "^subnqn *: $NQN_RW\$" /tmp/log || fail "wrong SUBNQN"
    # Without NVME_VWC_PRESENT the host never sends Flush; the target's device decides, so only say what was seen.
    note "$(awk '/^(vwc|mdts|oncs|ver) / { printf "%s %s  ", $1, $3 }' /tmp/log)"
}

t_id_ns() {
    nvme id-ns "$(rw)" -n 1 >/tmp/log
    cat /tmp/log
    [ "$(awk '/^nsze / { print $3; exit }' /tmp/log)" != 0 ] || fail "NSZE is 0"
    grep -q 'in use' /tmp/log || fail "no LBA format in use"
    note "$(grep 'in use' /tmp/log | tr -s ' ')"
}

t_ns_descs() { nvme ns-descs "$(rw_ctrl)" -n 1; }

t_list() {
    nvme list >/tmp/log
    cat /tmp/log
    grep -q "$(rw)" /tmp/log || fail "$(rw) is not listed"
}

t_list_subsys() {
    nvme list-subsys >/tmp/log
    cat /tmp/log
    grep -q "$NQN_RW" /tmp/log || fail "$NQN_RW is not listed"
    grep -q "traddr=$TARGET_ADDRESS" /tmp/log || fail "no path to $TARGET_ADDRESS"
    grep -q live /tmp/log || fail "no live path"
}

t_list_ns() {
    nvme list-ns "$(rw_ctrl)" >/tmp/log
    cat /tmp/log
    grep -qi '0x1$' /tmp/log || fail "namespace 1 is not listed"
}

t_smart_log() { nvme smart-log "$(rw_ctrl)"; }
t_error_log() { nvme error-log "$(rw_ctrl)" -e 1; }
t_fw_log() { nvme fw-log "$(rw_ctrl)"; }

# The log itself, as nvme-cli 2.3 prints nothing of it over fabrics: from byte 1024 on one dword an I/O opcode,
# whose bit 0 says that the command is supported (NVM Express Base, Commands Supported and Effects).
t_effects_log() {
    nvme get-log "$(rw_ctrl)" --log-id=5 --log-len=4096 -b >/tmp/log
    [ "$(wc -c </tmp/log)" = 4096 ] || fail "$(wc -c </tmp/log) bytes instead of 4096"
    for opcode in 0 1 2; do
        [ $(($(od -An -tu1 -j $((1024 + 4 * opcode)) -N 1 /tmp/log) & 1)) = 1 ] || fail "I/O opcode $opcode is not said to be supported"
    done
}

t_wwid() {
    wwid=$(cat "/sys/block/$(block_of "$NQN_RW" 1)/wwid")
    note "$wwid"
    # shellcheck disable=SC2254  # a pattern on purpose
    case $wwid in
        $WWID_PATTERN) ;;
        *) fail "wwid is $wwid, not $WWID_PATTERN" ;;
    esac
}

t_get_feature() {
    # 07h Number of Queues, 0Bh Asynchronous Event Configuration, 0Fh Keep Alive Timer.
    for feature in 0x07 0x0b 0x0f; do
        nvme get-feature "$(rw_ctrl)" -f $feature || fail "get-feature $feature failed"
    done
}

# --- I/O commands --------------------------------------------------------------------------------

t_prefilled() {
    [ "$(sum_of "$(rw)" $(((RW_MIB - 4) * 1024)) 4096)" = "$PREFILL_SUM" ] ||
        fail "not the bytes that the outside host wrote into the file"
}

t_flush() { nvme flush "$(rw)" -n 1; }

t_write_zeroes() {
    dev=$(rw)
    dd if=/dev/urandom of="$dev" bs=64k seek=16 count=4 oflag=direct status=none
    lbs=$(cat "/sys/block/$(basename "$dev")/queue/logical_block_size")
    # 64 KiB of zeros in the middle of 256 KiB of noise; the block count is zero-based.
    before=$(sum_of "$dev" 1024 64)$(sum_of "$dev" 1152 128)
    nvme write-zeroes "$dev" -n 1 -s $((1088 * 1024 / lbs)) -c $((65536 / lbs - 1)) || fail "nvme write-zeroes failed"
    dd if=/dev/zero of=/tmp/zero bs=64k count=1 status=none
    dd if="$dev" of=/tmp/back bs=64k skip=17 count=1 iflag=direct status=none
    cmp /tmp/zero /tmp/back || fail "not zero afterwards"
    [ "$before" = "$(sum_of "$dev" 1024 64)$(sum_of "$dev" 1152 128)" ] || fail "the neighbours changed"
}

# Deallocate may change the range only, and never the file's map (which host-test.sh compares at the end).
t_dsm() {
    dev=$(rw)
    lbs=$(cat "/sys/block/$(basename "$dev")/queue/logical_block_size")
    dd if=/dev/urandom of="$dev" bs=64k seek=32 count=3 oflag=direct status=none
    before=$(sum_of "$dev" 2048 64)$(sum_of "$dev" 2176 64)
    nvme dsm "$dev" -n 1 -d -s $((2112 * 1024 / lbs)) -b $((65536 / lbs)) || fail "nvme dsm failed"
    [ "$before" = "$(sum_of "$dev" 2048 64)$(sum_of "$dev" 2176 64)" ] || fail "the neighbours changed"
}

t_blkdiscard() {
    [ "$(cat "/sys/block/$(block_of "$NQN_RW" 1)/queue/discard_max_bytes")" != 0 ] || skip "the namespace offers no deallocate"
    blkdiscard --offset 4194304 --length 4194304 "$(rw)"
    round_trip "$(rw)"
}

t_ns_rescan() {
    nvme ns-rescan "$(rw_ctrl)"
    round_trip "$(rw)"
}

is_live() { [ "$(cat "/sys/class/nvme/$(controller_of "$NQN_RW")/state")" = live ]; }

t_reset() {
    nvme reset "$(rw_ctrl)" || fail "nvme reset failed"
    wait_for 30 is_live || fail "not live 30 s after the reset"
    round_trip "$(rw)"
}

# status_is PATTERN: what nvme-cli said of the last refused command. nvmet is not exact about it.
status_is() {
    cat /tmp/must_fail
    [ "$STRICT_STATUS" = 0 ] || grep -qi "$1" /tmp/must_fail || fail "the status does not say '$1'"
}

# A command out of range, a missing namespace, an unknown opcode: refused one by one, the connection stays.
t_refused_commands() {
    dev=$(rw)
    lbs=$(cat "/sys/block/$(basename "$dev")/queue/logical_block_size")
    blocks=$((RW_MIB * 1048576 / lbs))
    must_fail nvme read "$dev" -n 1 -s $blocks -c 0 -z "$lbs" -d /tmp/x
    status_is 'LBA'
    # The first block is inside, the second is not.
    must_fail nvme write "$dev" -n 1 -s $((blocks - 1)) -c 1 -z $((lbs * 2)) -d /bin/busybox
    status_is 'LBA'
    must_fail nvme get-log "$(rw_ctrl)" --log-id=0xbf --log-len=512
    must_fail nvme get-feature "$(rw_ctrl)" -f 0x7e
    must_fail nvme admin-passthru "$(rw_ctrl)" -o 0x7e
    status_is 'opcode'
    # An inactive namespace: an error beyond NN, otherwise a structure of zeros.
    if nvme id-ns "$(rw_ctrl)" -n 77 >/tmp/log 2>&1; then
        grep -q '^nsze *: 0$' /tmp/log || { cat /tmp/log; fail "namespace 77 should not exist"; }
    fi
    must_fail nvme io-passthru "$dev" -o 0x3c -n 1
    status_is 'opcode'
    is_live || fail "the controller is no longer live"
    round_trip "$dev"
}

# --- fio -----------------------------------------------------------------------------------------

# What fio said, and of its line of numbers only the errno. (What verify itself found goes to standard error, thus to
# the log.)
fio_says() {
    grep -v '^3;' "$1" || true
    sed -nE 's/^3;[^;]*;([^;]*);[^;]*;([0-9]+);.*/job \1 ended with error \2/p' "$1"
}

# verified NAME [options]: writes with checksums in every block, reads back; then a pass that only reads.
verified() {
    title=$1
    shift
    common="--name=$title --filename=$(rw) --direct=1 --thread --verify=crc32c --verify_fatal=1 --minimal --output=/tmp/fio"
    # shellcheck disable=SC2086
    timeout 170 fio $common --rw=randwrite --do_verify=1 "$@" || { fio_says /tmp/fio; fail "fio found a difference or an error ($?)"; }
    note "write $(cut -d';' -f49 /tmp/fio) IOPS $(cut -d';' -f48 /tmp/fio) KiB/s, read $(cut -d';' -f8 /tmp/fio) IOPS $(cut -d';' -f7 /tmp/fio) KiB/s"
    # shellcheck disable=SC2086
    timeout 170 fio $common --rw=randwrite --verify_only "$@" || { fio_says /tmp/fio; fail "the read-only pass failed ($?)"; }
}

t_fio_4k() { verified 4k --bs=4k --size=12m --iodepth=32 --ioengine=libaio; }
t_fio_mixed() { verified mixed --bsrange=4k-1m --blockalign=4k --size=32m --iodepth=32 --ioengine=io_uring; }
t_fio_1m() { verified 1m --bs=1m --size=32m --iodepth=32 --ioengine=libaio; }

# --- the target dies and comes back ---------------------------------------------------------------

# A direct read that gets through shows more than the state file does.
io_works() { timeout 20 /bin/dd if="$(rw)" of=/dev/null bs=4k count=1 skip=$((RANDOM % 1024)) iflag=direct status=none; }

back_again() {
    wait_for 60 is_live || fail "not live 60 s after $1"
    wait_for 60 io_works || fail "no I/O 60 s after $1"
}

AWAY="--name=away --direct=1 --thread --verify=crc32c --verify_fatal=1 --bsrange=4k-32k --blockalign=4k --size=16m --iodepth=16 --ioengine=libaio --rw=randwrite --minimal"

# Writes and verifies without a pause, other bytes and another order in every round, until /tmp/away_done is there.
away_load() {
    # Linux 6.12 sends on a socket that the target has closed without MSG_NOSIGNAL, in the context of whoever submits:
    # without this, fio would be killed by SIGPIPE for it.
    trap '' PIPE
    round=0
    while [ ! -e /tmp/away_done ]; do
        round=$((round + 1))
        # shellcheck disable=SC2086
        fio $AWAY --filename="$1" --randseed=$round --do_verify=1 --verify_backlog=64 --output=/tmp/fio_away ||
            { echo "fio of round $round exits with $?"; return 1; }
        echo $round >/tmp/away_rounds
    done
}

# t_away VERBS...: each verb is done to the target by the outside host while fio writes and verifies.
t_away() {
    rm -f /tmp/away_done
    dev=$(rw)
    away_load "$dev" &
    load=$!
    times='' pause=2
    for verb; do
        sleep $pause
        # The next blow falls elsewhere in the load's round.
        pause=$((pause % 3 + 1))
        kill -0 $load 2>/dev/null || fail "fio found a difference or an error before '$verb': $(fio_says /tmp/fio_away)"
        busy=$(awk '{ print $1 + $2 }' "/sys/block/$(basename "$dev")/inflight")
        host_cmd "$verb" || fail "the host could not do '$verb'"
        t0=$(cut -d. -f1 /proc/uptime)
        back_again "$verb"
        times="$times $verb with $busy in flight: back after $(($(cut -d. -f1 /proc/uptime) - t0)) s;"
    done
    sleep 1
    touch /tmp/away_done
    wait $load || { fio_says /tmp/fio_away; fail "fio found a difference or an error ($?)"; }
    rounds=$(cat /tmp/away_rounds)
    # shellcheck disable=SC2086
    timeout 100 fio $AWAY --filename="$dev" --randseed="$rounds" --verify_only --output=/tmp/fio_away ||
        { fio_says /tmp/fio_away; fail "the read-only pass failed ($?)"; }
    note "$rounds rounds;$times"
}

# --- a filesystem on the namespace ------------------------------------------------------------------

t_xfs_write() {
    # Smaller than what mkfs.xfs takes without --unsupported (300 MB), for the sake of time.
    mkfs.xfs --unsupported -q -f -L hwtest "$(rw)"
    mount -t xfs "$(rw)" /mnt
    mkdir -p /mnt/many/deep
    dd if=/dev/urandom of=/mnt/large bs=1M count=8 status=none
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
        dd if=/dev/urandom of=/mnt/many/deep/$i bs=1000 count=$((i * 7)) status=none
    done
    cp /bin/busybox /mnt/many/program
    # Overwritten, truncated, renamed, removed: not only appended.
    dd if=/dev/urandom of=/mnt/large bs=4k seek=333 count=100 conv=notrunc,fsync status=none
    truncate -s 5000 /mnt/many/deep/16
    mv /mnt/many/deep/15 /mnt/fifteen
    rm /mnt/many/deep/14
    sync
    (cd /mnt && find . -type f ! -name SUMS | sort | xargs sha256sum) >/tmp/SUMS
    cp /tmp/SUMS /mnt/SUMS
    umount /mnt
    note "$(wc -l </tmp/SUMS) files"
    tell "FSSUM $(sha256sum /tmp/SUMS | cut -d' ' -f1)"
}

t_xfs_read() {
    xfs_repair -n "$(rw)" || fail "xfs_repair found damage"
    mount -t xfs -o ro "$(rw)" /mnt
    cmp /tmp/SUMS /mnt/SUMS
    (cd /mnt && sha256sum -c SUMS) || { umount /mnt; fail "a file differs"; }
    umount /mnt
}

# The whole namespace as this host sees it; the outside host compares it with the file.
t_whole_sum() { tell "HOSTSUM 0 $((RW_MIB * 1024)) $(sum_of "$(rw)" 0 $((RW_MIB * 1024)))"; }

# --- access --------------------------------------------------------------------------------------

t_read_only() {
    attach "$NQN_RO" --nr-io-queues 1
    dev=$(block_of "$NQN_RO" 1)
    [ "$(cat "/sys/block/$dev/ro")" = 1 ] || fail "the kernel does not take it for read-only"
    [ "$(sum_of "/dev/$dev" 0 $((RO_MIB * 1024)))" = "$RO_SUM" ] || fail "not the bytes of the file"
    must_fail dd if=/dev/zero of="/dev/$dev" bs=4k count=1 oflag=direct
    # The kernel refused that one by itself; these go past it, to the target.
    dd if=/dev/urandom of=/tmp/data bs=4k count=1 status=none
    lbs=$(cat "/sys/block/$dev/queue/logical_block_size")
    must_fail nvme io-passthru "/dev/$dev" -o 0x01 -n 1 -l 4096 --cdw12=$((4096 / lbs - 1)) -w -i /tmp/data
    cat /tmp/must_fail
    grep -qiE 'write.?protect|read.?only|0x?2?120|0x20\b' /tmp/must_fail || fail "the status is not Namespace Write Protected"
    must_fail nvme write-zeroes "/dev/$dev" -n 1 -s 0 -c 7
    must_fail nvme dsm "/dev/$dev" -n 1 -d -s 0 -b 8
    [ "$(sum_of "/dev/$dev" 0 $((RO_MIB * 1024)))" = "$RO_SUM" ] || fail "the bytes changed"
    detach "$NQN_RO"
}

# t_refused NQN HOSTNQN HOSTID PATTERN: the connect fails at once and leaves nothing; the kernel says why.
t_refused() {
    klog_mark
    must_fail timeout 30 nvme connect -t tcp -a "$TARGET_ADDRESS" -s "$TARGET_PORT" -n "$1" --hostnqn "$2" --hostid "$3"
    cat /tmp/must_fail
    klog_since_mark >/tmp/klog
    cat /tmp/klog
    grep -qE "$4" /tmp/klog || fail "the kernel log does not say: $4"
    ! controller_of "$1" || fail "a controller was left"
    klog_mark
}

# --- the order -----------------------------------------------------------------------------------

klog_mark
run discover-8009 60 t_discover "$DISCOVERY_PORT"
run discover-4420 60 t_discover "$TARGET_PORT"
run discover-foreign-host 60 t_discover_foreign
run connect-all 120 t_connect_all
run connect-1-queue 60 t_connect 1
run connect-4-queues 60 t_connect 4
run connect-1-queue-header-digest 60 t_connect 1 --hdr-digest
run connect-4-queues-data-digest 60 t_connect 4 --data-digest
run connect-1-queue-both-digests 60 t_connect 1 --hdr-digest --data-digest
run connect-4-queues-both-digests 60 t_connect 4 --hdr-digest --data-digest
run klog-connections 20 klog_judge

klog_mark
run attach 60 t_attach_main
attached=$?
if [ "$attached" = 0 ]; then
    run read-what-the-file-held 60 t_prefilled
    for t in id_ctrl id_ns ns_descs list list_ns list_subsys smart_log error_log fw_log effects_log wwid get_feature; do
        run "$(echo $t | tr _ -)" 30 t_$t
    done
    for t in flush write_zeroes dsm blkdiscard ns_rescan; do
        run "$(echo $t | tr _ -)" 60 t_$t
    done
    run klog-commands 20 klog_judge
    klog_mark
    run reset 60 t_reset
    # The kernel itself warns of a reset that was asked for.
    run klog-reset 20 klog_judge 'nvme nvme[0-9]+: resetting controller'
    run refused-commands 60 t_refused_commands

    klog_mark
    run fio-4k-verify 180 t_fio_4k
    run fio-mixed-verify 180 t_fio_mixed
    run fio-1m-verify 180 t_fio_1m
    run disconnect-reconnect 60 t_disconnect_reconnect
    run klog-fio 20 klog_judge

    klog_mark
    # shellcheck disable=SC2086  # a list of words on purpose
    run target-away-under-io 300 t_away $AWAY_VERBS
    run klog-target-away 20 klog_judge "$KLOG_AWAY"

    klog_mark
    run xfs-write 120 t_xfs_write
    run xfs-reconnect 60 t_disconnect_reconnect
    run xfs-read-and-repair 120 t_xfs_read
    run whole-namespace-sum 120 t_whole_sum
    run detach 60 detach "$NQN_RW"
    run klog-xfs 20 klog_judge 'XFS [(]nvme[0-9n]+[)]: (Mounting|Ending clean mount|Unmounting)|SGI XFS with'
fi

klog_mark
run read-only 60 t_read_only
run klog-read-only 20 klog_judge
run foreign-host-refused 60 t_refused "$NQN_RO" "$FOREIGN_NQN" "$FOREIGN_ID" 'is not allowed, hostnqn|Connect command failed|Connect Invalid Host'
run unknown-subsystem-refused 60 t_refused "$NQN_RW.unknown" "$HOST_NQN" "$HOST_ID" 'Connect Invalid (Data|SQE) Parameter'

[ "$POLICIES" = 0 ] || run_fences
