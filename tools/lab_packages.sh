#!/bin/sh
# See to what `make test-lab` needs of this machine. As root with apt-get: install what is missing; else say what is.
set -eu

missing=
need() { # PACKAGE COMMAND...: the package is missing unless one of the commands is there
    package=$1
    shift
    for command in "$@"; do
        if PATH="$PATH:/usr/sbin:/sbin" command -v "$command" >/dev/null; then return; fi
    done
    missing="$missing $package"
}

need openssh-server sshd
need openssh-client ssh-keygen
need iproute2 ip
need util-linux unshare
need procps pgrep
need chromium chromium google-chrome chromium-browser
need qemu-system-x86 qemu-system-x86_64
need qemu-utils qemu-img
need mmdebstrap mmdebstrap
need e2fsprogs mke2fs
need openipmi ipmi_sim
need ipmitool ipmitool
need openssl openssl
need bpftool bpftool
need dwarves pahole
need gcc cc
# Its server is not on anybody's PATH.
set -- /usr/lib/postgresql/*/bin/initdb
[ -x "$1" ] || missing="$missing postgresql"
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"

if [ "$(id -u)" != 0 ]; then
    echo "test-lab: hosts in network namespaces need root: sudo make test-lab" >&2
    [ -z "$missing" ] || echo "test-lab: and these packages: sudo apt-get install$missing" >&2
    exit 2
fi
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "test-lab: install what Debian calls:$missing" >&2
    exit 2
fi
# Else the new sshd would start on this machine itself, where nobody asked for one.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -q
# shellcheck disable=SC2086 # a list of packages
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $missing
