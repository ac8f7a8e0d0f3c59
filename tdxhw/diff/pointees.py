"""What a successful call left where a field of its argument points: bitmaps, registers, attributes, TDX structures.

Only read after a success: then the kernel has found the memory there, and reading it cannot fault.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final

from tdxhw.diff.fields import Fields, fields_of
from tdxhw.diff.names import Names
from uapi_ctypes.dialect import DIALECTS, Command, Dialect
from uapi_ctypes.flexible import Flexible
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import KvmDeviceAttr, KvmDirtyLog
from uapi_ctypes.kvm_state import KvmCpuid2, KvmOneReg
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion

_SYSTEM_OR_VCPU: Final = ("kvm", "vcpu")
"""Objects whose attributes are 64-bit values."""
_MOST_ENTRIES: Final = 256
"""KVM_MAX_CPUID_ENTRIES."""


def pointee(obj: str, request: int, argument: Any, names: Names) -> Fields:
    """Return what the call stored behind a pointer in `argument`, an object of the caller; often nothing."""
    reader = _READERS.get(request)
    return reader(obj, argument, names) if reader is not None else {}


def _dirty_log(obj: str, argument: Any, names: Names) -> Fields:
    if not isinstance(argument, KvmDirtyLog):
        return {}
    pages = names.slots.get((obj, argument.slot), 0) >> 12
    bitmap = ctypes.string_at(argument.dirty_bitmap, -(-pages // 64) * 8)
    return {"*dirty_bitmap": "hex:" + bitmap.rstrip(b"\0").hex()}


def _one_reg(_obj: str, argument: Any, _names: Names) -> Fields:
    if not isinstance(argument, KvmOneReg):
        return {}
    size = 1 << (argument.id >> 52 & 0xF)  # KVM_REG_SIZE
    return {"*addr": int.from_bytes(ctypes.string_at(argument.addr, size), "little")}


def _attribute(obj: str, argument: Any, _names: Names) -> Fields:
    if not isinstance(argument, KvmDeviceAttr) or not obj.startswith(_SYSTEM_OR_VCPU):
        return {}
    return {"*addr": int.from_bytes(ctypes.string_at(argument.addr, 8), "little")}


def _tdx(_obj: str, argument: Any, names: Names) -> Fields:
    for dialect in DIALECTS.values():
        if isinstance(argument, dialect.cmd):
            command: Any = argument
            layout = _tdx_structures(dialect).get(command.id)
            return fields_of(_at(command.data, layout), names, "*data.") if layout is not None else {}
    return {}


def _tdx_structures(dialect: Dialect) -> dict[int, type[Any]]:
    pairs: tuple[tuple[Command | None, type[Any]], ...] = (
        (dialect.capabilities_command, dialect.capabilities),
        (dialect.init_vm_command, dialect.init_vm),
        (dialect.init_mem_region, KvmTdxInitMemRegion),
        (dialect.get_cpuid, KvmCpuid2),
    )
    return {command.id: layout for command, layout in pairs if command is not None}


def _at(address: int, layout: type[Any]) -> Any:
    """Return a copy of the structure at `address` [HVA], with as many entries behind it as its count says."""
    if not issubclass(layout, Flexible):
        return layout.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(layout)))
    header = layout.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(layout)))
    made = layout.allocate(min(header.count, _MOST_ENTRIES))
    ctypes.memmove(ctypes.addressof(made), address, ctypes.sizeof(made))
    return made


_READERS: Final[dict[int, Callable[[str, Any, Names], Fields]]] = {
    KvmRequest.KVM_GET_DIRTY_LOG: _dirty_log,
    KvmRequest.KVM_GET_ONE_REG: _one_reg,
    KvmRequest.KVM_GET_DEVICE_ATTR: _attribute,
    KvmRequest.KVM_MEMORY_ENCRYPT_OP: _tdx,
}
