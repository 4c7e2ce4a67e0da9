# shellcheck shell=bash disable=SC2034,SC2154  # joined to the drivers by the names of variables
# Shared by the drivers (host-test.sh, vfio-test.sh): an inner run in namespaces of its own, results, and the
# conversation with a guest over two FIFOs. $here is the directory of this file, sourced after lib.sh.

# --- outside: image, working directory, then the same script again, inside ---------------------------

# run_inside SCRIPT KEEP LIMIT LAST: builds the image, runs SCRIPT with HW_INNER=1 and ends this process with its code.
# Logs of the run go to $HW_CACHE/LAST, whatever happens. Before it, HW_CACHE may be set.
run_inside() {
    local script=$1 keep=$2 limit=$3 last=$4 started code=0
    started=$(now_ms)
    HW_IMAGE=$("$here/prepare-image.sh")
    HW_WORK=$(mktemp -d "${TMPDIR:-/tmp}/fastice-hw.XXXXXX")
    HW_CACHE=$(realpath "${HW_CACHE:-$here/../cache}")
    export HW_IMAGE HW_WORK HW_CACHE HW_LIMIT=$limit HW_INNER=1
    say "image ready in $((($(now_ms) - started) / 1000)) s: $HW_IMAGE"
    inner_pid=
    # (unshare itself takes no notice of SIGTERM; its child does.)
    # shellcheck disable=SC2064  # the value of now
    trap "end_inner; finish_outer $keep $last" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    # Processes, mounts and network live in namespaces of their own: whatever happens to this script, the kernel
    # ends and undoes them all, and no other mount on this machine is held busy (slave propagation). An ordinary user
    # has no such namespaces, and nothing to mount either: a guest is all there is, and it ends with its script.
    local private=(unshare --net --mount --propagation slave --pid --fork --kill-child=TERM --mount-proc)
    ((EUID == 0)) || private=()
    setpriv --pdeathsig KILL "${private[@]}" "$script" <&0 &
    inner_pid=$!
    wait "$inner_pid" || code=$?
    inner_pid=
    exit "$code"
}

end_inner() {
    local child
    [[ -n $inner_pid ]] || return 0
    if ((EUID == 0)); then
        for child in $(children_of "$inner_pid" 2>/dev/null); do
            kill -TERM "$child" || true
        done
    else
        kill -TERM "$inner_pid" || true
    fi
    wait "$inner_pid" || true
}

finish_outer() { # KEEP LAST
    local last=$HW_CACHE/$2
    rm -rf "$last"
    mkdir -p "$last"
    cp "$HW_WORK"/*.log "$HW_WORK"/*.toml "$last/" 2>/dev/null || true
    if (($1)); then
        say "kept: $HW_WORK"
    else
        rm -rf "$HW_WORK"
    fi
}

# --- inside: results --------------------------------------------------------------------------------

passed=0 failed=0 skipped=0

result() { # NAME PASS|FAIL|SKIP DETAIL
    case $2 in
        PASS) passed=$((passed + 1)) ;;
        FAIL) failed=$((failed + 1)) ;;
        SKIP) skipped=$((skipped + 1)) ;;
    esac
    printf 'RESULT %-36s %s %s\n' "$1" "$2" "${3:-}"
}

# judge NAME COMMAND...: a scenario on this side.
judge() {
    local name=$1 start code=0
    shift
    start=$(now_ms)
    # Not in a subshell: a command may change the state of the target.
    "$@" >"$work/judged" 2>&1 || code=$?
    { printf -- '--- %s\n' "$name" && cat "$work/judged"; } >>"$work/host.log"
    if ((code == 77)); then
        result "$name" SKIP "$(tail -n 1 "$work/judged")"
    elif ((code == 0)); then
        result "$name" PASS "$((($(now_ms) - start) / 1000)) s"
    else
        result "$name" FAIL "$(tail -n 2 "$work/judged" | tr '\n' ' ')"
    fi
}

summary() { # STARTED_MS
    printf 'hw-tests: %d passed, %d failed, %d skipped (%d s)\n' "$passed" "$failed" "$skipped" "$((($(now_ms) - $1) / 1000))"
    ((failed == 0))
}

# --- inside: one guest ------------------------------------------------------------------------------

# lay_overlay DIR ROLE: the directory that is laid over the image. Standard input: lines of shell, the parameters.
lay_overlay() {
    mkdir -p "$1/hw"
    cp "$here"/in-guest/*.sh "$1/hw/"
    install -m 755 "$here/in-guest/init" "$1/init"
    {
        printf "GUEST_ROLE='%s'\nONLY='%s'\n" "$2" "${HW_ONLY:-}"
        cat
    } >"$1/hw/params.sh"
}

guest_done=0

# One line of the guest. What only one of the drivers understands goes to its function `guest_said WORDS`, and what
# the guest wants done out here to `obey VERB...`. The answer is one line: "ok" or "fail <why>".
handle() {
    local line=${1%$'\r'} words
    read -r -a words <<<"$line"
    case ${words[0]:-} in
        RESULT) result "${words[1]}" "${words[2]}" "${words[*]:3}" ;;
        HOSTCMD)
            say "the guest asks: ${words[*]:1}"
            if obey "${words[@]:1}"; then echo ok >&"$to_guest"; else echo "fail ${words[*]:1}" >&"$to_guest"; fi
            ;;
        DONE) guest_done=1 ;;
        BOOTED) say "guest booted after $((($(now_ms) - guest_start) / 1000)) s: ${words[*]:1}" ;;
        *) guest_said "${words[@]}" || say "guest: $line" ;;
    esac
}

# converse OPTIONS...: boots a guest over $work/overlay and listens to it until it has powered off.
# Returns its exit code (124: time over); guest_done says whether it came to its end.
converse() {
    local line part='' guest_pid code=0
    guest_done=0
    rm -f "$work"/guest-control.{in,out}
    mkfifo "$work/guest-control.in" "$work/guest-control.out"
    exec {to_guest}<>"$work/guest-control.in" {from_guest}<>"$work/guest-control.out"
    guest_start=$(now_ms)
    "$here/run-guest.sh" --image "$image" --overlay "$work/overlay" --log "$work/console.log" \
        --control "$work/guest-control" --timeout "$HW_LIMIT" "$@" >>"$work/host.log" 2>&1 &
    guest_pid=$!
    while kill -0 "$guest_pid" 2>/dev/null; do
        while IFS= read -r -t 1 line <&"$from_guest"; do
            line=$part$line part=''
            printf '%s\n' "$line" >>"$work/control.log"
            handle "$line"
        done
        # Time over in the middle of a line.
        part+=$line
    done
    wait "$guest_pid" || code=$?
    exec {to_guest}>&- {from_guest}<&-
    return "$code"
}

# guest_ended CODE [NAME]: the result of the guest as a whole.
guest_ended() {
    local name=${2:-guest}-ran-to-its-end
    if ((guest_done)) && (($1 == 0)); then
        result "$name" PASS "$((($(now_ms) - guest_start) / 1000)) s"
    else
        result "$name" FAIL "exit code $1 (124: time over); last words: $(tail -n 3 "$work/console.log" | tr '\n\r' '| ')"
    fi
}
