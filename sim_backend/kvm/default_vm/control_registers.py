"""MOV to control registers, CLTS, LMSW and XSETBV of an ordinary guest (`handle_cr`, `kvm_set_cr0` …)."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, CpuState
from sim_backend.hw.gprs import RAX, RCX, RDX
from sim_backend.kvm.cpuid import cr4_reserved_bits
from sim_backend.kvm.default_vm.guest_events import GP, raise_in_guest, skip_instruction
from sim_backend.kvm.errors import SimLimit
from sim_backend.kvm.kvm_run_page import EXIT_REASON
from sim_backend.kvm.xsave import XsaveArea

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_SET_TPR: Final = 11
CR0_PE: Final = 1
CR0_TS: Final = 1 << 3
CR0_ET: Final = 1 << 4
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
CR4_PCIDE: Final = 1 << 17
CR4_LA57: Final = 1 << 12
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
_CR0_KNOWN: Final = 0xE005_003F
_MOV_TO: Final = 0
_MOV_FROM: Final = 1
_CLTS: Final = 2
_LMSW: Final = 3
_CS_L: Final = 1 << 13
_U32: Final = 0xFFFF_FFFF


def emulate_control_register(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Act on a CR_ACCESS exit: set the register or raise #GP."""
    qualification = cpu.exit.qualification
    number, access = qualification & 0xF, qualification >> 4 & 3
    register = qualification >> 8 & 0xF
    state = cpu.get_state()
    if access == _CLTS:
        state.cr0 &= ~CR0_TS
    elif access == _LMSW:
        source = qualification >> 16 & 0xF
        if not _set_cr0(vcpu, state, state.cr0 & ~0xE | source):
            return raise_in_guest(vcpu, cpu, GP)
    elif access == _MOV_FROM:
        value = vcpu.get_cr8() if number == 8 else (state.cr0, 0, state.cr2, state.cr3, state.cr4)[number]
        cpu.gprs[register] = value
        skip_instruction(vcpu, cpu)
        return True
    else:
        value = cpu.gprs[register] if cpu.in_64bit_mode() else cpu.gprs[register] & _U32
        if number == 8:
            return _set_cr8(vcpu, cpu, value)
        if not _set(vcpu, state, number, value):
            return raise_in_guest(vcpu, cpu, GP)
    cpu.set_state(state)
    skip_instruction(vcpu, cpu)
    return True


def _set(vcpu: "Vcpu", state: CpuState, number: int, value: int) -> bool:
    if number == 0:
        return _set_cr0(vcpu, state, value)
    if number == 3:
        if state.efer & EFER_LMA and value & ~(1 << 63) & ~((1 << vcpu.cpuid.maxphyaddr) - 1):
            return False
        state.cr3 = value & ~(1 << 63) if state.cr4 & CR4_PCIDE else value
        return True
    if number == 4:
        return _set_cr4(vcpu, state, value)
    raise SimLimit(f"MOV to CR{number} exited")


def _set_cr0(_vcpu: "Vcpu", state: CpuState, value: int) -> bool:
    if value >> 32 or (value & CR0_NW and not value & CR0_CD) or (value & CR0_PG and not value & CR0_PE):
        return False
    value = value & _CR0_KNOWN | CR0_ET
    if value & CR0_PG and not state.cr0 & CR0_PG and state.efer & EFER_LME:
        if not state.cr4 & CR4_PAE or state.cs.ar & _CS_L:
            return False
        state.efer |= EFER_LMA
    if not value & CR0_PG and state.cr0 & CR0_PG:
        if (state.cs.ar & _CS_L and state.efer & EFER_LMA) or state.cr4 & CR4_PCIDE:
            return False
        state.efer &= ~EFER_LMA
    state.cr0 = value
    return True


def _set_cr4(vcpu: "Vcpu", state: CpuState, value: int) -> bool:
    if value & cr4_reserved_bits(vcpu.cpuid) & ~vcpu.vm.host.profile.cr4_always:
        return False
    if state.efer & EFER_LMA and (not value & CR4_PAE or (value ^ state.cr4) & CR4_LA57):
        return False
    if value & CR4_PCIDE and not state.cr4 & CR4_PCIDE and (not state.efer & EFER_LMA or state.cr3 & 0xFFF):
        return False
    state.cr4 = value
    return True


def _set_cr8(vcpu: "Vcpu", cpu: Cpu, value: int) -> bool:
    if value & ~0xF:
        return raise_in_guest(vcpu, cpu, GP)
    before = vcpu.get_cr8()
    vcpu.set_cr8(value)
    skip_instruction(vcpu, cpu)
    if vcpu.apic is not None or before <= value:
        return True
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_SET_TPR
    return False


def emulate_xsetbv(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """XSETBV: only XCR0, only at CPL 0, only valid combinations."""
    value = cpu.gprs[RAX] & _U32 | (cpu.gprs[RDX] & _U32) << 32
    if cpu.cpl() or cpu.gprs[RCX] & _U32 or not XsaveArea(vcpu).xcr0_is_valid(value):
        return raise_in_guest(vcpu, cpu, GP)
    state = cpu.get_state()
    state.xcr0 = value
    cpu.set_state(state)
    skip_instruction(vcpu, cpu)
    return True
