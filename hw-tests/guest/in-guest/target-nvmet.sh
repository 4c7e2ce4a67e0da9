# shellcheck shell=sh
# Role: the kernel's own target (nvmet-tcp) on the drives of this guest. It stands where fastice stands
# when the harness is to be tested itself.

modprobe nvmet-tcp
modprobe nvme-tcp
nvmet=/sys/kernel/config/nvmet
mount -t configfs config /sys/kernel/config 2>/dev/null

# port ID NUMBER: a listener with both subsystems.
port() {
    mkdir "$nvmet/ports/$1"
    echo tcp >"$nvmet/ports/$1/addr_trtype"
    echo ipv4 >"$nvmet/ports/$1/addr_adrfam"
    echo "$TARGET_ADDRESS" >"$nvmet/ports/$1/addr_traddr"
    echo "$2" >"$nvmet/ports/$1/addr_trsvcid"
    ln -s "$nvmet/subsystems/$NQN_RW" "$nvmet/ports/$1/subsystems/$NQN_RW"
    ln -s "$nvmet/subsystems/$NQN_RO" "$nvmet/ports/$1/subsystems/$NQN_RO"
}

# subsystem NQN DEVICE UUID
subsystem() {
    mkdir "$nvmet/subsystems/$1" "$nvmet/subsystems/$1/namespaces/1"
    echo "$2" >"$nvmet/subsystems/$1/namespaces/1/device_path"
    # The same after every restart, as it must be for a host that comes back.
    echo "$3" >"$nvmet/subsystems/$1/namespaces/1/device_uuid"
    echo 1 >"$nvmet/subsystems/$1/namespaces/1/enable"
}

subsystem "$NQN_RW" /dev/vda 0b9f7a52-54f4-4a6b-8f7e-5b3f6ac0d001
subsystem "$NQN_RO" /dev/vdb 0b9f7a52-54f4-4a6b-8f7e-5b3f6ac0d002
echo 1 >"$nvmet/subsystems/$NQN_RW/attr_allow_any_host"
mkdir "$nvmet/hosts/$HOST_NQN"
ln -s "$nvmet/hosts/$HOST_NQN" "$nvmet/subsystems/$NQN_RO/allowed_hosts/$HOST_NQN"
port 1 "$TARGET_PORT"
port 2 "$DISCOVERY_PORT"

# nvmet knows read-only namespaces only by the Write Protect feature, which a host must set.
nvme connect -t tcp -a "$TARGET_ADDRESS" -s "$TARGET_PORT" -n "$NQN_RO" --hostnqn "$HOST_NQN" --hostid "$HOST_ID" -i 1
wait_for 20 controller_of "$NQN_RO"
nvme set-feature "/dev/$(controller_of "$NQN_RO")" -n 1 -f 0x84 -v 1
nvme disconnect -n "$NQN_RO"

tell READY
# Until the plug is pulled, or the host says so.
while read -r word <&5; do
    [ "$word" = stop ] && break
done
rm "$nvmet"/ports/*/subsystems/*
