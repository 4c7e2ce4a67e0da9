#!/bin/sh
# What init starts: the role of this guest decides.
# shellcheck disable=SC1090,SC1091  # paths of the guest
. /hw/params.sh
. /hw/lib.sh
open_control
tell "BOOTED $(uname -r), $(nproc) processors"
. "/hw/$GUEST_ROLE.sh"
tell DONE
# The last words must leave the serial port before the power goes.
sleep 1
