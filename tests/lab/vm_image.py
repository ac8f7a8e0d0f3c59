"""The disk of the lab's virtual machine: made once from Debian packages, then taken from ``.cache`` by its content.

No loop device, no boot loader: mke2fs fills the file system from a folder, and QEMU loads the kernel itself.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "tools" / "lab_vm" / "build_root.sh"
CACHE: Final = ROOT / ".cache" / "lab-vm"
_DISK_MIB: Final = 2048


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable disk with its kernel, and the keys that go with it."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The root file system, qcow2. Never written to: a machine runs on a copy."""
        return self.folder / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        """What QEMU's ``-kernel`` takes."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """What QEMU's ``-initrd`` takes."""
        return self.folder / "initrd.img"

    @property
    def client_key(self) -> Path:
        """The private key that its root lets in. It opens this image and nothing else."""
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> str:
        """Its sshd's public key: ``ssh-ed25519 AAAA…``."""
        kind, key, *_ = (self.folder / "ssh_host_ed25519_key.pub").read_text(encoding="utf-8").split()
        return f"{kind} {key}"


def build() -> Image:
    """Return the image; make it if it is not in the cache (root, mmdebstrap, half a minute and 600 MiB)."""
    recipe = SCRIPT.read_bytes() + Path(__file__).read_bytes()
    image = Image(CACHE / hashlib.sha256(recipe).hexdigest()[:16])
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
    run("sh", SCRIPT, packed, image.client_key.with_suffix(".pub"), timeout_s=900)
    root = image.folder / "root"
    with tarfile.open(packed) as tar:
        # Devices and set-uid programs: it is a root file system. (Debian 12's Python has no filters, and needs none.)
        tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        tar.extractall(root)
    packed.unlink()
    for pattern, path in (("vmlinuz-*", image.kernel), ("initrd.img-*", image.initrd)):
        (found,) = (root / "boot").glob(pattern)
        shutil.copy(found, path)
    shutil.copy(root / "etc/ssh/ssh_host_ed25519_key.pub", image.folder)
    raw = image.folder / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", root, raw, f"{_DISK_MIB}m")
    shutil.rmtree(root)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image.disk)
    raw.unlink()


def run(*argv: str | Path, timeout_s: float = 300) -> None:
    """Run a program that has to work; what it says belongs to the error."""
    done = subprocess.run(
        [str(word) for word in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
