"""The TD VMCS: its initial values, and its fields as metadata reads and writes them.

Guest state is where the guest runs, in the `Cpu` and its virtual APIC; exit information is the `Cpu`'s last exit;
everything else is a dictionary in the TDVPS. Encodings: Intel SDM Vol. 3, Appendix B. Initial values: TDX Module ABI
Reference, "TD VMCS".
"""

from collections.abc import Callable
from typing import Final

from sim_backend.cpu.engine import Cpu, CpuState, Segment
from sim_backend.cpu.virtual_apic import VirtualApic
from sim_backend.tdx_module.cpu_capabilities import CpuCapabilities
from sim_backend.tdx_module.cpuid_virtualization import CpuidFlags
from sim_backend.tdx_module.errors import SimBug
from sim_backend.tdx_module.td_params import ATTR_DEBUG, ATTR_PERFMON, ATTR_PKS, XFAM_CET
from sim_backend.tdx_module.tdcs import MSR_BITMAP_PAGE, ZERO_PAGE
from sim_backend.tdx_module.tdr import Tdr
from sim_backend.tdx_module.tdvps import Tdvps

NULL_PA: Final = (1 << 64) - 1

VPID: Final = 0x0000
POSTED_INTERRUPT_VECTOR: Final = 0x0002
GUEST_INTERRUPT_STATUS: Final = 0x0810
PML_ADDRESS: Final = 0x200E
POSTED_INTERRUPT_DESCRIPTOR: Final = 0x2016
SHARED_EPTP: Final = 0x203C
IA32_DEBUGCTL: Final = 0x2802
IA32_EFER: Final = 0x2806
PIN_CONTROLS: Final = 0x4000
PROC_CONTROLS: Final = 0x4002
EXCEPTION_BITMAP: Final = 0x4004
PF_ERROR_CODE_MASK: Final = 0x4006
PF_ERROR_CODE_MATCH: Final = 0x4008
ENTRY_INTERRUPTION_INFO: Final = 0x4016
ENTRY_EXCEPTION_ERROR: Final = 0x4018
PROC_CONTROLS2: Final = 0x401E
INTERRUPTIBILITY: Final = 0x4824
CR0_GUEST_HOST_MASK: Final = 0x6000
CR4_GUEST_HOST_MASK: Final = 0x6002
CR0_READ_SHADOW: Final = 0x6004
CR4_READ_SHADOW: Final = 0x6006
GUEST_CR0: Final = 0x6800
GUEST_CR4: Final = 0x6804
GUEST_RFLAGS: Final = 0x6820

POSTED_INTERRUPT_VECTOR_INIT: Final = 0xFFFF
PIN_PROCESS_POSTED_INTERRUPTS: Final = 1 << 7
PROC_NMI_WINDOW: Final = 1 << 22
PROC2_EN_PML: Final = 1 << 17

GUEST_CR0_INIT: Final = 0x21
GUEST_CR4_INIT: Final = 0x2040
# CR0 bits that the module knows as reserved, and NE, NW, CD: never the guest's.
CR0_MODULE_BITS: Final = 1 << 5 | 1 << 29 | 1 << 30 | ((1 << 64) - (1 << 32)) | 0x1FF8_0000 | 1 << 17 | 0xFFC0

_MWAIT_EXITING: Final = 1 << 10
_RDPMC_EXITING: Final = 1 << 11
_MONITOR_EXITING: Final = 1 << 29
_EN_GUEST_WAIT_PAUSE: Final = 1 << 26
_EN_PCONFIG: Final = 1 << 27
_EXIT_PERF_GLOBAL_CTRL: Final = 1 << 12 | 1 << 30
_ENTRY_PERF_GLOBAL_CTRL: Final = 1 << 13
_ENTRY_PKRS: Final = 1 << 22
SPEC_CTRL_DDPD_U: Final = 1 << 8

_MSR_PAT, _MSR_SYSENTER_CS, _MSR_SYSENTER_ESP, _MSR_SYSENTER_EIP = 0x277, 0x174, 0x175, 0x176
_MSR_S_CET, _MSR_SSP_TABLE = 0x6A2, 0x6A8
_PAT_INIT: Final = 0x0007_0406_0007_0406


def _masked(value: int, bits: int, *, on: bool) -> int:
    return value | bits if on else value & ~bits


def initialize(tdr: Tdr, tdvps: Tdvps, capabilities: CpuCapabilities, hkid_start_bit: int) -> None:
    """Fill the TD VMCS of a vCPU that TDH.VP.INIT initialises; the guest's registers are the `Cpu`'s."""
    tdcs = tdr.tdcs
    attributes, xfam = tdcs.attributes, tdcs.xfam
    flags: CpuidFlags = tdcs.cpuid_flags
    controls = capabilities.l1_controls
    hkid = tdr.hkid << hkid_start_bit
    tdcx = [hpa | hkid for hpa in tdr.tdcx_pa]
    tdvps_pages = [hpa | hkid for hpa in tdvps.tdvps_page_pa]

    proc = _masked(controls.proc, _MWAIT_EXITING | _MONITOR_EXITING, on=not flags.monitor_mwait)
    proc = _masked(proc, _RDPMC_EXITING, on=not attributes & ATTR_PERFMON)
    proc2 = _masked(controls.proc2, _EN_GUEST_WAIT_PAUSE, on=flags.waitpkg)
    proc2 = _masked(proc2, _EN_PCONFIG, on=flags.mktme)
    perf_global = bool(attributes & (ATTR_PERFMON | ATTR_DEBUG))
    pkrs = bool(attributes & (ATTR_PKS | ATTR_DEBUG))
    entry = _masked(controls.entry, _ENTRY_PERF_GLOBAL_CTRL, on=perf_global)

    cr4_mask = capabilities.cr4_fixed0 | ~capabilities.cr4_fixed1 | 1 << 6 | 7 << 13 | (1 << 64) - (1 << 26) | 1 << 19
    for bit, owned in (
        (1 << 22, not xfam & 1 << 9),
        (1 << 23, xfam & XFAM_CET != XFAM_CET),
        (1 << 25, not xfam & 1 << 14),
        (1 << 24, not attributes & ATTR_PKS),
    ):
        cr4_mask |= bit if owned else 0
    cr0_fixed = (capabilities.cr0_fixed0 | ~capabilities.cr0_fixed1) & ~(1 << 31)

    tdvps.vmcs = {
        VPID: tdr.hkid << 2,
        POSTED_INTERRUPT_VECTOR: POSTED_INTERRUPT_VECTOR_INIT,
        **dict.fromkeys((0x2000, 0x2002, 0x2006, 0x2008, 0x200A, PML_ADDRESS, 0x2014), NULL_PA),
        0x2004: tdcx[MSR_BITMAP_PAGE],
        0x2010: tdcs.tsc_offset,
        0x2012: tdvps_pages[2],
        POSTED_INTERRUPT_DESCRIPTOR: NULL_PA,
        0x201A: tdcs.eptp,
        **dict.fromkeys((0x2024, 0x2026, 0x2028, 0x202E, 0x203E, 0x2800), NULL_PA),
        0x202A: tdvps_pages[0],
        0x2032: tdcs.tsc_multiplier,
        0x2034: _masked(controls.proc3, 1 << 5, on=tdcs.gpaw),
        0x2036: NULL_PA if controls.proc2 & 1 << 28 else 0,
        **dict.fromkeys((0x2038, 0x203A, SHARED_EPTP), tdcx[ZERO_PAGE]),
        0x204A: 0 if flags.ddpd else SPEC_CTRL_DDPD_U,
        0x2808: 0xFF,
        **dict.fromkeys((0x280A, 0x280C, 0x280E, 0x2810), NULL_PA),
        PIN_CONTROLS: controls.pin,
        PROC_CONTROLS: proc,
        EXCEPTION_BITMAP: 1 << 18,  # machine checks
        0x400C: _masked(controls.exit, _EXIT_PERF_GLOBAL_CTRL, on=perf_global),
        0x4012: _masked(entry, _ENTRY_PKRS, on=pkrs),
        PROC_CONTROLS2: proc2,
        0x4026: tdr.hkid,
        CR0_GUEST_HOST_MASK: (cr0_fixed | 1 | CR0_MODULE_BITS) & NULL_PA,
        CR4_GUEST_HOST_MASK: cr4_mask & NULL_PA,
        CR0_READ_SHADOW: capabilities.cr0_fixed0 | GUEST_CR0_INIT,
        CR4_READ_SHADOW: capabilities.cr4_fixed0 & ~(1 << 13) | 1 << 6,
    }


def initial_cpu_state(xcr0: int = 1) -> CpuState:
    """Return the state in which a vCPU starts: 32-bit protected mode, flat segments, no paging.

    CR0 and CR4 are as the guest sees them: the bits that VMX keeps set behind its back are not there.
    """

    def data() -> Segment:
        return Segment(0, 0, 0xFFFF_FFFF, 0xC093)

    return CpuState(
        cr0=GUEST_CR0_INIT,
        cr4=GUEST_CR4_INIT & ~(1 << 13),
        efer=0x901,
        xcr0=xcr0,
        es=data(),
        cs=Segment(0, 0, 0xFFFF_FFFF, 0xC09B),
        ss=data(),
        ds=data(),
        fs=data(),
        gs=data(),
        ldtr=Segment(0, 0, 0xFFFF, 0x10082),
        tr=Segment(0, 0, 0xFFFF, 0x8B),
        gdtr_limit=0xFFFF,
        idtr_limit=0,
        msrs={_MSR_PAT: _PAT_INIT},
    )


_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_STATE_FIELDS: Final = {
    0x6802: "cr3", IA32_EFER: "efer",
    0x4810: "gdtr_limit", 0x4812: "idtr_limit", 0x6816: "gdtr_base", 0x6818: "idtr_base",
}  # fmt: skip
_STATE_MSRS: Final = {
    0x2804: _MSR_PAT, 0x482A: _MSR_SYSENTER_CS, 0x6824: _MSR_SYSENTER_ESP, 0x6826: _MSR_SYSENTER_EIP,
    0x6828: _MSR_S_CET, 0x682C: _MSR_SSP_TABLE,
}  # fmt: skip
_EXIT_FIELDS: Final = {
    0x2400: "gpa", 0x4402: "reason", 0x4404: "interruption_info", 0x4406: "interruption_error",
    0x440C: "instruction_length", 0x440E: "instruction_info", 0x6400: "qualification", 0x640A: "gla",
}  # fmt: skip
# Encodings are of the form base + 2 * segment; the state holds (attribute of the segment).
_SEGMENT_FIELDS: Final = {
    base + 2 * number: (name, attribute)
    for base, attribute in ((0x800, "selector"), (0x4800, "limit"), (0x4814, "ar"), (0x6806, "base"))
    for number, name in enumerate(_SEGMENTS)
}
_RSP_ENCODING: Final = 0x681C
_RIP_ENCODING: Final = 0x681E
_DR7_ENCODING: Final = 0x681A
_RSP: Final = 4


def _cpu(tdvps: Tdvps) -> Cpu:
    if tdvps.cpu is None:
        raise SimBug("a TD VMCS before TDH.VP.INIT")
    return tdvps.cpu


def virtual_apic(tdvps: Tdvps) -> VirtualApic:
    """Return the vCPU's virtual APIC, which keeps Guest Interrupt Status."""
    apic = _cpu(tdvps).virtual_apic
    if apic is None:
        raise SimBug("an initialised vCPU without its virtual APIC")
    return apic


def real_cr0(tdvps: Tdvps, seen: int) -> int:
    """Return Guest CR0 of a guest that reads `seen`: bits that the module owns have their initial value."""
    mask = tdvps.vmcs[CR0_GUEST_HOST_MASK]
    return seen & ~mask | GUEST_CR0_INIT & mask


def real_cr4(tdvps: Tdvps, seen: int) -> int:
    """Return Guest CR4 of a guest that reads `seen`: bits that the module owns have their initial value."""
    mask = tdvps.vmcs[CR4_GUEST_HOST_MASK]
    return seen & ~mask | GUEST_CR4_INIT & mask


def read(tdvps: Tdvps, encoding: int) -> int:
    """Return the field `encoding`; one that was never written reads 0, as a VMCS made by TDH.VP.ADDCX does."""
    cpu = _cpu(tdvps)
    if encoding in _EXIT_FIELDS:
        value: int = getattr(cpu.exit, _EXIT_FIELDS[encoding])
        return value
    if encoding == _RIP_ENCODING:
        return cpu.rip
    if encoding == GUEST_RFLAGS:
        return cpu.rflags
    if encoding == _RSP_ENCODING:
        return cpu.gprs[_RSP]
    if encoding == GUEST_INTERRUPT_STATUS:
        return virtual_apic(tdvps).guest_interrupt_status
    reader = _state_reader(tdvps, encoding)
    return tdvps.vmcs.get(encoding, 0) if reader is None else reader(cpu.get_state())


def _state_reader(tdvps: Tdvps, encoding: int) -> Callable[[CpuState], int] | None:
    if encoding == GUEST_CR0:
        return lambda state: real_cr0(tdvps, state.cr0)
    if encoding == GUEST_CR4:
        return lambda state: real_cr4(tdvps, state.cr4)
    if encoding == _DR7_ENCODING:
        return lambda state: state.dr[5]
    if encoding in _SEGMENT_FIELDS:
        name, attribute = _SEGMENT_FIELDS[encoding]
        return lambda state: int(getattr(getattr(state, name), attribute))
    if encoding in _STATE_FIELDS:
        return lambda state: int(getattr(state, _STATE_FIELDS[encoding]))
    if encoding in _STATE_MSRS:
        return lambda state: state.msrs.get(_STATE_MSRS[encoding], 0)
    return None


def write(tdvps: Tdvps, encoding: int, value: int) -> None:
    """Store `value` in the field `encoding`; CR0 and CR4 take the real value (see `real_cr0`)."""
    cpu = _cpu(tdvps)
    if encoding == _RIP_ENCODING:
        cpu.rip = value
    elif encoding == GUEST_RFLAGS:
        cpu.rflags = value
    elif encoding == _RSP_ENCODING:
        cpu.gprs[_RSP] = value
    elif encoding == GUEST_INTERRUPT_STATUS:
        virtual_apic(tdvps).guest_interrupt_status = value
    elif _state_reader(tdvps, encoding) is not None:
        state = cpu.get_state()
        _store_state(tdvps, state, encoding, value)
        cpu.set_state(state)
    else:
        tdvps.vmcs[encoding] = value


def _store_state(tdvps: Tdvps, state: CpuState, encoding: int, value: int) -> None:
    vmcs = tdvps.vmcs
    if encoding == GUEST_CR0:
        mask = vmcs[CR0_GUEST_HOST_MASK]
        state.cr0 = value & ~mask | vmcs[CR0_READ_SHADOW] & mask
    elif encoding == GUEST_CR4:
        mask = vmcs[CR4_GUEST_HOST_MASK]
        state.cr4 = value & ~mask | vmcs[CR4_READ_SHADOW] & mask
    elif encoding == _DR7_ENCODING:
        state.dr[5] = value
    elif encoding in _SEGMENT_FIELDS:
        name, attribute = _SEGMENT_FIELDS[encoding]
        setattr(getattr(state, name), attribute, value)
    elif encoding in _STATE_FIELDS:
        setattr(state, _STATE_FIELDS[encoding], value)
    else:
        state.msrs[_STATE_MSRS[encoding]] = value
