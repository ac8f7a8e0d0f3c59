"""The exits of ``struct kvm_run`` by field name, as recordings show them."""

import struct
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from sim_backend.kvm.kvm_run_page import UNION
from sim_backend.kvm_recording import shown
from uapi_ctypes.kvm_run import KvmExit

ExitDecoder: TypeAlias = Callable[[memoryview], dict[str, Any]]


def decode_header(memory: memoryview) -> dict[str, Any]:
    """Return the outputs that every exit has."""
    ready, if_flag, flags = struct.unpack_from("<BBH", memory, 12)
    cr8, apic_base = struct.unpack_from("<QQ", memory, 16)
    return {
        "if_flag": if_flag,
        "ready_for_interrupt_injection": ready,
        "flags": flags,
        "cr8": shown(cr8),
        "apic_base": shown(apic_base),
    }


def decode_exit(memory: memoryview, reason: int) -> dict[str, Any]:
    """Return the reason's name and the fields of its union member."""
    decoder = _DECODERS.get(reason)
    fields = decoder(memory) if decoder is not None else {}
    return {"reason": KvmExit.name_of(reason), **fields}


def _io(memory: memoryview) -> dict[str, Any]:
    direction, size, port, count, offset = struct.unpack_from("<BBHIQ", memory, UNION)
    fields: dict[str, Any] = {
        "direction": "out" if direction else "in",
        "size": size,
        "port": port,
        "count": count,
        "data_offset": offset,
    }
    if direction:
        fields["data"] = "hex:" + bytes(memory[offset : offset + size * count]).hex()
    return fields


def _mmio(memory: memoryview) -> dict[str, Any]:
    phys_addr, data, length, is_write = struct.unpack_from("<Q8sIB", memory, UNION)
    fields: dict[str, Any] = {"phys_addr": shown(phys_addr), "len": length, "is_write": is_write}
    if is_write:
        fields["data"] = "hex:" + data[:length].hex()
    return fields


def _hypercall(memory: memoryview) -> dict[str, Any]:
    nr, *args, ret, flags = struct.unpack_from("<9Q", memory, UNION)
    return {"nr": shown(nr), "args": [shown(arg) for arg in args], "ret": shown(ret), "flags": shown(flags)}


def _internal_error(memory: memoryview) -> dict[str, Any]:
    suberror, ndata = struct.unpack_from("<II", memory, UNION)
    data = struct.unpack_from(f"<{min(ndata, 16)}Q", memory, UNION + 8)
    return {"suberror": suberror, "ndata": ndata, "data": [shown(word) for word in data]}


def _system_event(memory: memoryview) -> dict[str, Any]:
    kind, ndata = struct.unpack_from("<II", memory, UNION)
    data = struct.unpack_from(f"<{min(ndata, 16)}Q", memory, UNION + 8)
    return {"type": kind, "ndata": ndata, "data": [shown(word) for word in data]}


def _rdmsr(memory: memoryview) -> dict[str, Any]:
    error, reason, index = struct.unpack_from("<B7xII", memory, UNION)
    return {"error": error, "msr_reason": reason, "index": hex(index)}


def _wrmsr(memory: memoryview) -> dict[str, Any]:
    (data,) = struct.unpack_from("<Q", memory, UNION + 16)
    return {**_rdmsr(memory), "data": shown(data)}


def _memory_fault(memory: memoryview) -> dict[str, Any]:
    flags, gpa, size = struct.unpack_from("<3Q", memory, UNION)
    return {"flags": shown(flags), "gpa": shown(gpa), "size": shown(size)}


def _debug(memory: memoryview) -> dict[str, Any]:
    exception, _pad, pc, dr6, dr7 = struct.unpack_from("<IIQQQ", memory, UNION)
    return {"exception": exception, "pc": shown(pc), "dr6": shown(dr6), "dr7": shown(dr7)}


def _exception(memory: memoryview) -> dict[str, Any]:
    exception, error_code = struct.unpack_from("<II", memory, UNION)
    return {"exception": exception, "error_code": error_code}


def _fail_entry(memory: memoryview) -> dict[str, Any]:
    reason, cpu = struct.unpack_from("<QI", memory, UNION)
    return {"hardware_entry_failure_reason": shown(reason), "cpu": cpu}


def _ioapic_eoi(memory: memoryview) -> dict[str, Any]:
    return {"vector": memory[UNION]}


def _notify(memory: memoryview) -> dict[str, Any]:
    (flags,) = struct.unpack_from("<I", memory, UNION)
    return {"flags": flags}


_DECODERS: Final[dict[int, ExitDecoder]] = {
    KvmExit.KVM_EXIT_EXCEPTION: _exception,
    KvmExit.KVM_EXIT_IO: _io,
    KvmExit.KVM_EXIT_HYPERCALL: _hypercall,
    KvmExit.KVM_EXIT_DEBUG: _debug,
    KvmExit.KVM_EXIT_MMIO: _mmio,
    KvmExit.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    KvmExit.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    KvmExit.KVM_EXIT_SYSTEM_EVENT: _system_event,
    KvmExit.KVM_EXIT_IOAPIC_EOI: _ioapic_eoi,
    KvmExit.KVM_EXIT_X86_RDMSR: _rdmsr,
    KvmExit.KVM_EXIT_X86_WRMSR: _wrmsr,
    KvmExit.KVM_EXIT_NOTIFY: _notify,
    KvmExit.KVM_EXIT_MEMORY_FAULT: _memory_fault,
}
