"""What the random sequences of ioctls are made of. A failing sequence becomes a script that begins with this text."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import MAINLINE, V17
from uapi_ctypes.errors import KvmError, errno_name
from uapi_ctypes.handle import Handle
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2, KvmRegs
from uapi_ctypes.linux import LinuxKernel
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion, KvmTdxInitVm
from uapi_ctypes.tdx_v17 import KvmTdxInitVmV17

__all__ = ["MAINLINE", "V17", "Kernel", "Kvm", "KvmPreFaultMemory", "KvmRegs", "KvmTdxInitMemRegion", "LinuxKernel"]

BAD = 0x10
"""An address that nobody can read."""
GUEST_MEMFD, PRIVATE, MEASURE = 4, 8, 1
SPLIT_IRQCHIP, X2APIC_API, EXIT_HYPERCALL = 121, 129, 201
S_BIT = 1 << 47
IMAGE_GPA = 0xFFFF_0000
IMAGE = {
    0x0000: "0f01154050ffffb8600600000f22e0b80010ffff0f22d8b8230000800f22c0ea0060ffff08",
    0x1000: "0320ffff",
    0x2000: "0330ffff",
    0x2018: "0340ffff",
    0x3000: "8300000000000000830000000080",
    0x4FF8: "8300e0ff000000000000000000000000ffff0000009baf00ffff00000093cf",
    0x5040: "17000050ffff00000000000000000000ff0f0090ffff",
    0x6000: (
        "48bc0080ffff0000000048b85050ffff000000000f011848b9000000000000000048b80600000000000000660f01cc49bc04"
        "0000000000000049bd010000000000000049be400000000000000049bf000000000000000048b900fc00000000000049ba00"
        "0000000000000049bb1e0000000000000048b80000000000000000660f01cc48b9001000000000000048b806000000000000"
        "00660f01cc49bc040000000000000049bd010000000000000049be410000000000000049bf010000000000000048b900fc00"
        "000000000049ba000000000000000049bb1e0000000000000048b80000000000000000660f01cc48b9002000000000000048"
        "b80600000000000000660f01cc49bc040000000000000049bd010000000000000049be420000000000000049bf0200000000"
        "00000048b900fc00000000000049ba000000000000000049bb1e0000000000000048b80000000000000000660f01cc48b900"
        "3000000000000048b80600000000000000660f01cc49bc040000000000000049bd010000000000000049be43000000000000"
        "0049bf030000000000000048b900fc00000000000049ba000000000000000049bb1e0000000000000048b800000000000000"
        "00660f01cc49bc006000000000000049bd001000000000000049be000000000000000049bf000000000000000048b900fc00"
        "000000000049ba000000000000000049bb010001000000000048b80000000000000000660f01cce9f7fdffff"
    ),
    0x9021: "a00800008effff",
    0xA000: "48ff05f907000048cf",
    0xFFF0: "e90b00ffff",
}
"""64 KiB below 4 GiB, zeros left out: into 64-bit mode, then for ever: accept page 0, OUT to 0x40, page 1, …, MapGPA.

NMIs have a handler, which counts and returns.
"""


class Memory:
    """Anonymous memory of this process; `hva` is where."""

    def __init__(self, length: int) -> None:
        self.map = mmap.mmap(-1, length)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.hva = ctypes.addressof(anchor)
        del anchor


def image() -> Memory:
    """Return the guest's image, ready to be copied into a TD."""
    memory = Memory(0x1_0000)
    for offset, code in IMAGE.items():
        memory.map[offset : offset + len(code) // 2] = bytes.fromhex(code)
    return memory


def entry(function: int, index: int = 0, flags: int = 0, **registers: int) -> KvmCpuidEntry2:
    made = KvmCpuidEntry2(function, index, flags)
    for name, value in registers.items():
        setattr(made, name, value)
    return made


def init_vm(
    dialect: str, *, attributes: int = 0, xfam: int = 3, repeat: int = 1, padding: int = 0, gpaw: int = 48
) -> Any:
    """Return the structure for KVM_TDX_INIT_VM; `repeat` is how often the last CPUID entry is in it."""
    made: Any
    if dialect == "v17":
        last = [entry(0x8000_0008, eax=48)] * repeat
        made = KvmTdxInitVmV17.of([entry(0xD, 0, 1, eax=xfam), entry(1, ecx=1 << 21), entry(0x8000_0000), *last])
    else:
        made = KvmTdxInitVm.of([entry(0x8000_0008, eax=gpaw << 16)] * repeat)
        made.xfam = xfam
    made.cpuid.padding = padding
    made.attributes = attributes
    return made


def cpuid(dialect: str, *, x2apic: bool = True, virt_bits: int = 48, nent: int = 0, gpaw: int = 48) -> KvmCpuid2:
    """Return the table for KVM_SET_CPUID2; `nent` overstates its length."""
    shift = 0 if dialect == "v17" else 16
    made = KvmCpuid2.of(
        [
            entry(0, eax=0x21),
            entry(1, ecx=int(x2apic) << 21),
            entry(0x8000_0000, eax=0x8000_0008),
            entry(0x8000_0008, eax=gpaw << shift | virt_bits << 8 | (48 if dialect == "v17" else 52)),
        ]
    )
    if nent:
        made.nent = nent
    return made


def command(target: Any, number: int, *, hw_error: int = 0) -> Any:
    """Return a TDX sub-command that is wrong in some way."""
    made = target.dialect.cmd(number)
    made.hw_error = hw_error
    return made


def run(vcpu: Any, *, immediate: int = 0, ret: int | None = None) -> str:
    """KVM_RUN, after `ret` as the answer to a hypercall; return what came out in words."""
    page = vcpu.kvm_run
    page.immediate_exit = immediate
    if ret is not None:
        page.hypercall.ret = ret
    reason = KvmExit.name_of(vcpu.run())
    if reason == "KVM_EXIT_IO":
        return f"{reason} {page.io.port:#x}"
    if reason == "KVM_EXIT_HYPERCALL":
        gpa, pages, attributes = page.hypercall.args[:3]
        return f"{reason} {gpa:#x} {pages} {attributes}"
    return reason


def ports() -> Memory:
    """Return 64 KiB with a real-mode program at 0x1000: for ever OUT to port 0x40, and count in memory."""
    memory = Memory(0x1_0000)
    memory.map[0x1000:0x100A] = bytes.fromhex("e640 fec0 fe060020 ebf6")
    return memory


def in_real_mode(vcpu: Any, rip: int) -> None:
    """Make `vcpu` run at `rip` of segment 0."""
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(KvmRegs(rip=rip, rflags=2))


def registers(vcpu: Any) -> str:
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    return f"rip {regs.rip:#x} rax {regs.rax:#x} rdx {regs.rdx:#x} rflags {regs.rflags:#x} cr0 {sregs.cr0:#x}"


def dirty_log(vm: Any, slot: int) -> str:
    bitmap = (ctypes.c_uint64 * 8)()
    vm.get_dirty_log(slot, ctypes.addressof(bitmap))
    return " ".join(f"{word:#x}" for word in bitmap)


def left(call: Callable[[Any], object], structure: Any, field: str) -> str:
    """Make the call with `structure`, and say what is left to do in it afterwards."""
    try:
        call(structure)
    except KvmError as error:
        return f"{errno_name(error.errno or 0)} left {getattr(structure, field):#x}"
    return f"OK left {getattr(structure, field):#x}"


MADE: list[Handle] = []
"""What `expect` returned, to be closed in the end."""


class Disagreement(AssertionError):  # noqa: N818  (a finding, not an error)
    """A call ended otherwise than expected."""


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """Make the call; return how it ended (the errno's name, the text that it returns, or OK) and its result."""
    try:
        result = call()
    except KvmError as error:
        return errno_name(error.errno or 0), None
    return (result, None) if isinstance(result, str) else ("OK", result)


def expect(expected: str, call: Callable[[], Any]) -> Any:
    """Make the call and return its result; raise `Disagreement` unless it ends as `expected`, or that is ``?``."""
    found, result = attempt(call)
    if isinstance(result, Handle):
        MADE.append(result)
    if expected not in ("?", found):
        raise Disagreement(f"{expected!r} expected, {found!r} found")
    return result
