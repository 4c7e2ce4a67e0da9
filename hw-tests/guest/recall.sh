# shellcheck shell=bash disable=SC2034,SC2154  # joined to host-test.sh by the names of variables
# Outside of the guest: fences by each policy, and the live recall. A root of this machine breaks the pins of files that
# the guest uses, and afterwards every block of the filesystem under the recalled file is looked at.
#
#   recall.xfs (64 MiB):  recall.img, fragmented  <-- the guest's fio writes self-describing blocks
#                         recall.img.filler       (between its extents)
#                         thief                   takes every block that the truncation frees, at once

readonly recall_mib=16 policy_mib=4 recall_left=$((8 << 20))
readonly nqn_ana=nqn.2026-11.io.fastice:ana nqn_wp=nqn.2026-11.io.fastice:write-protect nqn_recall=nqn.2026-11.io.fastice:recall
# A host of its own, so that the others need not see these subsystems.
readonly policy_nqn=nqn.2014-08.org.nvmexpress:uuid:6d2a1a5e-9d43-4c11-9f0a-000000000002
readonly policy_id=6d2a1a5e-9d43-4c11-9f0a-000000000002

recall_mounted=0 recall_pid='' recall_since=0

local_root() { perl "$here/local-root.pl" "$@"; }

now_us() { printf '%s' "${EPOCHREALTIME/[.,]/}"; }

make_policy_storage() {
    local name
    for name in ana wp; do
        dd if=/dev/zero of="$work/mnt/$name.img" bs=1M count=$policy_mib oflag=direct conv=fsync status=none
    done
    truncate -s 64M "$work/recall.xfs"
    mkfs.xfs --unsupported -q "$work/recall.xfs"
    mkdir "$work/recall"
    mount -t xfs -o loop "$work/recall.xfs" "$work/recall"
    recall_mounted=1
    recall_file=$work/recall/recall.img
    write_fragmented "$recall_file" "$recall_mib"
    sync -f "$work/recall"
    map_of "$recall_file" >"$work/recall.map"
    cp "$recall_file" "$work/recall.before"
    filler_sum=$(md5sum <"$recall_file.filler")
    (($(wc -l <"$work/recall.map") > 30)) || die "recall.img has only $(wc -l <"$work/recall.map") extents"
    : >"$work/timeline"
    : >"$work/acked"
}

drop_policy_storage() {
    ((recall_mounted)) || return 0
    umount "$work/recall"
    recall_mounted=0
}

policy_params() {
    cat <<PARAMS
POLICIES='$target_policies'
NQN_ANA='$nqn_ana'
NQN_WP='$nqn_wp'
NQN_RECALL='$nqn_recall'
POLICY_NQN='$policy_nqn'
POLICY_ID='$policy_id'
RECALL_MIB='$recall_mib'
PARAMS
}

# What the guest asks for. The recall runs beside the conversation, so that nothing of that waits for it.
obey_policy() {
    case $1 in
        break) local_root unflag "$target_pid" "$work/mnt/$2" >>"$work/host.log" ;;
        resume) target_resume "$work/mnt/$2" ;;
        recall)
            recall_since=$(now_us)
            local_root recall "$target_pid" "$recall_file" "$recall_left" "$work/recall/thief" >>"$work/timeline" 2>>"$work/host.log" &
            recall_pid=$!
            ;;
        recalled)
            wait "$recall_pid" || return 1
            target_tells "$recall_since" >>"$work/timeline"
            ;;
        *) return 1 ;;
    esac
}

# The guest's clock counts from its boot: CLOCK says what it shows now.
guest_boot_us=0

guest_said_of_recall() {
    case ${1:-} in
        CLOCK) guest_boot_us=$(($(now_us) - $2)) ;;
        SEEN) printf '%s\thost: %s\n' $((guest_boot_us + $2)) "${*:3}" >>"$work/timeline" ;;
        ACKED) printf '%s\n' "${*:2}" >>"$work/acked" ;;
        *) return 1 ;;
    esac
}

# after TEXT: when it stands in the timeline, in microseconds.
after() { sed -nE "s/^([0-9]+)\t.*$1.*/\1/p" "$work/timeline" | tail -n 1; }

# Fenced and drained before the guard lets go; then the host is told, and sees errors. (When the host sees an answer
# says little: it may have been on its way for long.)
recall_in_order() {
    local recalled drained released told failed
    recalled=$(after 'target: recalled') drained=$(after 'target: drained') released=$(after 'truncate returns')
    told=$(after 'kernel: .*rescanning namespaces') failed=$(after 'io_u error')
    [[ -n $recalled && -n $drained && -n $released ]] || left_out "there was no recall" || return
    [[ -n $told && -n $failed ]] || { echo "the host was not told, or saw no error"; return 1; }
    # The fence is in the log a little later than it fell.
    ((recalled <= drained && drained <= released + 1000)) || { echo "let go before it was drained"; return 1; }
    ((failed > released)) || { echo "the host saw an error before the recall"; return 1; }
}

recall_blocks() {
    [[ -s $work/acked ]] || left_out "there was no recall" || return
    [[ $(stat -c %s "$recall_file") == "$recall_left" ]] || { echo "recall.img has $(stat -c %s "$recall_file") bytes"; return 1; }
    map_of "$work/recall/thief" >"$work/thief.map"
    drop_policy_storage
    local_root blocks "$work/recall.xfs" "$work/recall.map" "$recall_left" "$work/recall.before" "$work/acked" "$work/thief.map" >"$work/blocks" || {
        cat "$work/blocks"
        return 1
    }
    cat "$work/blocks"
    xfs_repair -n "$work/recall.xfs"
}

# What stays of the file lies where it lay, and its neighbour in the filesystem was not touched.
recall_leaves_the_map() {
    mount -t xfs -o loop,ro "$work/recall.xfs" "$work/recall"
    recall_mounted=1
    local code=0
    [[ $(md5sum <"$recall_file.filler") == "$filler_sum" ]] || { echo "the filler changed"; code=1; }
    map_of "$recall_file" | awk 'NR == FNR { old[$1] = $2; next } old[$1] != $2 { print "moved: " $0; bad = 1 } END { exit bad }' "$work/recall.map" - || code=1
    drop_policy_storage
    return $code
}

# For the reader: what happened when, on both sides.
tell_recall() {
    [[ -s $work/acked ]] || return 0
    echo "live recall: a guest host under fio, a local chattr -i and truncate"
    echo "  (seconds from the chattr; the host's clock to some 20 ms, and answers may be long on their way to it)"
    local_root timeline "$work/timeline"
    sed 's/^/  /' "$work/blocks" "$work/status" 2>/dev/null || true
}

judge_recall() {
    judge recall-order recall_in_order
    judge recall-every-block recall_blocks
    judge recall-leaves-the-map recall_leaves_the_map
    tell_recall | tee "$work/recall.log"
}
