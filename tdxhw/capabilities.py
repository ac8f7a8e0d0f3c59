"""What a host can do, by name. Tests name capabilities; a probe asks the kernel and nothing else.

A probe answers with the reason why a capability is missing, or with an empty string.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeAlias

from tdxhw.errors import UnknownName
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import MAINLINE, V17, Dialect, detect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KVM_API_VERSION, KVM_MEMORY_ATTRIBUTE_PRIVATE, KvmVmType

DEV_KVM: Final = "/dev/kvm"


class Capabilities:
    """The capabilities of one host; each is probed once, when it is first asked for."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._answers: dict[str, str] = {}
        self._dialect: Dialect | None = None
        self._dialect_known = False

    @property
    def dialect(self) -> Dialect | None:
        """The TDX dialect of the kernel, or None without TDX."""
        if not self._dialect_known:
            try:
                with Kvm(self._kernel) as kvm:
                    self._dialect = detect(kvm.check_extension)
            except KvmError:
                self._dialect = None
            self._dialect_known = True
        return self._dialect

    @property
    def dialect_name(self) -> str:
        """The dialect's name, or an empty string without TDX."""
        return self.dialect.name if self.dialect else ""

    def missing(self, name: str) -> str:
        """Return why capability `name` is missing, or an empty string when it is there.

        Raise `UnknownName` when there is no such capability.
        """
        if name not in self._answers:
            probe = parse_capability(name)
            try:
                self._answers[name] = probe(self, self._kernel)
            except KvmError as error:
                self._answers[name] = str(error)
        return self._answers[name]


Probe: TypeAlias = Callable[[Capabilities, Kernel], str]


def _kvm(_host: Capabilities, kernel: Kernel) -> str:
    with Kvm(kernel) as kvm:
        version = kvm.get_api_version()
    return "" if version == KVM_API_VERSION else f"{DEV_KVM} speaks API version {version}, not {KVM_API_VERSION}"


def _tdx(host: Capabilities, _kernel: Kernel) -> str:
    return "" if host.dialect else "this kernel has no TDX (KVM_CAP_VM_TYPES shows no TD type)"


def _dialect(wanted: Dialect) -> Probe:
    def probe(host: Capabilities, kernel: Kernel) -> str:
        if host.dialect is None:
            return _tdx(host, kernel)
        return "" if host.dialect is wanted else f"this kernel speaks the {host.dialect} dialect"

    return probe


def _vm_type(vm_type: KvmVmType) -> Probe:
    def probe(_host: Capabilities, kernel: Kernel) -> str:
        with Kvm(kernel) as kvm:
            # A kernel that predates the bitmap has the default type only.
            types = kvm.check_extension(KvmCap.KVM_CAP_VM_TYPES) or 1
        return "" if types >> vm_type & 1 else f"KVM_CAP_VM_TYPES is {types:#x}, without type {vm_type.name}"

    return probe


def _default_vm_cap(cap: KvmCap, bits: int = 0) -> Probe:
    """Probe `cap` on a VM of the default type, where it may differ from /dev/kvm."""

    def probe(_host: Capabilities, kernel: Kernel) -> str:
        with Kvm(kernel) as kvm, kvm.create_vm(KvmVmType.KVM_X86_DEFAULT_VM) as vm:
            value = vm.check_extension(cap)
        if value and value & bits == bits:
            return ""
        return f"{cap.name} is {value:#x} for a default VM"

    return probe


def _td_cap(cap: KvmCap, bits: int = 0) -> Probe:
    """Probe `cap` on a TD, which needs no HKID yet."""

    def probe(host: Capabilities, kernel: Kernel) -> str:
        if host.dialect is None:
            return _tdx(host, kernel)
        with Kvm(kernel) as kvm, kvm.create_vm(host.dialect.tdx_vm_type) as vm:
            value = vm.check_extension(cap)
        if value and value & bits == bits:
            return ""
        return f"{cap.name} is {value:#x} for a TD"

    return probe


def _two_vcpus(_host: Capabilities, kernel: Kernel) -> str:
    with Kvm(kernel) as kvm:
        most = kvm.check_extension(KvmCap.KVM_CAP_MAX_VCPUS)
    return "" if most >= 2 else f"KVM_CAP_MAX_VCPUS is {most}"


def _hkids(wanted: int) -> Probe:
    """Count private HKIDs by holding that many TDs: no interface tells."""

    def probe(host: Capabilities, kernel: Kernel) -> str:
        if host.dialect is None:
            return _tdx(host, kernel)
        from tdxhw.td import count_hkids

        found = count_hkids(kernel, host.dialect, wanted)
        return "" if found >= wanted else f"only {found} private HKIDs are free"

    return probe


CAPABILITIES: Final[dict[str, Probe]] = {
    "kvm": _kvm,
    "vm-type-default": _vm_type(KvmVmType.KVM_X86_DEFAULT_VM),
    "vm-type-sw-protected": _vm_type(KvmVmType.KVM_X86_SW_PROTECTED_VM),
    "tdx": _tdx,
    "tdx-mainline": _dialect(MAINLINE),
    "tdx-v17": _dialect(V17),
    "guest-memfd": _default_vm_cap(KvmCap.KVM_CAP_GUEST_MEMFD),
    "memory-attributes": _default_vm_cap(KvmCap.KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE),
    "user-memory2": _default_vm_cap(KvmCap.KVM_CAP_USER_MEMORY2),
    "pre-fault": _default_vm_cap(KvmCap.KVM_CAP_PRE_FAULT_MEMORY),
    "td-pre-fault": _td_cap(KvmCap.KVM_CAP_PRE_FAULT_MEMORY),
    "td-map-gpa": _td_cap(KvmCap.KVM_CAP_EXIT_HYPERCALL),
    "two-vcpus": _two_vcpus,
}
"""Further: ``hkids>=N``."""

_HKIDS: Final = re.compile(r"hkids>=([1-9][0-9]*)")


@lru_cache
def parse_capability(name: str) -> Probe:
    """Return the probe for capability `name`. Raise `UnknownName` when there is none."""
    if match := _HKIDS.fullmatch(name):
        return _hkids(int(match[1]))
    try:
        return CAPABILITIES[name]
    except KeyError:
        raise UnknownName("capability", name, [*CAPABILITIES, "hkids>=N"]) from None
