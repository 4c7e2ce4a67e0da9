# shellcheck shell=sh disable=SC2154  # sourced by scenario.sh; parameters
# The host while its target fences: what it sees by each policy (on_fence), and of a live recall. The outside host
# breaks the pins (`host_cmd break`, `recall`) and takes the files back (`resume`): see recall.sh there.

# shellcheck disable=SC2034  # for attach
as_policy_host() { HOST_NQN=$POLICY_NQN HOST_ID=$POLICY_ID; }

ana_state() { cat /sys/class/nvme/"$(controller_of "$1")"/nvme*n*/ana_state; }
is_ana() { [ "$(ana_state "$1")" = "$2" ]; }
is_protected() { [ "$(blockdev --getro "/dev/$1")" = "$2" ]; }
writes_of() { awk '{ print $5 }' "/sys/block/$1/stat"; }
has_written() { [ "$(writes_of "$1")" -ge "$2" ]; }

# A fence that lasts longer than a host without ANA tries: here nothing fails.
t_ana() {
    as_policy_host
    attach "$NQN_ANA" --nr-io-queues 2
    dev=$(block_of "$NQN_ANA" 1)
    is_ana "$NQN_ANA" optimized || fail "ana_state is $(ana_state "$NQN_ANA")"
    nvme ana-log "/dev/$(controller_of "$NQN_ANA")" >/tmp/log || { cat /tmp/log; fail "nvme ana-log failed"; }
    cat /tmp/log
    fio --name=ana --filename="/dev/$dev" --direct=1 --thread --verify=crc32c --verify_fatal=1 --rw=randwrite --bs=4k --size=2m \
        --rate_iops=,100 --iodepth=8 --ioengine=libaio --do_verify=1 --minimal --output=/tmp/fio &
    load=$!
    wait_for 40 has_written "$dev" 50 || fail "fio does not write"
    host_cmd break ana.img || fail "the pin could not be broken"
    wait_for 30 is_ana "$NQN_ANA" inaccessible || fail "fenced, and ana_state is $(ana_state "$NQN_ANA")"
    sleep 1
    before=$(writes_of "$dev")
    sleep 7
    [ "$(writes_of "$dev")" = "$before" ] || fail "$(writes_of "$dev") writes done instead of $before, while it is fenced"
    kill -0 $load || fail "fio does not wait: $(fio_says /tmp/fio)"
    host_cmd resume ana.img || fail "the file could not be resumed"
    wait_for 40 is_ana "$NQN_ANA" optimized || fail "resumed, and ana_state is $(ana_state "$NQN_ANA")"
    wait $load || fail "fio found a difference or an error: $(fio_says /tmp/fio)"
    note "fio waited for 8 s with $before writes done, and went on without an error to $(writes_of "$dev")"
    detach "$NQN_ANA"
}

t_write_protect() {
    as_policy_host
    attach "$NQN_WP" --nr-io-queues 1
    disk=$(block_of "$NQN_WP" 1)
    is_protected "$disk" 0 || fail "read-only from the start"
    round_trip "/dev/$disk"
    host_cmd break wp.img || fail "the pin could not be broken"
    wait_for 30 is_protected "$disk" 1 || fail "fenced, and not read-only"
    must_fail dd if=/dev/zero of="/dev/$disk" bs=4k count=1 oflag=direct
    # The kernel refused that one by itself; these go past it, to the target.
    lbs=$(cat "/sys/block/$disk/queue/logical_block_size")
    must_fail nvme io-passthru "/dev/$disk" -o 0x01 -n 1 -l 4096 --cdw12=$((4096 / lbs - 1)) -w -i /tmp/data
    status_is 'write.*protect\|read.*only'
    must_fail nvme read "/dev/$disk" -n 1 -s 0 -c 0 -z "$lbs" -d /tmp/x
    status_is 'not.ready'
    host_cmd resume wp.img || fail "the file could not be resumed"
    wait_for 40 is_protected "$disk" 0 || fail "resumed, and still read-only"
    round_trip "/dev/$disk"
    detach "$NQN_WP"
}

# A host without native multipath sees nothing of ANA: some tries, and then an error.
t_ana_without_multipath() {
    as_policy_host
    rmmod nvme_tcp
    rmmod nvme_fabrics
    rmmod nvme_core
    modprobe nvme-core multipath=N
    modprobe nvme-tcp
    attach "$NQN_ANA" --nr-io-queues 1
    disk=$(block_of "$NQN_ANA" 1)
    round_trip "/dev/$disk"
    host_cmd break ana.img || fail "the pin could not be broken"
    sleep 1
    begin=$(cut -d. -f1 /proc/uptime)
    must_fail timeout 60 /bin/dd if=/tmp/data of="/dev/$disk" bs=4k count=1 oflag=direct
    took=$(($(cut -d. -f1 /proc/uptime) - begin))
    { [ $took -ge 3 ] && [ $took -le 20 ]; } || fail "an error after $took s, not after five tries a second apart"
    host_cmd resume ana.img || fail "the file could not be resumed"
    round_trip "/dev/$disk"
    note "an error after $took s: $(tail -n 1 /tmp/must_fail | tr -d '\r')"
    detach "$NQN_ANA"
}

# --- the live recall -------------------------------------------------------------------------------

# Microseconds since boot, to a hundredth of a second.
uptime_us() { sed 's/ .*//; s/[.]//; s/^0*//; s/$/0000/' /proc/uptime; }

seen() { tell "SEEN $(uptime_us) $*"; }

# What the kernel has said since the mark, with its own times: the first lines, and how many more.
tell_klog() {
    klog_since_mark | sed -nE 's/^<[0-9]+>\[ *([0-9]+)[.]([0-9]{6})\] (.*nvme.*)/\1\2 kernel: \3/p' >/tmp/klog
    head -n 4 /tmp/klog | while read -r line; do tell "SEEN $line"; done
    more=$(tail -n +5 /tmp/klog | wc -l)
    [ "$more" = 0 ] || tell "SEEN $(tail -n 1 /tmp/klog | cut -d' ' -f1) kernel: ... and $more more lines like these"
}

# The disk, as soon as anything of it changes.
follow_disk() {
    was=
    while :; do
        now="the disk has $(cat "/sys/block/$1/size" 2>/dev/null) sectors, ro $(cat "/sys/block/$1/ro" 2>/dev/null), controller $(cat "/sys/class/nvme/$2/state" 2>/dev/null)"
        [ "$now" = "$was" ] || seen "$now"
        was=$now
        usleep 100000
    done
}

# fio writes each block once, and says in every 24 bytes of it whose it is, and where. Its log has every write that
# came back well.
recall_load() {
    fio --name=recall --filename="/dev/$1" --direct=1 --thread --rw=randwrite --bs=4k --size="${RECALL_MIB}m" --iodepth=8 --ioengine=libaio \
        --rate_iops=,400 --verify=pattern --verify_pattern='"FASTICE-REMOTE!!"%o' --do_verify=0 \
        --write_lat_log=/tmp/recall --log_offset=1 --log_unix_epoch=1 --minimal --output=/tmp/fio 2>&1 |
        {
            errors=0
            while read -r line; do
                case $line in fio:*) [ $errors != 0 ] || seen "$line"; errors=$((errors + 1)) ;; esac
            done
            seen "fio ends after $errors such errors"
        }
}

# Sets epoch_us: what the log's clock shows more than the one that counts from boot.
set_clocks() {
    second=$(date +%s)
    while [ "$(date +%s)" = "$second" ]; do :; done
    up=$(uptime_us)
    tell "CLOCK $up"
    epoch_us=$(((second + 1) * 1000000 - up))
}

t_recall() {
    as_policy_host
    attach "$NQN_RECALL" --nr-io-queues 2
    dev=$(block_of "$NQN_RECALL" 1)
    set_clocks
    klog_mark
    follow_disk "$dev" "$(controller_of "$NQN_RECALL")" &
    disk=$!
    rm -f /tmp/recall_*
    (recall_load "$dev"; touch /tmp/recall_done) &
    wait_for 60 has_written "$dev" 600 || fail "fio does not write"
    seen "fio has had $(writes_of "$dev") writes of 4 KiB acknowledged, and goes on"
    host_cmd recall || fail "the outside host could not begin"
    wait_for 60 [ -e /tmp/recall_done ] || fail "fio neither goes on nor fails"
    host_cmd recalled || fail "the outside host could not break the pin"
    kill $disk
    tell_klog
    wc -l /tmp/recall_clat.1.log
    # Milliseconds, latency in nanoseconds, direction, size, offset.
    tell "SEEN $(awk -F', ' -v ahead="$epoch_us" 'END { printf "%.0f last write acknowledged of %d", $1 * 1000 - ahead, NR }' /tmp/recall_clat.1.log)"
    awk -F', ' '{ line = line " " $5 / 4096 } NR % 64 == 0 { print line; line = "" } END { print line }' /tmp/recall_clat.1.log |
        while read -r offsets; do tell "ACKED $offsets"; done
    acked=$(wc -l </tmp/recall_clat.1.log)
    [ "$acked" -lt $((RECALL_MIB * 256)) ] || fail "fio was through before the recall"
    must_fail timeout 60 nvme read "/dev/$dev" -n 1 -s 0 -c 0 -z "$(cat "/sys/block/$dev/queue/logical_block_size")" -d /tmp/x
    status_is 'not.ready'
    note "$acked writes acknowledged, then $(fio_says /tmp/fio | tail -n 1)"
    detach "$NQN_RECALL"
}

# What the kernel says when commands are refused for a while, and of a path that is gone for a while.
KLOG_FENCED='nvme nvme[0-9]+: (rescanning namespaces|ANA group [0-9]+: [a-z-]+)|block nvme[0-9]+n[0-9]+: no usable path - requeuing I/O|nvme_ns_head_submit_bio: [0-9]+ callbacks suppressed'
KLOG_REFUSED='(critical target|I/O) error, dev nvme[0-9]+(c[0-9]+)?n[0-9]+|nvme[0-9]+(c[0-9]+)?n[0-9]+: I/O Cmd|Buffer I/O error on dev nvme[0-9]+n[0-9]+|Trying to write to read-only block-device|nvme_log_error: [0-9]+ callbacks suppressed'

run_fences() {
    klog_mark
    run fence-ana 150 t_ana
    run klog-fence-ana 20 klog_judge "$KLOG_FENCED"
    klog_mark
    run fence-write-protect 120 t_write_protect
    run klog-fence-write-protect 20 klog_judge "$KLOG_FENCED|$KLOG_REFUSED"
    run recall 180 t_recall
    run fence-ana-without-multipath 150 t_ana_without_multipath
}
