#!/bin/sh
# Installs the programs that Tine runs, from the distribution's own packages,
# and with the argument `tests` what the tests need beside them. It says what it
# installs and why. When nothing is missing it is silent.
set -eu

os_release=${OS_RELEASE:-/etc/os-release} # the tests of this script set it
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf 'setup: %s\n' "$*" >&2; }
stop() { say "$*"; exit 1; }

missing=
# need PROGRAM-OR-PATH PACKAGE WHY
need() {
	if command -v "$1" >/dev/null || [ -e "$1" ]; then return; fi
	say "$2 is missing: $3"
	missing="$missing $2"
}

os() { (. "$os_release" && printf '%s' "${ID:-} ${ID_LIKE:-}") 2>/dev/null || true; }

case "$(uname -s) $(uname -m)" in
"Linux x86_64") ;;
*) stop "Tine runs on Linux on x86-64 only, and this is $(uname -s) on $(uname -m)" ;;
esac

ids=$(os)
need qemu-system-x86_64 qemu-system-x86 "runs the virtual machines, with or without KVM"
need mkfs.erofs erofs-utils "writes the read-only root filesystems of images"
need /sbin/mkfs.ext4 e2fsprogs "formats the scratch disks of machines"
need mmdebstrap mmdebstrap "makes Debian root filesystems, and fetches Debian's kernel"
if [ "${ids%% *}" != debian ]; then
	need "$keyring" debian-archive-keyring "checks the signatures of Debian's packages"
	need gpg gpg "lets mmdebstrap find the key that signed them"
fi
if [ "$(id -u)" != 0 ]; then
	need newuidmap uidmap "lets mmdebstrap work without root"
fi
if [ "${1:-}" = tests ] && ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	say "python3-venv is missing: forkd's published clients, which the tests drive, are Python"
	missing="$missing python3-venv"
fi
if [ "${1:-}" = tests ]; then
	need ip iproute2 "joins the servers of tests to the host, and looks at its network"
fi
[ -n "$missing" ] || exit 0

case " $ids " in
*" debian "* | *" ubuntu "*) ;;
*) stop "this distribution is not known here: install what Debian calls$missing, then try again" ;;
esac

sudo=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || stop "installing needs root, and there is no sudo: as root, run apt-get install$missing"
	sudo=sudo
fi

apt() {
	$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" >&2
}

say "installing$missing"
apt update
# The list is split into words on purpose.
# shellcheck disable=SC2086
apt install --yes --no-install-recommends $missing
say "done"
