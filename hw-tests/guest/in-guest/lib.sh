# shellcheck shell=sh disable=SC2034,SC3045  # used by scenario.sh; busybox has read -t
# Guest side: reporting over the control port, running one scenario, finding devices, judging the kernel log.
# The shell is busybox ash. /hw/params.sh has been sourced before (see host-test.sh for its variables).

# The second serial port, joined to host-test.sh: one message a line, both ways.
open_control() {
    stty -F /dev/ttyS1 -echo -opost -icrnl 115200
    exec 5<>/dev/ttyS1
}

tell() {
    echo "$*" >&5
    echo "[$(cut -d' ' -f1 /proc/uptime)] $*"
}

# Asks host-test.sh to do something and waits for its answer: "ok" or "fail <why>".
host_cmd() {
    tell "HOSTCMD $*"
    answer=
    read -r -t 150 answer <&5
    [ "$answer" = ok ] && return 0
    echo "the host answered: ${answer:-nothing for 150 s}"
    return 1
}

# This busybox prefers its own applets to the files in /bin. These have to be the full programs.
dd() { /bin/dd "$@"; }
blkdiscard() { /bin/blkdiscard "$@"; }

# run NAME SECONDS FUNCTION [ARGS]: one scenario, one RESULT line.
# The function runs under `set -e` in its own process; what it printed last becomes the detail of a failure.
run() {
    name=$1 limit=$2
    shift 2
    wanted "$name" || return 0
    begin=$(cut -d. -f1 /proc/uptime)
    (set -eu; "$@") >/tmp/out 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ $(($(cut -d. -f1 /proc/uptime) - begin)) -ge "$limit" ]; then
            # Who waits for what, for the reader of the console log.
            [ -n "${METAL:-}" ] || echo w >/proc/sysrq-trigger
            kill -9 "$pid"
            tell "RESULT $name FAIL no end after $limit s; last: $(tail -n 1 /tmp/out)"
            cat /tmp/out
            explain
            return 1
        fi
        usleep 100000
    done
    wait "$pid"
    code=$?
    took=$(($(cut -d. -f1 /proc/uptime) - begin))
    case $code in
        0) tell "RESULT $name PASS ${took} s$(note_of)" ;;
        77) tell "RESULT $name SKIP $(tail -n 1 /tmp/out)" ;;
        *) tell "RESULT $name FAIL $(tail -n 3 /tmp/out | tr '\n\r\t' '|  ' | cut -c 1-400)"; echo "--- output of $name (exit $code)"; cat /tmp/out; explain; echo "---" ;;
    esac
    return "$code"
}

# explain: what a reader of the log may want after a failure. A role may say more.
explain() { :; }

# chain PREFIX "STEP SECONDS FUNCTION [ARGS]"...: scenarios that stand on each other. After one that failed or was
# skipped, the others are skipped. (An empty step is left out.)
chain() {
    prefix=$1 broken=
    shift
    for step; do
        # shellcheck disable=SC2086  # a list of words on purpose
        set -- $step
        [ $# != 0 ] || continue
        step=$prefix-$1
        shift
        if [ -n "$broken" ]; then
            ! wanted "$step" || tell "RESULT $step SKIP not run, as $broken was not passed"
        else
            run "$step" "$@" || broken=$step
        fi
    done
    [ -z "$broken" ]
}

# With ONLY (a regular expression) the other scenarios are left out, except what they all stand on.
wanted() {
    [ -z "$ONLY" ] && return 0
    echo "$1" | grep -qE "^(attach|detach)\$|$ONLY"
}

# A scenario may leave a remark for its PASS line with `note`.
note() { echo "$*" >/tmp/note; }
note_of() { [ -s /tmp/note ] && echo ", $(cat /tmp/note)"; rm -f /tmp/note; }

# fail MESSAGE: ends the scenario.
fail() { echo "$*"; exit 1; }
skip() { echo "$*"; exit 77; }
# must_fail COMMAND...: succeeds when the command fails; its output goes to /tmp/must_fail.
must_fail() {
    if "$@" >/tmp/must_fail 2>&1; then
        cat /tmp/must_fail
        fail "succeeded, but should not: $*"
    fi
}

# --- devices -------------------------------------------------------------------------------------

# controller_of NQN: name of the (first) controller, e.g. nvme0.
controller_of() {
    for c in /sys/class/nvme/nvme*; do
        [ -e "$c/subsysnqn" ] || continue
        if [ "$(cat "$c/subsysnqn")" = "$1" ]; then
            basename "$c"
            return 0
        fi
    done
    return 1
}

# block_of NQN NSID: name of the block device that a user sees, e.g. nvme0n1.
# With native multipathing the per-path devices (nvme0c0n1) are hidden and passed over.
block_of() {
    for b in /sys/block/nvme*; do
        [ -e "$b/nsid" ] || continue
        [ "$(cat "$b/hidden")" = 0 ] || continue
        if [ "$(cat "$b/nsid")" = "$2" ] && [ "$(cat "$b/device/subsysnqn")" = "$1" ]; then
            basename "$b"
            return 0
        fi
    done
    return 1
}

# wait_for SECONDS COMMAND...: polls until it succeeds.
wait_for() {
    end=$(($(cut -d. -f1 /proc/uptime) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ] || return 1
        usleep 100000
    done
}

size_is_known() { [ "$(cat "/sys/block/$(block_of "$1" "$2")/size")" -gt 0 ]; }

# attach NQN [nvme-connect options]: connects as the host that may, and waits for namespace 1.
attach() {
    nqn=$1
    shift
    timeout 60 nvme connect -t tcp -a "$TARGET_ADDRESS" -s "$TARGET_PORT" -n "$nqn" --hostnqn "$HOST_NQN" --hostid "$HOST_ID" \
        --ctrl-loss-tmo 600 --reconnect-delay 1 "$@" || fail "nvme connect $* failed ($?)"
    wait_for 20 size_is_known "$nqn" 1 || fail "no namespace 1 of $nqn after 20 s"
}

detach() {
    timeout 60 nvme disconnect -n "$1" || fail "nvme disconnect failed"
    ! controller_of "$1" || fail "the controller is still there"
}

# The same bytes come back: small, large, and at odd places; past the page cache.
round_trip() {
    dev=$1
    dd if=/dev/urandom of=/tmp/data bs=64k count=12 status=none
    # Block size and count.
    for shape in "4096 32" "65536 12" "786432 1"; do
        bs=${shape% *} count=${shape#* }
        dd if=/tmp/data of="$dev" bs="$bs" count="$count" seek=3 oflag=direct conv=notrunc status=none
        dd if="$dev" of=/tmp/back bs="$bs" count="$count" skip=3 iflag=direct status=none
        head -c $((bs * count)) /tmp/data | cmp - /tmp/back || fail "read back differs at block size $bs"
    done
}

# sum_of DEVICE OFFSET_KIB LENGTH_KIB: MD5 of a range, past the page cache. (Nobody cheats here, and under
# emulation SHA-256 takes several times as long.)
sum_of() {
    dd if="$1" bs=64k skip=$(($2 / 64)) count=$(($3 / 64)) iflag=direct status=none | md5sum | cut -d' ' -f1
}

# --- kernel log ----------------------------------------------------------------------------------

# klog_mark: what follows is judged by the next klog_judge.
klog_mark() { echo "hw-mark" >/dev/kmsg; }

klog_since_mark() { dmesg -r | awk '/hw-mark$/ { n = 0; next } { line[n++] = $0 } END { for (i = 0; i < n; i++) print line[i] }'; }

# What a healthy connection logs, below the level of a warning.
KLOG_QUIET='nvme nvme[0-9]+: (new ctrl: |Removing ctrl: |creating [0-9]+ I/O queues|mapped [0-9]+/[0-9]+/[0-9]+ default/read/poll queues|rescanning namespaces|resetting controller)'
# What may be logged while the target is away: the loss, the tries, the return. No failed I/O, no changed identity.
KLOG_AWAY='nvme nvme[0-9]+: (starting error recovery|queue [0-9]+ socket state [0-9]+|Reconnecting in |failed to connect socket: -|Failed reconnect attempt |Successfully reconnected|queue [0-9]+: (timeout|no space|receive failed)|receive failed|failed to send request|I/O tag .*timeout|Property (Set|Get) error|Device not ready; aborting|reconnecting|long keepalive RTT|failed nvme_keep_alive_end_io)|block nvme[0-9]+n[0-9]+: no usable path - requeuing I/O|nvme_ns_head_submit_bio: [0-9]+ callbacks suppressed|nvme nvme[0-9]+: (sending AER|Async event)'
# How a kernel feels about being emulated on a busy machine. Timing only: also of an interrupt that comes when its vector
# was just freed.
KLOG_EMULATION='No irq handler for|hrtimer: interrupt took|clocksource: |hogged CPU for|perf: interrupt took too long|sched: RT throttling'
# Two kinds of lines are bad: any of level warning or worse, from whatever part of the kernel, and any line about
# NVMe or a filesystem that a healthy run does not log. $1: further allowed lines, as an extended regular expression.
klog_judge() {
    klog_since_mark | awk -v quiet="$KLOG_QUIET" -v also="$KLOG_EMULATION${1:+|$1}" '
        { level = substr($0, 2, index($0, ">") - 2) % 8 }
        $0 ~ also { next }
        level <= 4 { print; bad = 1; next }
        /nvme/ && $0 !~ quiet { print; bad = 1 }
        /I\/O error|Corruption|corrupted|hung task|blocked for more than/ { print; bad = 1 }
        END { exit bad }' >/tmp/klog || {
        echo "kernel log:"
        cat /tmp/klog
        return 1
    }
}
