# shellcheck shell=bash disable=SC2034,SC2154  # joined to host-test.sh by the names of variables
# A stand-in for the harness' own test: the kernel's target (nvmet-tcp) in a second guest, whose drives
# are the same two files. Everything around it is the real thing: tap devices, the files on XFS,
# kill and restart, the comparison afterwards. `kill -9` of its QEMU is the death of the target.

target_wwid_pattern='uuid.*'
target_pins=0
target_policies=0
target_in_guest=1
# It answers an access out of range with Internal Error.
# A restart means a boot of 10 s and more.
target_away_verbs='kill-restart restart'
target_strict_status=0

target_pid=
target_log=$work/target.log

target_check() { say "target: nvmet-tcp in a second guest (self-test of the harness)"; }

target_configure() {
    make_overlay "$work/target-overlay" target-nvmet "$address/24"
    mkfifo "$work/target-control.in" "$work/target-control.out"
    exec {target_in}<>"$work/target-control.in" {target_out}<>"$work/target-control.out"
}

target_start() {
    local line
    : >"$work/target-console"
    "$here/run-guest.sh" --image "$image" --overlay "$work/target-overlay" --log "$work/target-console" --tap tap1 \
        --mac 52:54:00:00:00:01 --control "$work/target-control" --cpus 1 --drive "$rw_file" --drive "$ro_file" \
        >>"$target_log" 2>&1 &
    target_pid=$!
    for ((i = 0; i < 90; i++)); do
        if IFS= read -r -t 1 line <&"$target_out"; then
            printf '%s\n' "$line" >>"$target_log"
            [[ $line == READY* ]] && return 0
        fi
        if ! kill -0 "$target_pid" 2>/dev/null; then
            say "the target guest ended before it was ready"
            cat "$work/target-console" >>"$target_log"
            return 1
        fi
    done
    say "the target guest was not ready after 90 s"
    return 1
}

target_kill() {
    local pid
    # The script cleans up behind itself when its QEMU (the child of its `timeout`) dies.
    for pid in $(children_of "$target_pid"); do
        pid=$(children_of "$pid")
        [[ -z $pid ]] || kill -9 "$pid"
    done
    wait "$target_pid" 2>/dev/null || true
    cat "$work/target-console" >>"$target_log"
    target_pid=
}

target_stop() {
    [[ -n $target_pid ]] || return 0
    printf 'stop\n' >&"$target_in"
    for ((i = 0; i < 300; i++)); do
        kill -0 "$target_pid" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$target_pid" 2>/dev/null; then
        target_kill
        return 1
    fi
    target_pid=
}

target_release() { :; }
