# shellcheck shell=sh disable=SC1091,SC2154  # sourced by main.sh; parameters
# Role: one program of vfio-test.sh --run, on the machine of nvme-machine.sh.
. /hw/devices.sh
modprobe -a xfs ext4
start_nvme "$VFIO_LETTERS"
stty -F /dev/ttyS2 raw -echo
cd /root || exit 1
sh /hw/command.sh >/dev/ttyS2 2>&1 </dev/null
code=$?
# The last bytes leave before the power goes.
stty -F /dev/ttyS2 sane
tell "EXIT $code"
