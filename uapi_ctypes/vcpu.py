"""`Vcpu`: a virtual CPU, from KVM_CREATE_VCPU, with its run area."""

import ctypes
from typing import TYPE_CHECKING, Final

from uapi_ctypes.device_attr import AttributeHandle
from uapi_ctypes.dialect import Command, CommandFd, Dialect, NoSuchCommandError
from uapi_ctypes.handle import Handle
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import IoctlArg, KernelMapping
from uapi_ctypes.kvm import KvmEnableCap, KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmRun
from uapi_ctypes.kvm_state import (
    KvmCpuid,
    KvmCpuid2,
    KvmDebugregs,
    KvmFpu,
    KvmGuestDebug,
    KvmInterrupt,
    KvmLapicState,
    KvmMpState,
    KvmMsrs,
    KvmNestedState,
    KvmOneReg,
    KvmRegs,
    KvmSignalMask,
    KvmSregs,
    KvmSregs2,
    KvmTprAccessCtl,
    KvmTranslation,
    KvmVapicAddr,
    KvmVcpuEvents,
    KvmX86Mce,
    KvmXcrs,
    KvmXsave,
)
from uapi_ctypes.tdx_command import memory_encrypt_op, tdx_command
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion

if TYPE_CHECKING:
    from uapi_ctypes.vm import Vm

_RUN: Final = int(KvmRequest.KVM_RUN)


class Vcpu(AttributeHandle):
    """A vCPU. One method per ioctl; every one raises `KvmError` on failure."""

    def __init__(self, vm: "Vm", fd: int, vcpu_id: int) -> None:
        super().__init__(vm.kernel, fd)
        self.vm = vm
        self.vcpu_id = vcpu_id
        self._ioctl = vm.kernel.ioctl
        try:
            self.run_area: KernelMapping = vm.kernel.mmap(fd, vm.vcpu_mmap_size)
        except OSError:
            super().close()
            raise
        self.kvm_run: KvmRun = self.run_area.view(KvmRun)
        """The shared page, in place."""
        self._memory = self.run_area.memory

    @property
    def dialect(self) -> Dialect:
        """How this VM's TDX sub-commands are spoken."""
        return self.vm.dialect

    def close(self) -> None:
        """Unmap the run area and close the file descriptor. Idempotent."""
        self.run_area.close()
        super().close()

    # -- running -------------------------------------------------------------------------------------------

    def run(self) -> int:
        """KVM_RUN: return `kvm_run.exit_reason`.

        Raise `KvmError` as the kernel fails: EINTR for a signal or `kvm_run.immediate_exit`, EFAULT with
        `exit_reason` MEMORY_FAULT for a fault that user space has to resolve, ...
        """
        self._ioctl(self.fd, _RUN, 0)
        reason: int = self.kvm_run.exit_reason
        return reason

    @property
    def exit_reason(self) -> int:
        """`kvm_run.exit_reason`, also meaningful after some failures of `run`."""
        reason: int = self.kvm_run.exit_reason
        return reason

    def io_data(self) -> memoryview:
        """Return the bytes of a KVM_EXIT_IO, in place: ``size * count`` of them, read or written."""
        io = self.kvm_run.io
        start = io.data_offset
        return self._memory[start : start + io.size * io.count]

    def set_signal_mask(self, sigset: bytes | None) -> None:
        """KVM_SET_SIGNAL_MASK: block `sigset`, a kernel sigset_t, while in KVM_RUN; None restores."""
        if sigset is None:
            self.ioctl(KvmRequest.KVM_SET_SIGNAL_MASK, 0)
        else:
            self.ioctl(KvmRequest.KVM_SET_SIGNAL_MASK, KvmSignalMask.of(sigset))

    # -- registers -----------------------------------------------------------------------------------------

    def get_regs(self) -> KvmRegs:
        """KVM_GET_REGS; EINVAL on a TD."""
        regs = KvmRegs()
        self.ioctl(KvmRequest.KVM_GET_REGS, regs)
        return regs

    def set_regs(self, regs: KvmRegs) -> None:
        """KVM_SET_REGS."""
        self.ioctl(KvmRequest.KVM_SET_REGS, regs)

    def get_sregs(self) -> KvmSregs:
        """KVM_GET_SREGS."""
        sregs = KvmSregs()
        self.ioctl(KvmRequest.KVM_GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: KvmSregs) -> None:
        """KVM_SET_SREGS."""
        self.ioctl(KvmRequest.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> KvmSregs2:
        """KVM_GET_SREGS2."""
        sregs = KvmSregs2()
        self.ioctl(KvmRequest.KVM_GET_SREGS2, sregs)
        return sregs

    def set_sregs2(self, sregs: KvmSregs2) -> None:
        """KVM_SET_SREGS2."""
        self.ioctl(KvmRequest.KVM_SET_SREGS2, sregs)

    def get_fpu(self) -> KvmFpu:
        """KVM_GET_FPU."""
        fpu = KvmFpu()
        self.ioctl(KvmRequest.KVM_GET_FPU, fpu)
        return fpu

    def set_fpu(self, fpu: KvmFpu) -> None:
        """KVM_SET_FPU."""
        self.ioctl(KvmRequest.KVM_SET_FPU, fpu)

    def get_xsave(self) -> KvmXsave:
        """KVM_GET_XSAVE: the first 4 KiB of the state."""
        xsave = KvmXsave()
        self.ioctl(KvmRequest.KVM_GET_XSAVE, xsave)
        return xsave

    def get_xsave2(self, size: int) -> "ctypes.Array[ctypes.c_uint8]":
        """KVM_GET_XSAVE2 into `size` [bytes], as KVM_CAP_XSAVE2 on the VM says."""
        xsave = (ctypes.c_uint8 * size)()
        self.ioctl(KvmRequest.KVM_GET_XSAVE2, xsave)
        return xsave

    def set_xsave(self, xsave: IoctlArg) -> None:
        """KVM_SET_XSAVE: a `KvmXsave`, or the array of `get_xsave2`."""
        self.ioctl(KvmRequest.KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> KvmXcrs:
        """KVM_GET_XCRS."""
        xcrs = KvmXcrs()
        self.ioctl(KvmRequest.KVM_GET_XCRS, xcrs)
        return xcrs

    def set_xcrs(self, xcrs: KvmXcrs) -> None:
        """KVM_SET_XCRS."""
        self.ioctl(KvmRequest.KVM_SET_XCRS, xcrs)

    def get_debugregs(self) -> KvmDebugregs:
        """KVM_GET_DEBUGREGS."""
        debugregs = KvmDebugregs()
        self.ioctl(KvmRequest.KVM_GET_DEBUGREGS, debugregs)
        return debugregs

    def set_debugregs(self, debugregs: KvmDebugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self.ioctl(KvmRequest.KVM_SET_DEBUGREGS, debugregs)

    def get_one_reg(self, register_id: int, hva: int) -> None:
        """KVM_GET_ONE_REG to `hva`; since Linux 6.18 on x86."""
        self.ioctl(KvmRequest.KVM_GET_ONE_REG, KvmOneReg(register_id, hva))

    def set_one_reg(self, register_id: int, hva: int) -> None:
        """KVM_SET_ONE_REG from `hva`; since Linux 6.18 on x86."""
        self.ioctl(KvmRequest.KVM_SET_ONE_REG, KvmOneReg(register_id, hva))

    def get_nested_state(self, size: int) -> KvmNestedState:
        """KVM_GET_NESTED_STATE with room for `size` [bytes] in all, as KVM_CAP_NESTED_STATE says."""
        state = KvmNestedState.allocate(max(size - ctypes.sizeof(KvmNestedState), 0))
        state.size = size
        self.ioctl(KvmRequest.KVM_GET_NESTED_STATE, state)
        return state

    def set_nested_state(self, state: KvmNestedState) -> None:
        """KVM_SET_NESTED_STATE."""
        self.ioctl(KvmRequest.KVM_SET_NESTED_STATE, state)

    def translate(self, linear_address: int) -> KvmTranslation:
        """KVM_TRANSLATE."""
        translation = KvmTranslation(linear_address)
        self.ioctl(KvmRequest.KVM_TRANSLATE, translation)
        return translation

    # -- CPUID, MSRs, capabilities -------------------------------------------------------------------------

    def set_cpuid(self, cpuid: KvmCpuid) -> None:
        """KVM_SET_CPUID: the old form, without sub-leaves."""
        self.ioctl(KvmRequest.KVM_SET_CPUID, cpuid)

    def set_cpuid2(self, cpuid: KvmCpuid2) -> None:
        """KVM_SET_CPUID2."""
        self.ioctl(KvmRequest.KVM_SET_CPUID2, cpuid)

    def get_cpuid2(self, nent: int) -> KvmCpuid2:
        """KVM_GET_CPUID2 with room for `nent` entries; E2BIG when that is not enough."""
        cpuid = KvmCpuid2.allocate(nent)
        self.ioctl(KvmRequest.KVM_GET_CPUID2, cpuid)
        return cpuid

    def get_msrs(self, msrs: KvmMsrs) -> int:
        """KVM_GET_MSRS: return how many were read; it stops at the first that fails."""
        return self.ioctl(KvmRequest.KVM_GET_MSRS, msrs)

    def set_msrs(self, msrs: KvmMsrs) -> int:
        """KVM_SET_MSRS: return how many were written; it stops at the first that fails."""
        return self.ioctl(KvmRequest.KVM_SET_MSRS, msrs)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four `args`."""
        enable = KvmEnableCap(cap, flags)
        enable.args[: len(args)] = args
        return self.ioctl(KvmRequest.KVM_ENABLE_CAP, enable)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        self.ioctl(KvmRequest.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.ioctl(KvmRequest.KVM_GET_TSC_KHZ)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused."""
        self.ioctl(KvmRequest.KVM_KVMCLOCK_CTRL)

    # -- events --------------------------------------------------------------------------------------------

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: a `KvmMpStateValue`."""
        state = KvmMpState()
        self.ioctl(KvmRequest.KVM_GET_MP_STATE, state)
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        self.ioctl(KvmRequest.KVM_SET_MP_STATE, KvmMpState(mp_state))

    def get_vcpu_events(self) -> KvmVcpuEvents:
        """KVM_GET_VCPU_EVENTS."""
        events = KvmVcpuEvents()
        self.ioctl(KvmRequest.KVM_GET_VCPU_EVENTS, events)
        return events

    def set_vcpu_events(self, events: KvmVcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self.ioctl(KvmRequest.KVM_SET_VCPU_EVENTS, events)

    def get_lapic(self) -> KvmLapicState:
        """KVM_GET_LAPIC."""
        lapic = KvmLapicState()
        self.ioctl(KvmRequest.KVM_GET_LAPIC, lapic)
        return lapic

    def set_lapic(self, lapic: KvmLapicState) -> None:
        """KVM_SET_LAPIC."""
        self.ioctl(KvmRequest.KVM_SET_LAPIC, lapic)

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue vector `irq`; without an in-kernel PIC only."""
        self.ioctl(KvmRequest.KVM_INTERRUPT, KvmInterrupt(irq))

    def nmi(self) -> None:
        """KVM_NMI."""
        self.ioctl(KvmRequest.KVM_NMI)

    def smi(self) -> None:
        """KVM_SMI."""
        self.ioctl(KvmRequest.KVM_SMI)

    def set_guest_debug(self, debug: KvmGuestDebug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        self.ioctl(KvmRequest.KVM_SET_GUEST_DEBUG, debug)

    def tpr_access_reporting(self, enabled: int) -> None:
        """KVM_TPR_ACCESS_REPORTING."""
        self.ioctl(KvmRequest.KVM_TPR_ACCESS_REPORTING, KvmTprAccessCtl(enabled))

    def set_vapic_addr(self, gpa: int) -> None:
        """KVM_SET_VAPIC_ADDR."""
        self.ioctl(KvmRequest.KVM_SET_VAPIC_ADDR, KvmVapicAddr(gpa))

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE."""
        self.ioctl(KvmRequest.KVM_X86_SETUP_MCE, (ctypes.c_uint64 * 1)(mcg_cap))

    def x86_set_mce(self, mce: KvmX86Mce) -> None:
        """KVM_X86_SET_MCE."""
        self.ioctl(KvmRequest.KVM_X86_SET_MCE, mce)

    def get_stats_fd(self) -> Handle:
        """KVM_GET_STATS_FD: a read-only file of statistics; the caller closes it."""
        return Handle(self.kernel, self.ioctl(KvmRequest.KVM_GET_STATS_FD))

    # -- memory and TDX ------------------------------------------------------------------------------------

    def pre_fault_memory(self, region: KvmPreFaultMemory) -> None:
        """KVM_PRE_FAULT_MEMORY: `region` comes back as what is still to do."""
        self.ioctl(KvmRequest.KVM_PRE_FAULT_MEMORY, region)

    def memory_encrypt_op(self, cmd: IoctlArg) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the vCPU, raw."""
        return memory_encrypt_op(self, self.dialect, cmd)

    def tdx_command(self, command: Command, data: int | ctypes.Structure = 0, flags: int = 0) -> None:
        """Issue any sub-command on the vCPU's file descriptor, also one that belongs elsewhere."""
        tdx_command(self, self.dialect, command, data, flags)

    def tdx_init_vcpu(self, initial_rcx: int = 0) -> None:
        """KVM_TDX_INIT_VCPU: `initial_rcx` is what the guest finds in RCX and R8."""
        tdx_command(self, self.dialect, self.dialect.init_vcpu, initial_rcx)

    def tdx_init_mem_region(self, region: KvmTdxInitMemRegion, flags: int = 0) -> None:
        """KVM_TDX_INIT_MEM_REGION, on the vCPU or on its VM as the dialect has it.

        `region` comes back as what is still to do. `flags`: KVM_TDX_MEASURE_MEMORY_REGION.
        """
        command = self.dialect.init_mem_region
        target: Handle = self if command.fd is CommandFd.VCPU else self.vm
        tdx_command(target, self.dialect, command, region, flags)

    def tdx_get_cpuid(self, nent: int) -> KvmCpuid2:
        """KVM_TDX_GET_CPUID with room for `nent` entries: mainline only, else `NoSuchCommandError`."""
        command = self.dialect.get_cpuid
        if command is None:
            raise NoSuchCommandError(f"{self.dialect} has no KVM_TDX_GET_CPUID")
        cpuid = KvmCpuid2.allocate(nent)
        tdx_command(self, self.dialect, command, cpuid)
        return cpuid
