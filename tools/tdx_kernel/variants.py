"""The kernels that the tests need, and where they are once they are built (``make tdx-kernel``)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
CACHE: Final = HERE.parents[1] / ".cache" / "tdx-kernel"

# The boot loader's initrd may bring an /init of its own; `rdinit=` names a program that only our initramfs has.
_BUILT_IN_INIT: Final = (
    'CONFIG_INITRAMFS_SOURCE="tdxhw-init.list"\nCONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="rdinit=/{}"\n'
)

VARIANTS: Final = {
    "good": "",
    "panic": _BUILT_IN_INIT.format("exits"),
    "hang": _BUILT_IN_INIT.format("hangs"),
    "nonet": "# CONFIG_VIRTIO_NET is not set\n",
    "worse": "# CONFIG_KVM_SW_PROTECTED_VM is not set\n",
}
"""What each changes in tdx-host.config: boots; panics once it has booted; hangs there; comes up without network; boots,
and has no KVM_X86_SW_PROTECTED_VM (a regression that every machine with KVM can show)."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: what it is made from, and where."""

    name: str  # of `VARIANTS`
    source: str  # "linux-source-7.2_7.2.13-1_all"

    @property
    def config(self) -> str:
        """The lines that are merged over ``make tinyconfig``."""
        version = f'CONFIG_LOCALVERSION="-tdxhw-{self.name}"\n'
        return (HERE / "tdx-host.config").read_text(encoding="utf-8") + version + VARIANTS[self.name]

    @property
    def folder(self) -> Path:
        """Where it is kept, by all that it is made from."""
        recipe = "\n".join((self.source, self.config, (HERE / "init.S").read_text(encoding="utf-8")))
        return CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:16]

    @property
    def deb(self) -> Path:
        """Its package, in Debian's classic form: image, configuration and modules in one."""
        return self.folder / f"linux-image-{self.name}.deb"

    @property
    def debug(self) -> Path:
        """Its ``vmlinux``, ``kvm.ko`` and ``kvm-intel.ko`` as linked, with BTF and DWARF. Only ``good`` keeps them."""
        return self.folder / "debug"

    def is_built(self) -> bool:
        """Whether it is in the cache, whole."""
        return self.deb.exists() and (self.name != "good" or self.debug.exists())


def built(name: str) -> Kernel | None:
    """Return the kernel of that name from the newest source that it was built from; None if it is not in the cache."""
    sources = (path.read_text(encoding="utf-8").strip() for path in CACHE.glob("*/source.txt"))
    kernels = [Kernel(name, source) for source in sorted(set(sources), reverse=True)]
    return next((kernel for kernel in kernels if kernel.is_built()), None)
