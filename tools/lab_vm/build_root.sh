#!/bin/sh
# Make the root file system of the lab's virtual machine from Debian packages. Called by tests/lab/vm_image.py.
# Usage: build_root.sh ROOT.tar PUBLIC_KEY [ROOT_DEVICE [PACKAGE,PACKAGE...]]
# (root; mmdebstrap checks the archive's signatures)
set -eu
tar=$1
key=$2
device=${3:-/dev/vda}
further=${4:+,$4}

# What tdxhw assumes of a host: Python and sshd, no internet. The kernel's own KVM is what the suites run on.
packages=linux-image-amd64,openssh-server,python3-minimal,libpython3-stdlib,systemd-sysv,iproute2,procps,udev

mmdebstrap --quiet --mode=root --variant=minbase --format=tar \
    --include="$packages,initramfs-tools$further" \
    --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/lib/modules/*/kernel/drivers/gpu/*' \
    --dpkgopt='path-exclude=/usr/lib/modules/*/kernel/drivers/media/*' \
    --dpkgopt='path-exclude=/usr/lib/modules/*/kernel/sound/*' \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
    --essential-hook='printf "MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\n" >"$1/etc/initramfs-tools/conf.d/tdxhw"' \
    --essential-hook='printf "virtio_pci\nvirtio_blk\next4\n" >>"$1/etc/initramfs-tools/modules"' \
    --customize-hook='echo tdxhw-vm >"$1/etc/hostname"' \
    --customize-hook='printf "'"$device"' / ext4 defaults 0 1\n" >"$1/etc/fstab"' \
    --customize-hook='mkdir -p -m 700 "$1/root/.ssh"' \
    --customize-hook="upload '$key' /root/.ssh/authorized_keys" \
    --customize-hook='chmod 600 "$1/root/.ssh/authorized_keys"' \
    --customize-hook='printf "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n" >"$1/etc/systemd/network/50-wired.network"' \
    --customize-hook='printf "kvm_amd\n" >"$1/etc/modules-load.d/kvm.conf"' \
    --customize-hook='systemctl --root="$1" -q enable systemd-networkd ssh' \
    --customize-hook='systemctl --root="$1" -q mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer systemd-timesyncd.service' \
    trixie "$tar"
