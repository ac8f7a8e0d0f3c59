"""Guest programs of the unit tests, assembled by hand: a few instructions around TDCALL.

`image` puts a program into 64 KiB that end at 4 GiB, behind a stub that goes from the TD reset state to
64-bit mode. The program sees private memory identity-mapped from 0 to 2 MiB, the same GPAs with the S-bit from
2 MiB to 4 MiB, and the image itself.
"""

import struct
from typing import Final, Self

IMAGE_GPA: Final = 0xFFFF_0000
IMAGE_BYTES: Final = 0x1_0000
SHARED_ALIAS: Final = 0x20_0000
S_BIT: Final = 1 << 47
REPORT_GPA: Final = 0xFED0_0000
_PML4, _PDPT, _PD_LOW, _PD_HIGH, _GDT, _CODE = (IMAGE_GPA + offset for offset in range(0x1000, 0x7000, 0x1000))
_IDT, _HANDLER = IMAGE_GPA + 0x9000, IMAGE_GPA + 0xA000
EVENT_COUNT: Final = IMAGE_GPA + 0xA800
"""Where the handler of every vector counts."""
_TABLE, _LARGE = 0x3, 0x83

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
TDCALL: Final = bytes.fromhex("660f01cc")
TDG_VP_VMCALL, TDG_VP_INFO, TDG_MEM_PAGE_ACCEPT = 0, 1, 6
VMCALL_MASK: Final = 0xFC00  # R10 to R15
TDVMCALL_IO, TDVMCALL_MMIO = 30, 48


class Program:
    """Machine code under construction; every method returns the program, so calls chain."""

    def __init__(self) -> None:
        self.code = bytearray()

    def raw(self, code: bytes | bytearray) -> Self:
        """Append instructions."""
        self.code += code
        return self

    def mov(self, register: int, value: int) -> Self:
        """MOV r64, imm64."""
        return self.raw(struct.pack("<BBQ", 0x48 | register >> 3, 0xB8 | register & 7, value & (1 << 64) - 1))

    def copy(self, target: int, source: int) -> Self:
        """MOV r64, r64."""
        rex = 0x48 | (source >> 3) << 2 | target >> 3
        return self.raw(bytes((rex, 0x89, 0xC0 | (source & 7) << 3 | target & 7)))

    def load(self, register: int, address: int) -> Self:
        """MOV RAX-like register, [address]."""
        self.mov(RAX, address)
        return self.raw(bytes((0x48 | (register >> 3) << 2, 0x8B, (register & 7) << 3)))

    def store(self, address: int, value: int) -> Self:
        """MOV [address], imm64 (clobbers RAX, RBX)."""
        return self.mov(RAX, address).mov(RBX, value).raw(bytes.fromhex("488918"))

    def jump_to(self, address: int) -> Self:
        """JMP to an absolute address (clobbers RAX)."""
        return self.mov(RAX, address).raw(bytes.fromhex("ffe0"))

    def tdcall(self, leaf: int, **registers: int) -> Self:
        """TDCALL with registers given by lower-case name."""
        for name, value in registers.items():
            self.mov(_NUMBERS[name], value)
        return self.mov(RAX, leaf).raw(TDCALL)

    def vmcall(self, leaf: int, *arguments: int, mask: int = VMCALL_MASK, r10: int = 0, **registers: int) -> Self:
        """TDG.VP.VMCALL: R11 = leaf, arguments from R12 on."""
        for number, value in zip((R12, R13, R14, R15), (*arguments, 0, 0, 0, 0), strict=False):
            self.mov(number, value)
        return self.tdcall(TDG_VP_VMCALL, rcx=mask, r10=r10, r11=leaf, **registers)

    def out(self, port: int, value: int, size: int = 4) -> Self:
        """Write a port."""
        return self.vmcall(TDVMCALL_IO, size, 1, port, value)

    def report(self, *registers: int) -> Self:
        """Tell the host the registers' 64-bit values: MMIO writes (R10 to R15 are kept in memory meanwhile)."""
        for index, register in enumerate(registers):
            self.raw(_store_scratch(register, index))
        for index in range(len(registers)):
            self.raw(_load_scratch_r15(index))
            self.mov(R12, 8).mov(R13, 1).mov(R14, REPORT_GPA | S_BIT)
            self.tdcall(TDG_VP_VMCALL, rcx=VMCALL_MASK, r10=0, r11=TDVMCALL_MMIO)
        return self

    def spin(self) -> Self:
        """JMP to itself."""
        return self.raw(b"\xeb\xfe")

    def done(self) -> Self:
        """Say that the program is over, and stay there."""
        return self.out(0x30, 0x600D).spin()


_NUMBERS: Final = {
    "rax": RAX, "rcx": RCX, "rdx": RDX, "rbx": RBX, "rsi": RSI, "rdi": RDI, "r8": R8, "r9": R9,
    "r10": R10, "r11": R11, "r12": R12, "r13": R13, "r14": R14, "r15": R15,
}  # fmt: skip
_SCRATCH: Final = IMAGE_GPA + 0x8000


def _store_scratch(register: int, index: int) -> bytes:
    # mov [rsp-based scratch + 8 * index], register: RSP was set by the stub and is never changed
    return bytes((0x48 | (register >> 3) << 2, 0x89, 0x84 | (register & 7) << 3, 0x24)) + struct.pack("<i", 8 * index)


def _load_scratch_r15(index: int) -> bytes:
    return bytes.fromhex("4c8bbc24") + struct.pack("<i", 8 * index)


def image(program: Program) -> bytes:
    """Return the 64 KiB that belong at `IMAGE_GPA`."""
    memory = bytearray(IMAGE_BYTES)

    def put(gpa: int, data: bytes) -> None:
        memory[gpa - IMAGE_GPA : gpa - IMAGE_GPA + len(data)] = data

    put(_PML4, struct.pack("<Q", _PDPT | _TABLE))
    put(_PDPT, struct.pack("<QQQQ", _PD_LOW | _TABLE, 0, 0, _PD_HIGH | _TABLE))
    put(_PD_LOW, struct.pack("<QQ", 0 | _LARGE, S_BIT | _LARGE))
    put(_PD_HIGH + 511 * 8, struct.pack("<Q", 0xFFE0_0000 | _LARGE))
    put(_GDT, struct.pack("<QQQ", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
    put(_GDT + 0x40, struct.pack("<HI", 23, _GDT))
    stub = b"\x0f\x01\x15" + struct.pack("<I", _GDT + 0x40)  # lgdt
    for value, mov_cr in ((0x660, "0f22e0"), (_PML4, "0f22d8"), (0x8000_0023, "0f22c0")):
        stub += b"\xb8" + struct.pack("<I", value) + bytes.fromhex(mov_cr)
    stub += b"\xea" + struct.pack("<IH", _CODE, 8)  # ljmp 8:_CODE
    put(IMAGE_GPA, stub)
    handler = b"\x48\xff\x05" + struct.pack("<i", EVENT_COUNT - (_HANDLER + 7)) + bytes.fromhex("48cf")
    put(_HANDLER, handler)  # inc [EVENT_COUNT]; iretq
    gate = struct.pack("<HHBBHII", _HANDLER & 0xFFFF, 8, 0, 0x8E, _HANDLER >> 16 & 0xFFFF, 0, 0)
    put(_IDT, gate * 256)
    put(_GDT + 0x50, struct.pack("<HQ", 4095, _IDT))
    prologue = Program().mov(RSP, _SCRATCH).mov(RAX, _GDT + 0x50).raw(bytes.fromhex("0f0118")).code
    assert len(prologue) + len(program.code) <= 0x2000
    put(_CODE, bytes(prologue + program.code))
    jump = IMAGE_GPA - (0xFFFF_FFF0 + 5)
    put(0xFFFF_FFF0, b"\xe9" + struct.pack("<i", jump))
    return bytes(memory)
