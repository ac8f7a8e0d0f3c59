"""What the engine knows about the inside of Unicorn 2.1.4: functions, offsets, flags.

Nothing here is an interface that Unicorn promises. `unicorn_selftest` checks each of these facts before the
first guest runs, so that another build ends in one clear line and not in a wrong result.
"""

import ctypes
import struct
from typing import Final

from unicorn.unicorn_py3.unicorn import uclib

UNICORN_VERSION: Final = "2.1.4"

# ---- Offsets into uc_struct, CPUState and CPUX86State [bytes] ----
UC_CPU: Final = 0x1B8
UC_INVALID_ADDRESS: Final = 0x588
UC_CONTEXT_SIZE: Final = 0x7E0  # of the CPU state
UC_NO_EXIT_REQUEST: Final = 0x7F2  # a stop request is looked at between blocks only; before it two flags, after it one
CPU_ENV: Final = 0x128
CPU_INTERRUPT_REQUEST: Final = 0x1C
CPU_EXCEPTION_INDEX: Final = 0x81A0
ENV_SIZE: Final = 5568
ENV_RIP: Final = 128
ENV_EFLAGS: Final = 136
ENV_HFLAGS: Final = 176
ENV_SEGS: Final = 184  # ES, CS, SS, DS, FS, GS, LDT, TR, GDT, IDT: 24 bytes each
ENV_DR: Final = 5400
ENV_CR: Final = 424
ENV_EFER: Final = 592
ENV_FPSTT: Final = 604
ENV_FPUS: Final = 608  # and the control word
ENV_FPTAGS: Final = 612  # 1 is empty
ENV_FPREGS: Final = 624  # 16 bytes each
ENV_MXCSR: Final = 816
ENV_XMM: Final = 824  # 64 bytes each
ENV_SYSENTER_CS: Final = 4800
ENV_STAR: Final = 4824
ENV_KERNEL_GS_BASE: Final = 4864
ENV_TSC_AUX: Final = 4896
ENV_XCR0: Final = 4904
ENV_FEATURES: Final = 5632  # CPUID feature words, 8 bytes each
FEATURE_XSAVE_COMPONENTS: Final = 21
ENV_ERROR_CODE: Final = 5384
ENV_VM_VMCB: Final = 5504
ENV_TSC_OFFSET: Final = 5512
ENV_INTERCEPT: Final = 5520
ENV_INTERCEPT_CR_READ: Final = 5528
ENV_INTERCEPT_CR_WRITE: Final = 5530
ENV_INTERCEPT_DR_READ: Final = 5532
ENV_INTERCEPT_DR_WRITE: Final = 5534
ENV_INTERCEPT_EXCEPTIONS: Final = 5536

SEGMENT: Final = struct.Struct("<IxxxxQII")  # selector, base, limit, flags (a descriptor's upper half)
GPRS: Final = struct.Struct("<16Q")

# ---- hflags: what Unicorn translates code for ----
HF_CPL: Final = 3
HF_INHIBIT_IRQ: Final = 1 << 3
HF_CS32: Final = 1 << 4
HF_SS32: Final = 1 << 5
HF_ADDSEG: Final = 1 << 6
HF_PE: Final = 1 << 7
HF_MP: Final = 1 << 9
HF_EM: Final = 1 << 10
HF_TS: Final = 1 << 11
HF_LMA: Final = 1 << 14
HF_CS64: Final = 1 << 15
HF_GUEST: Final = 1 << 21  # intercepts are active
HF_OSFXSR: Final = 1 << 22
HF_SMAP: Final = 1 << 23
HF_IOBPT: Final = 1 << 24  # a helper that may raise #DB follows each IN and OUT

CPU_INTERRUPT_VIRQ: Final = 0x100

# ---- Exception indices: 0x100 + SVM exit code ----
EXIT_READ_CR0: Final = 0x100
EXIT_WRITE_CR0: Final = 0x110
EXIT_READ_DR0: Final = 0x120
EXIT_WRITE_DR0: Final = 0x130
EXIT_EXCEPTION: Final = 0x140
EXIT_VINTR: Final = 0x164
EXIT_RDTSC: Final = 0x16E
EXIT_RDPMC: Final = 0x16F
EXIT_CPUID: Final = 0x172
EXIT_SWINT: Final = 0x175
EXIT_INVD: Final = 0x176
EXIT_HLT: Final = 0x178
EXIT_MSR: Final = 0x17C
EXIT_RDTSCP: Final = 0x187
EXIT_ICEBP: Final = 0x188
EXIT_WBINVD: Final = 0x189
EXIT_MONITOR: Final = 0x18A
EXIT_MWAIT: Final = 0x18B


def intercept(exit_index: int) -> int:
    """Return the bit of the intercept word that asks for the exit with `exit_index`."""
    return 1 << (exit_index - 0x160)


# ---- Functions, with prototypes of our own so that no call goes through the Python wrapper ----
_H = ctypes.c_void_p
_U64 = ctypes.c_uint64
_INT = ctypes.c_int


def _bind(name: str, *arguments: type) -> "ctypes._FuncPointer":
    return ctypes.CFUNCTYPE(_INT, *arguments)((name, uclib))


uc_open: Final = _bind("uc_open", _INT, _INT, ctypes.POINTER(_H))
uc_close: Final = _bind("uc_close", _H)
uc_emu_start: Final = _bind("uc_emu_start", _H, _U64, _U64, _U64, _U64)
uc_emu_stop: Final = _bind("uc_emu_stop", _H)
uc_mem_map_ptr: Final = _bind("uc_mem_map_ptr", _H, _U64, _U64, ctypes.c_uint32, _H)
uc_mem_unmap: Final = _bind("uc_mem_unmap", _H, _U64, _U64)
uc_reg_read: Final = _bind("uc_reg_read", _H, _INT, _H)
uc_reg_write: Final = _bind("uc_reg_write", _H, _INT, _H)
# Variadic in C; on x86-64 the integer arguments travel in the same registers.
uc_hook_add: Final = _bind("uc_hook_add", _H, _H, _INT, _H, _H, _U64, _U64, _INT)
uc_ctl: Final = _bind("uc_ctl", _H, ctypes.c_uint32, _U64, _U64)

UC_ARCH_X86: Final = 4
UC_MODE_64: Final = 8
UC_CPU_ICELAKE_SERVER: Final = 26
UC_PROT_ALL: Final = 7
UC_HOOK_INSN: Final = 1 << 1
UC_HOOK_EDGE_GENERATED: Final = 1 << 15
UC_HOOK_TLB_FILL: Final = 1 << 17
UC_INS_IN: Final = 218
UC_INS_OUT: Final = 500
UC_INS_SYSCALL: Final = 699
UC_INS_SYSENTER: Final = 700
UC_MEM_READ: Final = 16
UC_MEM_WRITE: Final = 17
UC_MEM_FETCH: Final = 18
UC_REG_FPCW: Final = 246
UC_REG_MXCSR: Final = 249

CTL_USE_EXITS: Final = 4 | 1 << 26 | 1 << 30
CTL_CPU_MODEL: Final = 7 | 1 << 26 | 1 << 30
CTL_TB_FLUSH: Final = 10 | 1 << 30
CTL_TLB_FLUSH: Final = 11 | 1 << 30
CTL_TLB_TYPE: Final = 12 | 1 << 26 | 1 << 30
TLB_VIRTUAL: Final = 1

TLB_FILL_HOOK: Final = ctypes.CFUNCTYPE(ctypes.c_bool, _H, _U64, _INT, _H, _H)
EDGE_HOOK: Final = ctypes.CFUNCTYPE(None, _H, _H, _H, _H)
IN_HOOK: Final = ctypes.CFUNCTYPE(ctypes.c_uint32, _H, ctypes.c_uint32, _INT, _H)
OUT_HOOK: Final = ctypes.CFUNCTYPE(None, _H, ctypes.c_uint32, _INT, ctypes.c_uint32, _H)
SYSCALL_HOOK: Final = ctypes.CFUNCTYPE(None, _H, _H)
TLB_ENTRY: Final = struct.Struct("<QI")  # uc_tlb_entry: paddr, perms
TB: Final = struct.Struct("<QHH")  # uc_tb: pc, icount, size
TLB_ENTRY_BUFFER: Final = ctypes.c_char * TLB_ENTRY.size
TB_BUFFER: Final = ctypes.c_char * TB.size
