"""A disk that boots by itself: the lab's Debian with GRUB, as a real lab machine has it.

No loop device: mke2fs fills the partition from a folder, and GRUB's two images are written where its installer would
put them. ``grub.cfg`` is Debian's own: the first boot runs from a stub and ``update-grub`` replaces that.
"""

import hashlib
import shutil
import struct
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from tests.lab import vm_image
from tests.lab.vm_image import CACHE, SCRIPT, Image, run

_DISK_MIB: Final = 4096
_SECTOR: Final = 512
_PARTITION_START: Final = 2048  # [sectors]
_ROOT: Final = "/dev/vda1"
_PACKAGES: Final = "grub2-common,grub-pc-bin,dmsetup,kmod,xz-utils,zstd"
# Warnings and worse on the console, and nothing of systemd's: to an emulated machine each character is work.
_COMMAND_LINE: Final = "console=ttyS0 loglevel=5 systemd.show_status=0 panic=5 net.ifnames=0 mitigations=off"
_MODULES: Final = ("biosdisk", "part_msdos", "ext2", "serial", "terminal", "search", "normal")

# As Debian ships it (GRUB_DEFAULT=0: the newest kernel), but for the serial line.
_DEFAULT_GRUB: Final = f"""\
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="{_COMMAND_LINE}"
GRUB_TERMINAL=serial
GRUB_DISABLE_OS_PROBER=true
"""
# What a machine without devices to speak of does not need: half of the time that its boot takes.
_MASKED: Final = (
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount",
    "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service", "modprobe@drm.service", "modprobe@fuse.service",
    "getty-static.service", "systemd-battery-check.service", "systemd-update-done.service",
    "systemd-journal-flush.service",
    "systemd-userdbd.socket", "systemd-hostnamed.socket", "sshd-unix-local.socket", "systemd-random-seed.service",
)  # fmt: skip
_NOT_LOADED: Final = (
    "aesni_intel", "ccp", "cfg80211", "efi_pstore", "evdev", "ghash_clmulni_intel", "i2c_i801", "iTCO_wdt", "lpc_ich",
    "pcspkr", "polyval_clmulni", "psmouse", "qemu_fw_cfg", "serio_raw", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3",
    "vga16fb", "vmw_vsock_vmci_transport", "vsock_loopback",
)  # fmt: skip

_STUB: Final = """\
serial --speed=115200
terminal_input serial
terminal_output serial
linux /boot/{kernel} root={root} ro {command_line}
initrd /boot/{initrd}
boot
"""


def build() -> Image:
    """Return the image; make it if it is not in the cache (root, mmdebstrap, a minute and 900 MiB)."""
    recipe = b"".join(path.read_bytes() for path in (SCRIPT, Path(__file__), Path(vm_image.__file__)))
    image = Image(CACHE / f"grub-{hashlib.sha256(recipe).hexdigest()[:16]}")
    if not image.disk.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as folder:
            _make(Image(Path(folder) / "image"))
            shutil.rmtree(image.folder, ignore_errors=True)
            (Path(folder) / "image").rename(image.folder)
    return image


def _make(image: Image) -> None:
    image.folder.mkdir()
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tdxhw lab vm", "-f", image.client_key)
    packed = image.folder / "root.tar"
    run("sh", SCRIPT, packed, image.client_key.with_suffix(".pub"), _ROOT, _PACKAGES, timeout_s=900)
    root = image.folder / "root"
    with tarfile.open(packed) as tar:
        # Devices and set-uid programs: it is a root file system. (Debian 12's Python has no filters, and needs none.)
        tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        tar.extractall(root)
    packed.unlink()
    shutil.copy(root / "etc/ssh/ssh_host_ed25519_key.pub", image.folder)
    core = _install_grub(root)
    raw = image.folder / "disk.raw"
    with raw.open("wb") as disk:
        disk.truncate(_DISK_MIB << 20)
    room = (_DISK_MIB << 10) - _PARTITION_START * _SECTOR // 1024  # [KiB]
    offset = f"offset={_PARTITION_START * _SECTOR}"
    run("mke2fs", "-q", "-t", "ext4", "-L", "tdxhw-root", "-E", offset, "-d", root, raw, f"{room}k")
    _write_boot_sectors(raw, (root / "usr/lib/grub/i386-pc/boot.img").read_bytes(), core)
    shutil.rmtree(root)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image.disk)
    raw.unlink()


def _install_grub(root: Path) -> bytes:
    """Do what grub-install does with files; return what it would write after the boot sector."""
    modules = root / "boot/grub/i386-pc"
    modules.mkdir(parents=True)
    for pattern in ("*.mod", "*.lst"):
        for file in (root / "usr/lib/grub/i386-pc").glob(pattern):
            shutil.copy(file, modules)
    (root / "etc/default/grub").write_text(_DEFAULT_GRUB)
    for unit in _MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    blacklist = "".join(f"blacklist {module}\n" for module in _NOT_LOADED)
    (root / "etc/modprobe.d/tdxhw-vm.conf").write_text(blacklist)
    kernel, initrd = (next((root / "boot").glob(pattern)).name for pattern in ("vmlinuz-*", "initrd.img-*"))
    (root / "boot/grub/grub.cfg").write_text(
        _STUB.format(kernel=kernel, initrd=initrd, root=_ROOT, command_line=_COMMAND_LINE)
    )
    run("chroot", root, "grub-editenv", "/boot/grub/grubenv", "create")
    prefix, output = "(hd0,msdos1)/boot/grub", "/boot/grub/i386-pc/core.img"
    run("chroot", root, "grub-mkimage", "-O", "i386-pc", "-p", prefix, "-o", output, *_MODULES)
    return (modules / "core.img").read_bytes()


def _write_boot_sectors(disk: Path, boot: bytes, core: bytes) -> None:
    """Write the boot code, a table of one active Linux partition, and GRUB's core in the gap before it."""
    assert len(core) < (_PARTITION_START - 1) * _SECTOR
    sectors = disk.stat().st_size // _SECTOR - _PARTITION_START
    first = bytearray(_SECTOR)
    first[:440] = boot[:440]
    first[0x66:0x68] = b"\x90\x90"  # boot from whatever drive the BIOS says, as grub-install patches it
    first[440:444] = b"tdxh"
    first[446:462] = struct.pack("<B3sB3sII", 0x80, b"\x20\x21\x00", 0x83, b"\xff\xff\xff", _PARTITION_START, sectors)
    first[510:] = b"\x55\xaa"
    with disk.open("r+b") as file:
        file.write(first)
        file.write(core)
