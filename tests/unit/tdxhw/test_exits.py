"""Exits of both dialects read into one vocabulary, and answers written back."""

import ctypes
import errno
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.exits import (
    ExceptionExit,
    Exit,
    FailEntry,
    FatalError,
    Hypercall,
    InternalError,
    MapGpa,
    MemoryFault,
    Mmio,
    MsrAccess,
    PlainExit,
    PortIo,
    SystemEvent,
    Tdvmcall,
    decode,
)
from tdxhw.replies import reply_map_gpa, reply_mmio, reply_msr, reply_port, reply_tdvmcall
from uapi_ctypes.kvm_run import KvmExit, KvmRun
from uapi_ctypes.tdx_leaves import TdvmcallLeaf
from uapi_ctypes.tdx_status import TdvmcallStatus
from uapi_ctypes.vcpu import Vcpu

SHARED = 1 << 47
GPA = 0x1234_5000
gpas = st.integers(0, (1 << 35) - 1).map(lambda page: page << 12)


class FakeVcpu(SimpleNamespace):
    kvm_run: KvmRun
    data: bytearray

    def io_data(self) -> memoryview:
        return memoryview(self.data)


def vcpu(reason: int, data: bytes = b"") -> Any:
    run = KvmRun()
    run.exit_reason = reason
    return FakeVcpu(kvm_run=run, data=bytearray(data))


def read(fake: Any, shared_bit: int = SHARED) -> Exit:
    return decode(cast("Vcpu", fake), shared_bit)


def v17_call(leaf: int, **registers: int) -> Any:
    fake = vcpu(KvmExit.KVM_EXIT_TDX)
    fake.kvm_run.tdx_v17.type = 1
    fake.kvm_run.tdx_v17.vmcall.subfunction = leaf
    for name, value in registers.items():
        setattr(fake.kvm_run.tdx_v17.vmcall, f"in_{name}", value)
    return fake


def mainline_map_gpa(gpa: int, pages: int, *, to_private: bool) -> Any:
    fake = vcpu(KvmExit.KVM_EXIT_HYPERCALL)
    fake.kvm_run.hypercall.nr = 12
    fake.kvm_run.hypercall.args[:3] = [gpa, pages, 16 if to_private else 0]
    return fake


@given(gpas, st.integers(1, 512), st.booleans())
def test_map_gpa_reads_the_same_in_both_dialects(gpa: int, pages: int, to_private: bool) -> None:
    new = mainline_map_gpa(gpa, pages, to_private=to_private)
    old = v17_call(TdvmcallLeaf.MAP_GPA, r12=gpa if to_private else gpa | SHARED, r13=pages << 12)

    assert read(new) == read(old) == MapGpa(gpa, pages, to_private)


@pytest.mark.parametrize(
    ("gpa", "size"), [(GPA + 8, 4096), (GPA, 100), (GPA, 0)], ids=["unaligned", "part of a page", "empty"]
)
def test_v17_hands_over_what_mainline_refuses_itself(gpa: int, size: int) -> None:
    assert read(v17_call(TdvmcallLeaf.MAP_GPA, r12=gpa, r13=size)) == Tdvmcall(0x10001, (gpa, size, 0, 0))


def test_a_fatal_error_reads_the_same_in_both_dialects() -> None:
    text = b"the guest's last words, up to sixty-four bytes of them, padded.."
    words = [int.from_bytes(text[n : n + 8], "little") for n in range(0, 64, 8)]
    names = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
    registers = dict(zip(names, words, strict=True))
    old = v17_call(TdvmcallLeaf.REPORT_FATAL_ERROR, r12=0xBAD, r13=GPA, **registers)
    new = vcpu(KvmExit.KVM_EXIT_SYSTEM_EVENT)
    event = new.kvm_run.system_event
    event.type, event.ndata = 7, 16
    order = ("ret", "rcx", "rdx", "rbx", "", "", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
    event.data[:] = [(registers | {"r12": 0xBAD, "r13": GPA}).get(name, 0) for name in order]

    assert read(new) == read(old) == FatalError(0xBAD, GPA, text)


def test_a_fatal_error_prints_its_text() -> None:
    assert str(FatalError(0xBAD, 0, b"no memory".ljust(64, b"\0"))) == "fatal error 0xbad, 'no memory'"
    assert str(FatalError(1, 0, bytes(64))) == "fatal error 0x1"


def test_get_quote_reads_the_same_in_both_dialects() -> None:
    new = vcpu(KvmExit.KVM_EXIT_TDX)
    new.kvm_run.tdx.nr = TdvmcallLeaf.GET_QUOTE
    new.kvm_run.tdx.get_quote.gpa, new.kvm_run.tdx.get_quote.size = GPA, 8192

    assert read(new) == read(v17_call(TdvmcallLeaf.GET_QUOTE, r12=GPA | SHARED, r13=8192))
    assert read(new) == Tdvmcall(0x10002, (GPA, 8192))


@given(st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF), st.booleans(), st.binary(min_size=4, max_size=4))
def test_port_io(size: int, port: int, is_write: bool, data: bytes) -> None:
    fake = vcpu(KvmExit.KVM_EXIT_IO, data[:size])
    io = fake.kvm_run.io
    io.direction, io.size, io.port, io.count = is_write, size, port, 1

    exit_ = read(fake)

    assert exit_ == PortIo(port, size, is_write, data[:size])
    assert exit_.value == int.from_bytes(data[:size], "little")


def test_mmio_has_as_many_bytes_as_were_accessed() -> None:
    fake = vcpu(KvmExit.KVM_EXIT_MMIO)
    mmio = fake.kvm_run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = GPA, 4, 1
    mmio.data[:] = b"abcdefgh"

    assert read(fake) == Mmio(GPA, 4, True, b"abcd")


@pytest.mark.parametrize(("flags", "private"), [(8, True), (0, False)])
def test_memory_fault(flags: int, private: bool) -> None:
    fake = vcpu(KvmExit.KVM_EXIT_MEMORY_FAULT)
    fault = fake.kvm_run.memory_fault
    fault.flags, fault.gpa, fault.size = flags, GPA, 4096

    assert read(fake) == MemoryFault(GPA, 4096, private)


def test_other_exits_keep_what_the_kernel_said() -> None:
    internal = vcpu(KvmExit.KVM_EXIT_INTERNAL_ERROR)
    internal.kvm_run.internal.suberror, internal.kvm_run.internal.ndata = 4, 2
    internal.kvm_run.internal.data[:3] = [0xAB, 1, 99]
    entry = vcpu(KvmExit.KVM_EXIT_FAIL_ENTRY)
    entry.kvm_run.fail_entry.hardware_entry_failure_reason, entry.kvm_run.fail_entry.cpu = 0x80000021, 3
    exception = vcpu(KvmExit.KVM_EXIT_EXCEPTION)
    exception.kvm_run.ex.exception = 6
    event = vcpu(KvmExit.KVM_EXIT_SYSTEM_EVENT)
    event.kvm_run.system_event.type = 2
    call = vcpu(KvmExit.KVM_EXIT_HYPERCALL)
    call.kvm_run.hypercall.nr = 5

    assert read(internal) == InternalError(4, (0xAB, 1))
    assert read(entry) == FailEntry(0x80000021, 3)
    assert read(exception) == ExceptionExit(6, 0)
    assert read(event) == SystemEvent(2, ())
    assert read(call) == Hypercall(5, (0,) * 6)
    assert str(read(vcpu(KvmExit.KVM_EXIT_SHUTDOWN))) == "KVM_EXIT_SHUTDOWN"
    assert str(PlainExit(999)) == "exit reason 999"


@pytest.mark.parametrize(
    ("status", "ret"),
    [
        (TdvmcallStatus.SUCCESS, 0),
        (TdvmcallStatus.RETRY, errno.EAGAIN),
        (TdvmcallStatus.INVALID_OPERAND, errno.EINVAL),
    ],
)
def test_a_map_gpa_is_answered_as_each_dialect_wants_it(status: TdvmcallStatus, ret: int) -> None:
    new, old = mainline_map_gpa(GPA, 1, to_private=False), v17_call(TdvmcallLeaf.MAP_GPA, r12=GPA, r13=4096)

    reply_map_gpa(new.kvm_run, MapGpa(GPA, 1, False), status)
    reply_map_gpa(old.kvm_run, MapGpa(GPA, 1, False), status)

    assert new.kvm_run.hypercall.ret == ret
    assert old.kvm_run.tdx_v17.vmcall.status_code == status


def test_a_tdvmcall_is_answered_as_each_dialect_wants_it() -> None:
    new = vcpu(KvmExit.KVM_EXIT_TDX)
    new.kvm_run.tdx.nr = TdvmcallLeaf.GET_TD_VM_CALL_INFO
    old = v17_call(TdvmcallLeaf.GET_TD_VM_CALL_INFO)

    reply_tdvmcall(new.kvm_run, TdvmcallStatus.RETRY, (0x11, 0x12))
    reply_tdvmcall(old.kvm_run, TdvmcallStatus.RETRY, (0x11, 0x12))

    info = new.kvm_run.tdx.get_tdvmcall_info
    assert (info.ret, info.r11, info.r12) == (1, 0x11, 0x12)
    call = old.kvm_run.tdx_v17.vmcall
    assert (call.status_code, call.out_r11, call.out_r12) == (1, 0x11, 0x12)


def test_msrs_are_read_and_answered() -> None:
    fake = vcpu(KvmExit.KVM_EXIT_X86_RDMSR)
    fake.kvm_run.msr.index, fake.kvm_run.msr.reason = 0x1A0, 4
    assert read(fake) == MsrAccess(0x1A0, 0, False, 4)

    reply_msr(fake.kvm_run, 0x850089)
    assert (fake.kvm_run.msr.data, fake.kvm_run.msr.error) == (0x850089, 0)
    reply_msr(fake.kvm_run, None)
    assert fake.kvm_run.msr.error == 1


def test_reads_are_answered_in_place() -> None:
    port = vcpu(KvmExit.KVM_EXIT_IO, bytes(4))
    mmio = vcpu(KvmExit.KVM_EXIT_MMIO)

    reply_port(cast("Vcpu", port), [0x1234, 0x1_5678], 2)
    reply_mmio(mmio.kvm_run, -1)

    assert port.data == b"\x34\x12\x78\x56"
    assert bytes(mmio.kvm_run.mmio.data) == b"\xff" * 8


def test_the_first_word_tells_the_two_forms_of_kvm_exit_tdx_apart() -> None:
    assert KvmRun.u.offset == 32
    assert ctypes.sizeof(KvmRun) == 2352
