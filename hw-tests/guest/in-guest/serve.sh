# shellcheck shell=dash disable=SC2034,SC3028  # used by the other parts; busybox has RANDOM
# `fastice serve` beside the kernel, and its own initiator connecting to it over loopback. fastice's command line and
# TOML for NVMe controllers stand only here.

# Where pins, maps and bindings are recorded: for the commands by the environment.
export FASTICE_STATE_DIR=${FASTICE_STATE_DIR:-/var/lib/fastice-test}
SERVE_LOG=${SERVE_LOG:-/tmp/serve.log}
SERVE_CONFIG=/tmp/fastice.toml

nqn_of() { echo "nqn.2026-11.io.fastice:hw-$1"; }

# config_begin, then config_export for each export.
config_begin() {
    mkdir -p "$FASTICE_STATE_DIR"
    cat >"$SERVE_CONFIG" <<TOML
state_dir = "$FASTICE_STATE_DIR"
cores = $SERVE_CORES

[[listener]]
address = "$TARGET_ADDRESS:$TARGET_PORT"
TOML
}

# config_export NAME FILE LETTER [WAY]: a subsystem of its own. LETTER is the controller that fastice drives; with
# DEVICE=uring (a test of these scripts) the file is served through the kernel instead.
config_export() {
    cat >>"$SERVE_CONFIG" <<TOML

[[subsystem]]
nqn = "$(nqn_of "$1")"
allow_any_host = true

[[subsystem.namespace]]
nsid = 1
file = "$2"
device = "${4:-$DEVICE}"
TOML
    [ "$DEVICE" != nvme ] || printf '\n[[nvme]]\npci = "%s"\n' "$(pci_of "$3")" >>"$SERVE_CONFIG"
}

# After a failure: what fastice and the kernel said last.
explain() {
    [ ! -s "$SERVE_LOG" ] || { echo "--- fastice serve"; tail -n 40 "$SERVE_LOG"; }
    [ -n "${METAL:-}" ] || { echo "--- kernel"; dmesg | tail -n 25; }
}

serve_running() { [ -s /tmp/serve.pid ] && kill -0 "$(cat /tmp/serve.pid)" 2>/dev/null; }

# serve_start: returns when hosts can connect.
serve_start() {
    ! serve_running || fail "fastice serves already"
    cat "$SERVE_CONFIG"
    : >/tmp/serve.out
    # Not a child of this scenario: it serves on in the next one.
    setsid fastice serve --config "$SERVE_CONFIG" >/tmp/serve.out 2>>"$SERVE_LOG" </dev/null 5>&- &
    echo $! >/tmp/serve.pid
    wait_for 60 serve_ready_or_gone
    grep -q '^ready' /tmp/serve.out || { tail -n 3 "$SERVE_LOG"; fail "fastice serve is not ready"; }
}
serve_ready_or_gone() { grep -q '^ready' /tmp/serve.out || ! serve_running; }

# serve_refused PATTERN: it does not come up, and says why.
serve_refused() {
    local code=0
    timeout 60 fastice serve --config "$SERVE_CONFIG" >/tmp/refused 2>&1 || code=$?
    cat /tmp/refused
    [ $code != 0 ] && [ $code -lt 100 ] || fail "fastice serve was not refused but ended with $code"
    grep -qiE "$1" /tmp/refused || fail "it does not say: $1"
}

# serve_stop: in order. Whatever is not gone in time is killed and fails the scenario.
serve_stop() {
    local pid
    [ -s /tmp/serve.pid ] || fail "nothing serves"
    pid=$(cat /tmp/serve.pid)
    kill -TERM "$pid" || { tail -n 3 "$SERVE_LOG"; rm -f /tmp/serve.pid; fail "fastice serve was gone already"; }
    wait_for 40 serve_gone || { serve_kill; fail "fastice serve did not end within 40 s of SIGTERM"; }
    rm -f /tmp/serve.pid
    ! grep -qE 'panicked|this is a defect' "$SERVE_LOG" || fail "$(grep -E 'panicked|this is a defect' "$SERVE_LOG" | head -n 2)"
}
serve_gone() { ! serve_running; }

serve_kill() {
    [ -s /tmp/serve.pid ] || return 0
    kill -9 "$(cat /tmp/serve.pid)" 2>/dev/null || true
    wait_for 20 serve_gone
    rm -f /tmp/serve.pid
}

# --- the initiator ----------------------------------------------------------------------------------------------

# host_attach NAME, host_detach NAME, host_disk NAME: the namespace as a host of the target has it.
host_attach() { attach "$(nqn_of "$1")" --nr-io-queues 2 --nr-write-queues 0; }
host_detach() { detach "$(nqn_of "$1")"; }
host_disk() { echo "/dev/$(block_of "$(nqn_of "$1")" 1)"; }
host_live() { [ "$(cat "/sys/class/nvme/$(controller_of "$(nqn_of "$1")")/state")" = live ]; }

# A direct read that gets through shows more than a state file does.
host_reads() { timeout 20 /bin/dd if="$(host_disk "$1")" of=/dev/null bs=4k count=1 skip=$((RANDOM % 1024)) iflag=direct status=none; }

# --- fio ---------------------------------------------------------------------------------------------------------

# Every block carries its offset and a CRC32C. The same on whatever the bytes are read through.
fio_crc() { # NAME FILE [OPTIONS]
    local name=$1 file=$2
    shift 2
    timeout 170 fio --name="$name" --filename="$file" --direct=1 --thread --verify=crc32c --verify_fatal=1 --rw=randwrite \
        --ioengine=libaio --iodepth=32 --minimal --output=/tmp/fio-"$name" "$@" ||
        { sed -nE 's/^3;[^;]*;([^;]*);[^;]*;([0-9]+);.*/job \1 ended with error \2/p' /tmp/fio-"$name"; fail "fio $name found a difference or an error"; }
    # What was written last is told; a pass that only reads says nothing of it.
    case " $* " in *verify_only*) ;; *) cp /tmp/fio-"$name" /tmp/fio-written-"$name" ;; esac
}
fio_speed() { awk -F';' '{ print "write " $49 " IOPS, read " $8 " IOPS" }' "/tmp/fio-written-$1"; }

LOAD_4K='--bs=4k --size=6m'
LOAD_MIXED='--bsrange=4k-1m --blockalign=4k --offset=8m --size=16m'
