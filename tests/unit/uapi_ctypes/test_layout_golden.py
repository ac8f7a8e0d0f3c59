"""The binding against the layouts with which the answers of two real kernels were recorded."""

import ctypes
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from uapi_ctypes import kvm, kvm_state, tdx_mainline
from uapi_ctypes.ioctl import KvmRequest, size_of
from uapi_ctypes.kvm_run import KvmExit

GOLDEN: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parents[2] / "golden" / "kvm-structs.json.gz").read_bytes())
)

STRUCTS: dict[str, type[Any]] = {
    "region": kvm.KvmUserspaceMemoryRegion,
    "region2": kvm.KvmUserspaceMemoryRegion2,
    "create_guest_memfd": kvm.KvmCreateGuestMemfd,
    "memory_attributes": kvm.KvmMemoryAttributes,
    "pre_fault_memory": kvm.KvmPreFaultMemory,
    "enable_cap": kvm.KvmEnableCap,
    "regs": kvm_state.KvmRegs,
    "sregs": kvm_state.KvmSregs,
    "sregs2": kvm_state.KvmSregs2,
    "fpu": kvm_state.KvmFpu,
    "lapic": kvm_state.KvmLapicState,
    "xsave": kvm_state.KvmXsave,
    "mp_state": kvm_state.KvmMpState,
    "vcpu_events": kvm_state.KvmVcpuEvents,
    "debugregs": kvm_state.KvmDebugregs,
    "xcrs": kvm_state.KvmXcrs,
    "interrupt": kvm_state.KvmInterrupt,
    "irq_level": kvm.KvmIrqLevel,
    "irqchip": kvm.KvmIrqchip,
    "pit_config": kvm.KvmPitConfig,
    "pit_state2": kvm.KvmPitState2,
    "reinject": kvm.KvmReinjectControl,
    "irqfd": kvm.KvmIrqfd,
    "ioeventfd": kvm.KvmIoeventfd,
    "msi": kvm.KvmMsi,
    "dirty_log": kvm.KvmDirtyLog,
    "clear_dirty_log": kvm.KvmClearDirtyLog,
    "clock_data": kvm.KvmClockData,
    "guest_debug": kvm_state.KvmGuestDebug,
    "translation": kvm_state.KvmTranslation,
    "tpr_access_ctl": kvm_state.KvmTprAccessCtl,
    "create_device": kvm.KvmCreateDevice,
    "device_attr": kvm.KvmDeviceAttr,
    "coalesced_zone": kvm.KvmCoalescedMmioZone,
    "msr_filter": kvm.KvmMsrFilter,
    "one_reg": kvm_state.KvmOneReg,
    "enc_region": kvm.KvmEncRegion,
    "x86_mce": kvm_state.KvmX86Mce,
    "tdx_cmd": tdx_mainline.KvmTdxCmd,
    "sev_cmd": kvm.KvmSevCmd,
}
NOT_A_STRUCT = {"u64", "nested_state"}  # a bare number; header and area as one fixed-size buffer

# The recorder's own names: elements of arrays, and fields that it merged or renamed.
ARRAYS = {"args": "args", "pdptr": "pdptrs", "db": "db", "xcr": "xcrs", "r": "ranges"}
RENAMED = {
    ("sev_cmd", "pad"): "pad0",
    ("x86_mce", "pad"): "pad1",
    ("clock_data", "pad"): "pad",
    ("msr_filter", "pad"): None,  # alignment, not a field
}


def locate(layout: Any, path: str) -> tuple[int, int]:
    """Return offset and size [bytes] of the recorder's field `path` in `layout`."""
    offset = 0
    for part in path.split("."):
        indexed = re.fullmatch(r"([a-z]+)(\d+)", part)
        if not hasattr(layout, part) and indexed and indexed[1] in ARRAYS:
            name, index = ARRAYS[indexed[1]], int(indexed[2])
        else:
            name, index = part, None
        descriptor = getattr(layout, name)
        offset += descriptor.offset
        layout = {member[0]: member[1] for member in layout._fields_}[name]
        if index is not None:
            layout = layout._type_
            offset += index * ctypes.sizeof(layout)
    return offset, ctypes.sizeof(layout)


def test_every_recorded_structure_is_checked() -> None:
    assert set(GOLDEN["structs"]) == set(STRUCTS) | NOT_A_STRUCT


@pytest.mark.parametrize("name", STRUCTS)
def test_agrees_with_the_recorder(name: str) -> None:
    layout, golden = STRUCTS[name], GOLDEN["structs"][name]
    assert ctypes.sizeof(layout) == golden["size"]
    for field, _, offset, size in golden["fields"]:
        path = RENAMED.get((name, field), field)
        if path is None or (name == "msr_filter" and field.endswith(".pad")):
            continue
        got_offset, got_size = locate(layout, path)
        assert got_offset == offset, field
        if (name, field) != ("x86_mce", "pad"):  # one run of bytes there, two fields in the kernel
            assert got_size == size, field


@pytest.mark.parametrize("name", GOLDEN["requests"])
def test_request_has_the_recorded_number(name: str) -> None:
    assert KvmRequest[name] == int(GOLDEN["requests"][name]["nr"], 16)


CARRIERS = [
    name
    for name, request in GOLDEN["requests"].items()
    if request["arg"] in STRUCTS and size_of(int(request["nr"], 16))
]


@pytest.mark.parametrize("name", CARRIERS)
def test_request_carries_the_size_of_its_structure(name: str) -> None:
    # KVM_MEMORY_ENCRYPT_OP is declared with an unsigned long, whatever it points to.
    expected = 8 if name == "KVM_MEMORY_ENCRYPT_OP" else ctypes.sizeof(STRUCTS[GOLDEN["requests"][name]["arg"]])
    assert size_of(KvmRequest[name]) == expected


def test_exit_reasons_have_the_recorded_names() -> None:
    assert {number: KvmExit(int(number)).name for number in GOLDEN["exit_reasons"]} == GOLDEN["exit_reasons"]
