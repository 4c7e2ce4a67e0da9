#!/usr/bin/env bash
# Builds the engine for the fio that is installed here: target/release/libfastice_fio.so. What it prints last is its path.
#
# An engine has to be compiled against the headers of the very fio that loads it, and Debian's fio comes without. So the source of
# the installed package is fetched from where the package is from (6 MB, by apt-get, into target/fio-source; nothing of this
# machine's apt is changed), configured, and used for its headers alone.
#
# Exit status: 3 when fio, or its source, is not to be had.
#
# usage: build.sh                 CARGO, CARGO_TARGET_DIR as with cargo
#   PROFILE=dev                   target/debug/libfastice_fio.so
#   FIO=PROGRAM                   another fio than the one on PATH
#   FIO_SOURCE=DIRECTORY          its source, configured (where FIO was built, for example): nothing is fetched
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

profile=${PROFILE:-release}
fio=${FIO:-fio}
target=${CARGO_TARGET_DIR:-target}
here=bench/fio-engine
mkdir -p "$target"
target=$(realpath "$target")

say() { echo "fio-engine: $*" >&2; }
give_up() {
    say "$*"
    exit 3
}

program=$(command -v "$fio") || give_up "there is no $fio: apt-get install fio"
version=$("$program" --version)

# Options that let apt know one source and keep its files below $1, and nothing else.
apt_options() {
    printf -- '-o\n%s\n' "Dir::Etc::SourceList=$1/sources.list" Dir::Etc::SourceParts=/dev/null \
        "Dir::State::Lists=$1/lists" "Dir::Cache=$1/cache" APT::Sandbox::User=root Acquire::Languages=none
}

# Where the installed version is from, of lines below it: "  500 http://deb.debian.org/debian bookworm/main amd64 Packages".
origin() {
    apt-cache policy fio | sed -n '/^ \*\*\* /,$p' |
        sed -nE 's/^ +[0-9]+ ([a-z+]+:[^ ]+) ([^ ]+) [^ ]+ Packages$/\1 \2/p' | head -n 1
}

# fetch DIRECTORY: the source of the installed package, unpacked there.
fetch() {
    local directory=$1 apt work package origin uri suite component keys=
    dpkg-query -S "$(realpath "$program")" 2>/dev/null | grep -q '^fio:' ||
        give_up "$program is not of Debian's package: set FIO_SOURCE to where it was built"
    # shellcheck disable=SC2016  # dpkg's own
    package=$(dpkg-query -W -f '${source:Version}' fio)
    origin=$(origin)
    # The lists of a machine that was made small are not there.
    if [[ ! $origin ]] && ((EUID == 0)); then
        apt-get -qq update >&2 || true
        origin=$(origin)
    fi
    [[ $origin ]] || give_up "no archive that this machine knows has fio $package any more: apt-get update and upgrade it, or set FIO_SOURCE"
    read -r uri suite <<<"$origin"
    component=${suite##*/}
    suite=${suite%/*}
    [[ -r /usr/share/keyrings/debian-archive-keyring.gpg ]] && keys=' [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
    work=$(mktemp -d "$target/fio-source/fetch.XXXXXX")
    # shellcheck disable=SC2064  # now
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    echo "deb-src$keys $uri $suite $component" >"$work/sources.list"
    mapfile -t apt < <(apt_options "$work")
    say "fetching the source of fio $package from $uri"
    apt-get "${apt[@]}" -qq update >&2 || give_up "apt-get update failed for deb-src $uri $suite $component"
    (cd "$work" && apt-get "${apt[@]}" -qq source "fio=$package" >log 2>&1) ||
        { cat "$work/log" >&2; give_up "apt-get source fio=$package failed"; }
    mv "$work"/fio-*/ "$directory"
}

# The directory with the headers, in `source`.
find_source() {
    local found
    if [[ ${FIO_SOURCE:-} ]]; then
        source=$(realpath "$FIO_SOURCE")
        [[ -e $source/config-host.h ]] || give_up "$source is not configured: run ./configure there"
    else
        source=$target/fio-source/$version
        mkdir -p "$target/fio-source"
        [[ -d $source ]] || fetch "$source"
        # As Debian does: what is found on this machine besides changes nothing that an engine sees.
        [[ -e $source/configured ]] || (cd "$source" && ./configure --disable-native >configure.log && touch configured) ||
            give_up "see $source/configure.log"
    fi
    found=$(cd "$source" && sh ./FIO-VERSION-GEN >/dev/null 2>&1 && sed 's/^FIO_VERSION = //' FIO-VERSION-FILE)
    [[ $found == "$version" ]] || give_up "$source is of ${found:-no fio}, and $program is $version"
}

find_source
case $profile in dev) directory=debug ;; *) directory=$profile ;; esac
# Asked for here and not in Cargo.toml: crates below a static library would have to be compiled in another way than for the binary.
"${CARGO:-cargo}" rustc --locked -p fastice-fio --lib --crate-type staticlib --profile "$profile" >&2
built=$target/$directory
shim=$built/fastice_fio_engine.o
"${CC:-cc}" -std=gnu11 -O2 -g -fPIC -Wall -Wextra -Werror -D_GNU_SOURCE \
    -include "$source/config-host.h" -isystem "$source" -I"$here/shim" \
    "-DFASTICE_FIO_BUILT_FOR=\"$version\"" -c "$here/shim/engine.c" -o "$shim"
# What the shim takes from fio stays open until fio loads it; what is not fio's must be there. Threads of ours may outlive a job's
# use of the library by a moment, so it is never unloaded.
"${CC:-cc}" -shared -o "$built/libfastice_fio.so.new" "$shim" "$built/libfastice_fio.a" -Wl,--gc-sections \
    -Wl,--version-script="$here/shim/exports.map" -Wl,-z,nodelete -lgcc_s -lpthread -lm -ldl -lc
mv "$built/libfastice_fio.so.new" "$built/libfastice_fio.so"
say "built for $version; in a job: ioengine=external:$built/libfastice_fio.so"
echo "$built/libfastice_fio.so"
