# shellcheck shell=bash disable=SC2034,SC2154  # joined to host-test.sh by the names of variables
# The target under test: `fastice serve` in this network namespace, outside the guest.
# Everything that depends on fastice's command line and configuration stands in this one file.
#
# Given by host-test.sh: $work $rw_file $ro_file $address $port $discovery_port $nqn_rw $nqn_ro $host_nqn

# The namespace's identity comes from its NGUID or EUI64, and a pin refuses what would change the file.
target_wwid_pattern='eui.*'
target_pins=1
target_policies=1
target_in_guest=0
target_away_verbs='kill-restart kill-restart restart'
target_strict_status=1

fastice=${FASTICE:-$here/../../target/release/fastice}
target_pid=
target_log=$work/target.log

target_check() {
    [[ -x $fastice ]] || fastice=$here/../../target/debug/fastice
    [[ -x $fastice ]] || die "no fastice binary; build it (cargo build --release) or set FASTICE=PATH"
    fastice=$(readlink -f "$fastice")
    say "target: $fastice"
}

target_configure() {
    cat >"$work/fastice.toml" <<TOML
state_dir = "$work/state"

[[listener]]
address = "$address:$port"

[[listener]]
address = "$address:$discovery_port"
discovery_only = true

[[subsystem]]
nqn = "$nqn_rw"
allow_any_host = true

[[subsystem.namespace]]
nsid = 1
file = "$rw_file"
device = "uring"

[[subsystem]]
nqn = "$nqn_ro"
hosts = ["$host_nqn"]

[[subsystem.namespace]]
nsid = 1
file = "$ro_file"
device = "uring"
read_only = true

[[subsystem]]
nqn = "$nqn_ana"
hosts = ["$policy_nqn"]

[[subsystem.namespace]]
nsid = 1
file = "$work/mnt/ana.img"
on_fence = "ana"

[[subsystem]]
nqn = "$nqn_wp"
hosts = ["$policy_nqn"]

[[subsystem.namespace]]
nsid = 1
file = "$work/mnt/wp.img"
on_fence = "write-protect"

[[subsystem]]
nqn = "$nqn_recall"
hosts = ["$policy_nqn"]

[[subsystem.namespace]]
nsid = 1
file = "$recall_file"
TOML
    mkdir -p "$work/state"
}

# Returns when it serves, or fails: it ended, or was not ready in time.
target_start() {
    local seen
    seen=$(stat -c %s "$target_log" 2>/dev/null || echo 0)
    "$fastice" serve --config "$work/fastice.toml" >>"$target_log" 2>&1 &
    target_pid=$!
    for ((i = 0; i < 600; i++)); do
        if tail -c +$((seen + 1)) "$target_log" | grep -qiw ready; then
            return 0
        fi
        if ! kill -0 "$target_pid" 2>/dev/null; then
            say "fastice ended before it was ready:"
            tail -n 5 "$target_log" >&2
            target_pid=
            return 1
        fi
        sleep 0.05
    done
    say "fastice was not ready after 30 s"
    return 1
}

# kill -9: nothing is drained, nothing released.
target_kill() {
    kill -9 "$target_pid"
    wait "$target_pid" 2>/dev/null || true
    target_pid=
}

# SIGTERM: drains, tells the hosts, releases. The exit code counts.
target_stop() {
    local code=0
    [[ -n $target_pid ]] || return 0
    kill -TERM "$target_pid" 2>/dev/null || true
    for ((i = 0; i < 300; i++)); do
        kill -0 "$target_pid" 2>/dev/null || break
        sleep 0.1
    done
    if kill -0 "$target_pid" 2>/dev/null; then
        say "fastice did not end within 30 s of SIGTERM"
        target_kill
        return 1
    fi
    wait "$target_pid" || code=$?
    target_pid=
    ((code == 0)) || say "fastice ended with $code after SIGTERM"
    return "$code"
}

# target_resume FILE: the operator has looked, and takes a file whose pin was broken as it is now.
target_resume() {
    local seen i
    # It can be resumed when the target has drained it and let go.
    for ((i = 0; i < 50; i++)); do
        ! env FASTICE_STATE_DIR="$work/state" "$fastice" pin --resume "$1" >>"$target_log" 2>&1 || break
        sleep 0.2
    done
    ((i < 50)) || return 1
    seen=$(grep -c 'configuration reloaded' "$target_log" || true)
    kill -HUP "$target_pid"
    for ((i = 0; i < 100; i++)); do
        (($(grep -c 'configuration reloaded' "$target_log" || true) > seen)) && return 0
        sleep 0.1
    done
    return 1
}

# target_tells SINCE: its events from then on, as lines of a timeline; what it says of its fences goes to $work/status.
target_tells() {
    local fenced
    # The log has microseconds. The fence falls on another thread, just before the recall is told.
    fenced=$(awk -v file="path=$recall_file " '/export fenced/ { at = $1 } /pin recalled/ && index($0, file) { last = at } END { print last }' "$target_log")
    fenced=$(date -u -d "$fenced" +%s%6N) || return 1
    FASTICE_STATE_DIR=$work/state "$fastice" status >"$work/status" 2>&1
    local_root events "$1" "$fenced" "$work"/state/*.events
}

# After the last stop: whatever still holds the files is let go. A pin that is left says so and fails.
target_release() {
    local file left=0
    for file in "$rw_file" "$ro_file"; do
        if lsattr "$file" 2>/dev/null | cut -d' ' -f1 | grep -q i; then
            say "still immutable after an orderly stop: $file"
            left=1
            "$fastice" unpin "$file" >>"$target_log" 2>&1 || chattr -i "$file"
        fi
    done
    return "$left"
}
