"""The machine this process runs on: its real /dev/kvm."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tdxhw import __version__
from tdxhw.abi.notes import build_id
from tdxhw.errors import BackendUnavailable
from tdxhw.host import Backend, Provenance
from uapi_ctypes.dialect import Dialect, detect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KVM_API_VERSION
from uapi_ctypes.linux import LinuxKernel

DEV_KVM: Final = "/dev/kvm"
_NOTES: Final = Path("/sys/kernel/notes")
_TDX_MODULE_VERSION: Final = Path("/sys/devices/faux/tdx_host/version")
"""Where newer kernels publish the module's version (`drivers/virt/coco/tdx-host`)."""


def probe(kernel: Kernel) -> Dialect | None:
    """Open /dev/kvm, check that it is KVM, and return its TDX dialect, or None when it offers no TDX.

    Raise `BackendUnavailable` with a remedy when there is no usable /dev/kvm.
    """
    try:
        fd = kernel.open(DEV_KVM)
    except KvmError as error:
        raise BackendUnavailable(str(error)) from None
    try:
        version = kernel.ioctl(fd, KvmRequest.KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            raise BackendUnavailable(f"{DEV_KVM} speaks API version {version}, not {KVM_API_VERSION}")
        return detect(lambda cap: kernel.ioctl(fd, KvmRequest.KVM_CHECK_EXTENSION, cap))
    except KvmError as error:
        raise BackendUnavailable(f"{DEV_KVM} is no KVM device: {error}") from None
    finally:
        kernel.close(fd)


def open_local(*, reason: str, promises: Sequence[str] = ()) -> Backend:
    """Return the backend for this machine. Raise `BackendUnavailable` when there is no usable /dev/kvm."""
    dialect = probe(LinuxKernel())
    if dialect is None:
        reason += f"; {DEV_KVM} offers no TDX, so what needs it is skipped"
    return Backend("local", reason, (LocalHost(dialect),), frozenset(promises))


class LocalHost:
    """This machine."""

    id = "local"
    simulated = False

    def __init__(self, dialect: Dialect | None) -> None:
        self.kernel: Kernel = LinuxKernel()
        model, microcode = _cpu()
        self._provenance = {
            "backend": "local",
            "dialect": dialect.name if dialect else "none",
            "kernel": platform.release(),
            "build_id": build_id(_NOTES) or "unknown",  # a kernel that is built again keeps its release
            "tdx_module": _tdx_module(dialect),
            "cpu": model,
            "microcode": microcode,
            "tdxhw": __version__,
        }

    def provenance(self) -> Provenance:
        """Return where results of this machine come from."""
        return self._provenance

    def leftovers(self) -> Sequence[str]:
        """Return nothing: a kernel does not tell what it holds."""
        return ()

    def start_anew(self) -> None:
        """Do nothing: a test cannot restart the machine it runs on."""

    def debug_registers(self, vcpu_fd: int) -> Mapping[str, int] | None:  # noqa: ARG002
        """Return None: the hardware protects a TD's registers."""
        return None

    def close(self) -> None:
        """Do nothing."""


def _cpu() -> tuple[str, str]:
    """Return model name and microcode revision from /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.access("/proc/cpuinfo", os.R_OK) else ""
    found = dict(re.findall(r"^(model name|microcode)\s*: (.*)$", text, re.MULTILINE))
    return found.get("model name", "unknown"), found.get("microcode", "unknown")


def _tdx_module(dialect: Dialect | None) -> str:
    if dialect is None:
        return "none"
    try:
        return _TDX_MODULE_VERSION.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown (this kernel does not publish it)"
