"""The ioctls of a vCPU fd (`kvm_vcpu_ioctl`, `kvm_arch_vcpu_ioctl`)."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import (
    ENTRY2_BYTES,
    KVM_MAX_CPUID_ENTRIES,
    CpuidEntry,
    VcpuCpuid,
    find_entry,
    unpack_entries,
    with_forced_bits,
)
from sim_backend.kvm.dispatch import CallTable, IoctlHandler
from sim_backend.kvm.errors import Errno, NotModelled, as_int
from sim_backend.kvm.files import Files
from sim_backend.kvm.msr_ioctls import MsrIoctls
from sim_backend.kvm.msrs import set_up_mce
from sim_backend.kvm.pre_fault import pre_fault_memory
from sim_backend.kvm.registers import RegisterIoctls
from sim_backend.kvm.run import make_run
from sim_backend.kvm.signals import SIGNALS
from sim_backend.kvm.stats import publish_stats
from sim_backend.kvm.system_queries import write_cpuid
from sim_backend.kvm.vcpu import MpState
from sim_backend.kvm.vcpu_events import VcpuEventIoctls
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.ioctl import KvmRequest

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_MSRS_HEADER: Final = struct.Struct("<II")
_CPUID_ENTRY1: Final = struct.Struct("<5I4x")  # struct kvm_cpuid_entry: no index, no flags
_XFEATURE_XTILE_DATA: Final = 1 << 18  # the one component that a process must ask for
_VALID_VIRT_BITS: Final = frozenset({0, 48, 57})
_SETTABLE_MP_STATES: Final = frozenset(int(state) for state in MpState)
KVM_VCPU_TSC_CTRL: Final = 0
KVM_VCPU_TSC_OFFSET: Final = 0
_MAX_MCE_BANKS: Final = 32
NESTED_HEADER_BYTES: Final = 128  # struct kvm_nested_state up to its data
NESTED_FORMAT_SVM: Final = 1
NESTED_GUEST_MODE: Final = 1 << 0
NESTED_RUN_PENDING: Final = 1 << 1
NESTED_EVMCS: Final = 1 << 2
NESTED_MTF_PENDING: Final = 1 << 3
NESTED_GIF_SET: Final = 1 << 8
_NESTED_FLAGS: Final = NESTED_GUEST_MODE | NESTED_RUN_PENDING | NESTED_EVMCS | NESTED_MTF_PENDING | NESTED_GIF_SET
_NESTED_VMCB_BYTES: Final = 4096
_NESTED_HEADER: Final = struct.Struct("<HHIQQH102x")  # flags format size; of VMX: vmxon_pa vmcs12_pa smm.flags
_EFER_SVME: Final = 1 << 12
_U64: Final = (1 << 64) - 1


class VcpuIoctls:
    """One vCPU fd."""

    def __init__(self, vcpu: "Vcpu", files: Files) -> None:
        self._vcpu: Final = vcpu
        self._vm: Final = vcpu.vm
        self._files: Final = files

    def table(self) -> CallTable:
        """Return the handlers by request number; all but KVM_RUN and the unlocked ones hold vcpu->mutex."""
        vcpu, vm, files = self._vcpu, self._vm, self._files
        registers = RegisterIoctls(vcpu)
        msrs = MsrIoctls(vcpu)
        events = VcpuEventIoctls(vcpu)
        locked: dict[int, IoctlHandler] = {
            KvmRequest.KVM_GET_REGS: registers.get_regs,
            KvmRequest.KVM_SET_REGS: registers.set_regs,
            KvmRequest.KVM_GET_SREGS: registers.get_sregs,
            KvmRequest.KVM_SET_SREGS: registers.set_sregs,
            KvmRequest.KVM_GET_SREGS2: registers.get_sregs2,
            KvmRequest.KVM_SET_SREGS2: registers.set_sregs2,
            KvmRequest.KVM_GET_FPU: registers.get_fpu,
            KvmRequest.KVM_SET_FPU: registers.set_fpu,
            KvmRequest.KVM_GET_XSAVE: registers.get_xsave,
            KvmRequest.KVM_SET_XSAVE: registers.set_xsave,
            KvmRequest.KVM_GET_XSAVE2: registers.get_xsave,
            KvmRequest.KVM_GET_XCRS: registers.get_xcrs,
            KvmRequest.KVM_SET_XCRS: registers.set_xcrs,
            KvmRequest.KVM_GET_DEBUGREGS: registers.get_debugregs,
            KvmRequest.KVM_SET_DEBUGREGS: registers.set_debugregs,
            KvmRequest.KVM_TRANSLATE: registers.translate,
            KvmRequest.KVM_SET_GUEST_DEBUG: registers.set_guest_debug,
            KvmRequest.KVM_GET_LAPIC: events.get_lapic,
            KvmRequest.KVM_SET_LAPIC: events.set_lapic,
            KvmRequest.KVM_INTERRUPT: events.interrupt,
            KvmRequest.KVM_NMI: events.nmi,
            KvmRequest.KVM_SMI: events.smi,
            KvmRequest.KVM_GET_VCPU_EVENTS: events.get_vcpu_events,
            KvmRequest.KVM_SET_VCPU_EVENTS: events.set_vcpu_events,
            KvmRequest.KVM_GET_MP_STATE: events.get_mp_state,
            KvmRequest.KVM_SET_MP_STATE: events.set_mp_state,
            KvmRequest.KVM_SET_VAPIC_ADDR: events.set_vapic_addr,
            KvmRequest.KVM_TPR_ACCESS_REPORTING: events.tpr_access_reporting,
            KvmRequest.KVM_SET_SIGNAL_MASK: events.set_signal_mask,
            KvmRequest.KVM_SET_CPUID: self.set_cpuid,
            KvmRequest.KVM_SET_CPUID2: self.set_cpuid2,
            KvmRequest.KVM_GET_CPUID2: self.get_cpuid2,
            KvmRequest.KVM_GET_MSRS: msrs.get_msrs,
            KvmRequest.KVM_SET_MSRS: msrs.set_msrs,
            KvmRequest.KVM_SET_TSC_KHZ: self.set_tsc_khz,
            KvmRequest.KVM_GET_TSC_KHZ: self.get_tsc_khz,
            KvmRequest.KVM_X86_SETUP_MCE: self.setup_mce,
            KvmRequest.KVM_X86_SET_MCE: self.set_mce,
            KvmRequest.KVM_ENABLE_CAP: self.enable_cap,
            KvmRequest.KVM_KVMCLOCK_CTRL: self.kvmclock_ctrl,
            KvmRequest.KVM_HAS_DEVICE_ATTR: self.has_device_attr,
            KvmRequest.KVM_GET_DEVICE_ATTR: self.get_device_attr,
            KvmRequest.KVM_SET_DEVICE_ATTR: self.set_device_attr,
            KvmRequest.KVM_GET_SUPPORTED_HV_CPUID: self.get_supported_hv_cpuid,
            KvmRequest.KVM_GET_NESTED_STATE: self.get_nested_state,
            KvmRequest.KVM_SET_NESTED_STATE: self.set_nested_state,
        }
        if vm.host.profile.behaves("one_reg"):
            locked[KvmRequest.KVM_GET_ONE_REG] = msrs.get_one_reg
            locked[KvmRequest.KVM_SET_ONE_REG] = msrs.set_one_reg
        if vm.host.profile.behaves("pre_fault_memory"):
            locked[KvmRequest.KVM_PRE_FAULT_MEMORY] = lambda argp: pre_fault_memory(vcpu, argp)
        handlers = {int(request): _with_mutex(vcpu, handler) for request, handler in locked.items()}
        handlers[int(KvmRequest.KVM_RUN)] = make_run(vcpu)
        handlers[int(KvmRequest.KVM_MEMORY_ENCRYPT_OP)] = self.memory_encrypt_op
        handlers[int(KvmRequest.KVM_GET_STATS_FD)] = lambda _arg: publish_stats(vm, files, vcpu)
        table = CallTable(handlers, errno.EINVAL)
        vm.call_tables.append(table)
        return table

    # ---- CPUID ------------------------------------------------------------------------------------------

    def set_cpuid2(self, argp: int) -> int:
        """KVM_SET_CPUID2."""
        mm = self._vm.mm
        nent, _ = _MSRS_HEADER.unpack(mm.read(argp, 8))
        if nent > KVM_MAX_CPUID_ENTRIES:
            raise Errno(errno.E2BIG)
        self._set_cpuid(unpack_entries(mm.read(argp + 8, nent * ENTRY2_BYTES)))
        return 0

    def set_cpuid(self, argp: int) -> int:
        """KVM_SET_CPUID: the older structure, without sub-leaves."""
        mm = self._vm.mm
        nent, _ = _MSRS_HEADER.unpack(mm.read(argp, 8))
        if nent > KVM_MAX_CPUID_ENTRIES:
            raise Errno(errno.E2BIG)
        raw = mm.read(argp + 8, nent * _CPUID_ENTRY1.size)
        self._set_cpuid([CpuidEntry(f, 0, 0, a, b, c, d) for f, a, b, c, d in _CPUID_ENTRY1.iter_unpack(raw)])
        return 0

    def _set_cpuid(self, entries: list[CpuidEntry]) -> None:
        vcpu = self._vcpu
        vcpu.refresh_runtime_cpuid()
        if vcpu.has_run:
            # The bits that KVM itself keeps up to date are brought up to date in the new table before they are
            # compared (kvm_cpuid_check_equal), or not even the table that was set would be accepted again.
            installed = vcpu.cpuid
            vcpu.cpuid = VcpuCpuid(with_forced_bits(entries, self._vm.host.profile.cpuid_forced))
            vcpu.refresh_runtime_cpuid()
            same = vcpu.cpuid.entries == installed.entries
            vcpu.cpuid = installed
            if not same:
                raise Errno(errno.EINVAL)
            return
        size = next((entry for entry in entries if entry.function == 0x8000_0008), None)
        if size is not None and size.eax >> 8 & 0xFF not in _VALID_VIRT_BITS:
            raise Errno(errno.EINVAL)
        state = find_entry(entries, 0xD, 0)
        if state is not None and state.eax & _XFEATURE_XTILE_DATA:
            raise Errno(errno.EPERM)  # no process has asked this host for AMX (ARCH_REQ_XCOMP_GUEST_PERM)
        self._vm.ops.vcpu_check_cpuid(vcpu, entries)
        vcpu.cpuid = VcpuCpuid(with_forced_bits(entries, self._vm.host.profile.cpuid_forced))
        vcpu.refresh_runtime_cpuid()
        if vcpu.apic is not None:
            vcpu.apic.set_version()
        self._vm.ops.vcpu_after_set_cpuid(vcpu)

    def get_cpuid2(self, argp: int) -> int:
        """KVM_GET_CPUID2: E2BIG leaves nent alone."""
        mm = self._vm.mm
        nent, padding = _MSRS_HEADER.unpack(mm.read(argp, 8))
        self._vcpu.refresh_runtime_cpuid()
        entries = self._vcpu.cpuid.entries
        if nent < len(entries):
            raise Errno(errno.E2BIG)
        mm.write(argp + 8, b"".join(entry.pack() for entry in entries))
        mm.write(argp, _MSRS_HEADER.pack(len(entries), padding))
        return 0

    def get_supported_hv_cpuid(self, argp: int) -> int:
        """KVM_GET_SUPPORTED_HV_CPUID on a vCPU."""
        entries = self._vm.host.profile.hyperv_cpuid
        if not entries:
            raise Errno(errno.EINVAL)
        return write_cpuid(self._vm.mm, argp, entries)

    # ---- time -------------------------------------------------------------------------------------------

    def set_tsc_khz(self, khz: int) -> int:
        """KVM_SET_TSC_KHZ on a vCPU [kHz]; 0 is the host's frequency."""
        vcpu, profile = self._vcpu, self._vm.host.profile
        if self._vm.ops.protects_tsc:
            raise Errno(errno.EINVAL)
        khz &= 0xFFFF_FFFF
        if profile.capabilities.get(KvmCap.KVM_CAP_TSC_CONTROL) and khz >= profile.max_tsc_khz:
            raise Errno(errno.EINVAL)
        khz = khz or profile.tsc_khz
        if not profile.capabilities.get(KvmCap.KVM_CAP_TSC_CONTROL) and not profile.tsc_khz_is_close(khz):
            if khz < profile.tsc_khz:
                raise Errno(errno.EINVAL)
            vcpu.tsc_catchup = True  # without scaling, a faster TSC is faked by catching up
        vcpu.tsc_khz = khz
        return 0

    def get_tsc_khz(self, _arg: int) -> int:
        """KVM_GET_TSC_KHZ on a vCPU [kHz]."""
        return as_int(self._vcpu.tsc_khz)

    def kvmclock_ctrl(self, _arg: int) -> int:
        """KVM_KVMCLOCK_CTRL: EINVAL until the guest has switched its kvmclock on."""
        if not self._vcpu.kvmclock_active():
            raise Errno(errno.EINVAL)
        return 0

    def has_device_attr(self, argp: int) -> int:
        """KVM_HAS_DEVICE_ATTR on a vCPU: the TSC offset."""
        self._device_attr(argp)
        return 0

    def get_device_attr(self, argp: int) -> int:
        """KVM_GET_DEVICE_ATTR on a vCPU."""
        address = self._device_attr(argp)
        self._vm.mm.write(address, struct.pack("<Q", self._vcpu.tsc_offset))
        return 0

    def set_device_attr(self, argp: int) -> int:
        """KVM_SET_DEVICE_ATTR on a vCPU: without effect where the TSC is protected."""
        address = self._device_attr(argp)
        (offset,) = struct.unpack("<Q", self._vm.mm.read(address, 8))
        if not self._vm.ops.protects_tsc:
            self._vcpu.set_tsc_offset(offset)
        return 0

    def _device_attr(self, argp: int) -> int:
        _flags, group, attr, address = struct.unpack("<IIQQ", self._vm.mm.read(argp, 24))
        if group != KVM_VCPU_TSC_CTRL or attr != KVM_VCPU_TSC_OFFSET:
            raise Errno(errno.ENXIO)
        return int(address)

    # ---- machine check ----------------------------------------------------------------------------------

    def setup_mce(self, argp: int) -> int:
        """KVM_X86_SETUP_MCE."""
        (cap,) = struct.unpack("<Q", self._vm.mm.read(argp, 8))
        banks = cap & 0xFF
        supported = self._vm.host.profile.mce_cap_supported
        if not banks or banks > _MAX_MCE_BANKS or cap & ~(supported | 0xFF | 0xFF0000):
            raise Errno(errno.EINVAL)
        set_up_mce(self._vcpu, cap)
        return 0

    def set_mce(self, argp: int) -> int:
        """KVM_X86_SET_MCE: inject a machine check into a bank."""
        status, _addr, _misc, _mcg, bank = struct.unpack_from("<QQQQB", self._vm.mm.read(argp, 64))
        banks = self._vcpu.mcg_cap & 0xFF
        if bank >= banks or not status >> 63 & 1:
            raise Errno(errno.EINVAL)
        return self._vcpu.inject_mce(self._vm.mm.read(argp, 64))

    # ---- other ------------------------------------------------------------------------------------------

    def enable_cap(self, argp: int) -> int:
        """KVM_ENABLE_CAP on a vCPU."""
        capability, flags, *args = struct.unpack("<II4Q64x", self._vm.mm.read(argp, 104))
        if flags:
            raise Errno(errno.EINVAL)
        offered = self._vm.host.profile.capabilities.get
        if capability in (KvmCap.KVM_CAP_HYPERV_SYNIC, KvmCap.KVM_CAP_HYPERV_SYNIC2):
            if args[0] and capability == KvmCap.KVM_CAP_HYPERV_SYNIC2:
                raise Errno(errno.EINVAL)
            if self._vm.irqchip is None or not offered(capability):
                raise Errno(errno.EINVAL)
            return 0
        if capability in (
            KvmCap.KVM_CAP_HYPERV_ENLIGHTENED_VMCS,
            KvmCap.KVM_CAP_HYPERV_DIRECT_TLBFLUSH,
        ) and offered(KvmCap.KVM_CAP_HYPERV):
            raise Errno(errno.ENOTTY)
        if capability == KvmCap.KVM_CAP_HYPERV_ENFORCE_CPUID and offered(capability):
            self._vcpu.hyperv_enforce_cpuid = bool(args[0])
            return 0
        if capability == KvmCap.KVM_CAP_ENFORCE_PV_FEATURE_CPUID and offered(capability):
            self._vcpu.enforce_pv_features = bool(args[0])
            return 0
        raise Errno(errno.EINVAL)

    def memory_encrypt_op(self, argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on a vCPU: first without locks, then with the vCPU loaded."""
        vcpu, ops = self._vcpu, self._vm.ops
        vcpu.signal_mark = SIGNALS.mark()
        done = ops.vcpu_mem_enc_unlocked_ioctl(vcpu, argp)
        if done is not None:
            return done
        with vcpu.mutex, vcpu.on_processor():
            return ops.vcpu_mem_enc_ioctl(vcpu, argp)

    def get_nested_state(self, argp: int) -> int:
        """KVM_GET_NESTED_STATE: the vCPU is never in nested operation, so only the header."""
        self._check_nested_state_offered()
        mm, nested_format = self._vm.mm, self._vm.host.profile.nested_format
        (size,) = struct.unpack_from("<4xI", mm.read(argp, 8))
        if size < NESTED_HEADER_BYTES:
            mm.write(argp + 4, struct.pack("<I", NESTED_HEADER_BYTES))
            raise Errno(errno.E2BIG)
        if nested_format == NESTED_FORMAT_SVM:
            body, flags = bytes(120), NESTED_GIF_SET if self._vcpu.svm_gif else 0
        else:
            body, flags = struct.pack("<QQ", _U64, _U64).ljust(120, b"\0"), 0  # no VMXON region, no VMCS
        mm.write(argp, struct.pack("<HHI", flags, nested_format, NESTED_HEADER_BYTES) + body)
        return 0

    def set_nested_state(self, argp: int) -> int:
        """KVM_SET_NESTED_STATE: "not in nested operation" can be restored, a nested guest is not modelled."""
        self._check_nested_state_offered()
        header = _NESTED_HEADER.unpack(self._vm.mm.read(argp, NESTED_HEADER_BYTES))
        flags, kind, size, vmxon_pa, vmcs12_pa, smm_flags = header
        if size < NESTED_HEADER_BYTES or flags & ~_NESTED_FLAGS:
            raise Errno(errno.EINVAL)
        if flags & NESTED_RUN_PENDING and not flags & NESTED_GUEST_MODE:
            raise Errno(errno.EINVAL)
        if kind != self._vm.host.profile.nested_format:
            raise Errno(errno.EINVAL)
        if kind == NESTED_FORMAT_SVM:
            self._set_svm_nested_state(flags, size, vmcb_pa=vmxon_pa)
        else:
            self._set_vmx_nested_state(flags, vmxon_pa, vmcs12_pa, smm_flags)
        return 0

    def _set_svm_nested_state(self, flags: int, size: int, vmcb_pa: int) -> None:
        """Check as svm_set_nested_state() does."""
        if flags & ~(NESTED_GUEST_MODE | NESTED_RUN_PENDING | NESTED_GIF_SET):
            raise Errno(errno.EINVAL)
        if not self._vcpu.read_state().efer & _EFER_SVME and flags not in (0, NESTED_GIF_SET):
            raise Errno(errno.EINVAL)
        if not flags & NESTED_GUEST_MODE:
            self._vcpu.svm_gif = bool(flags & NESTED_GIF_SET)
            return
        if self._vcpu.in_smm or not self._is_page_address(vmcb_pa) or size < NESTED_HEADER_BYTES + _NESTED_VMCB_BYTES:
            raise Errno(errno.EINVAL)
        raise NotModelled("nested guests: KVM_SET_NESTED_STATE with GUEST_MODE")

    def _set_vmx_nested_state(self, flags: int, vmxon_pa: int, vmcs12_pa: int, smm_flags: int) -> None:
        """Check as vmx_set_nested_state() does; KVM_STATE_NESTED_EVMCS alone has always been let through."""
        if vmxon_pa == _U64:
            if smm_flags or vmcs12_pa != _U64 or flags & ~NESTED_EVMCS:
                raise Errno(errno.EINVAL)
            return
        if not self._vcpu.cpuid.has(1, "ecx", 5) or not self._is_page_address(vmxon_pa):
            raise Errno(errno.EINVAL)
        raise NotModelled("nested guests: KVM_SET_NESTED_STATE after VMXON")

    def _is_page_address(self, gpa: int) -> bool:
        return not gpa & 0xFFF and not gpa >> self._vcpu.cpuid.maxphyaddr

    def _check_nested_state_offered(self) -> None:
        offered = self._vm.host.profile.capabilities.get(KvmCap.KVM_CAP_NESTED_STATE, 0)
        if not offered or self._vm.ops.has_protected_state:
            raise Errno(errno.EINVAL)


def _with_mutex(vcpu: "Vcpu", handler: IoctlHandler) -> IoctlHandler:
    mutex, vm = vcpu.mutex, vcpu.vm

    def locked(argp: int) -> int:
        try:
            with mutex:
                if vm.dead:
                    raise Errno(errno.EIO)
                return handler(argp)
        finally:
            if not vm.users:
                vm.destroy_when_idle()

    return locked


def publish_vcpu(vcpu: "Vcpu", files: Files) -> int:
    """Make the fd of a new vCPU."""
    vm = vcpu.vm
    vm.get()
    table = VcpuIoctls(vcpu, files).table()

    def release() -> None:
        if table in vm.call_tables:
            vm.call_tables.remove(table)
        vm.put()

    return files.add_file(vcpu.run.fd, "kvm-vcpu", table, vcpu, release)
