"""The kernel that runs this program: what it shows of itself in /proc and /sys, and its files."""

import gzip
import os
from pathlib import Path

from tdxhw.abi.image import KernelImage
from tdxhw.abi.kernel_files import MODULES, KernelFiles, Place, Role
from tdxhw.abi.notes import build_id


def running_kernel(folder: Path, root: Path = Path("/"), release: str = "") -> KernelFiles:
    """Return the running kernel; `root` is where its /proc, /sys, /boot and /lib are.

    Without a file of its own image: its BTF is what the kernel shows, its modules those in memory, else their files.
    """
    release = release or os.uname().release
    folder.mkdir(parents=True)
    kernel = KernelFiles(release, folder, given=["running"])
    kernel.image = KernelImage(release, build_id(root / "sys/kernel/notes"), "", b"")
    shown = root / "sys/kernel/btf"
    if (shown / "vmlinux").exists():
        kernel.base = shown / "vmlinux"
    lib = next((lib for lib in (root / "lib/modules", root / "usr/lib/modules") if (lib / release).is_dir()), None)
    _add_configuration(kernel, root, lib)
    if lib is not None:
        built_in = lib / release / "modules.builtin.modinfo"
        if built_in.exists():
            kernel.built_in = built_in.read_bytes()
        for module in MODULES:
            for file in sorted((lib / release).glob(f"**/{module}.ko*")):
                kernel.add(Place(Role.MODULE, release, module), file.read_bytes(), str(file))
    for module in MODULES:
        in_memory = shown / module.replace("-", "_")
        if in_memory.exists():
            kernel.modules[module] = in_memory
    parameter = root / "sys/module/kvm_intel/parameters/tdx"
    if parameter.exists():
        kernel.parameter = parameter.read_text(encoding="utf-8").strip()
    return kernel


def _add_configuration(kernel: KernelFiles, root: Path, lib: Path | None) -> None:
    compressed = root / "proc/config.gz"
    if compressed.exists():
        kernel.config = gzip.decompress(compressed.read_bytes()).decode("utf-8", "replace")
        kernel.config_from = "/proc/config.gz"
        return
    for path in (root / f"boot/config-{kernel.release}", *((lib / kernel.release / "config",) if lib else ())):
        if path.exists():
            kernel.config, kernel.config_from = path.read_text(encoding="utf-8"), str(path)
            return
