"""The two TDX dialects as data, and how to tell which one a kernel speaks.

The rule asks KVM_CHECK_EXTENSION only. It never compares kernel versions and never tries a VM type: creating
type 2 makes a SEV VM on one kernel and a TD on another. KVM_CAP_VM_TYPES is a bitmap over types:

=== ======================== =========================
bit mainline                 v17
=== ======================== =========================
0   DEFAULT                  DEFAULT
1   SW_PROTECTED             SW_PROTECTED
2   SEV (6.10 and later)     TDX
3   SEV_ES                   SNP
4   SNP                      not defined
5   TDX (6.16 and later)     not defined
=== ======================== =========================

1. Bit 5 means TDX in mainline and nothing anywhere else: `MAINLINE`.
2. Otherwise bit 2 is TDX of v17 or SEV. It is SEV when bit 3 or 4 is set beside it: one host has one vendor,
   so v17 cannot offer TDX and SNP at once, while SEV comes with SEV_ES on every CPU since 2018.
3. A lone bit 2 is SEV (or a 6.8-based tree with another sub-command table) when KVM_CAP_PRE_FAULT_MEMORY,
   236, answers non-zero: v17 does not know that number, and a kernel that does, and has TDX, sets bit 5.
4. What is left is Linux 6.10 with SEV but without SEV_ES, or v17. Every CPU with TDX detects bus locks
   (KVM_CAP_X86_BUS_LOCK_EXIT, 193); no AMD CPU with SEV alone does. So: non-zero is `V17`, zero is not TDX.

Hence 0b101 is v17 on a TDX CPU and SEV on an old AMD one, told apart by rules 3 and 4.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from uapi_ctypes.caps import KvmCap
from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kvm import KVM_X86_TDX_VM_V17, KvmVmType
from uapi_ctypes.tdx_mainline import KvmTdxCapabilities, KvmTdxCmd, KvmTdxCmdId, KvmTdxInitVm
from uapi_ctypes.tdx_v17 import KvmTdxCapabilitiesV17, KvmTdxCmdIdV17, KvmTdxCmdV17, KvmTdxInitVmV17


class NoSuchCommandError(LookupError):
    """The dialect has no such sub-command, so there is nothing to send to the kernel."""


class CommandFd(Enum):
    """Which file descriptor takes a sub-command."""

    VM = "vm"
    VCPU = "vcpu"


@dataclass(frozen=True, slots=True)
class Command:
    """One TDX sub-command: its name, its number and its file descriptor."""

    name: str
    id: int
    fd: CommandFd


@dataclass(frozen=True, slots=True)
class Dialect:
    """Everything in which the dialects differ at the interface."""

    name: str
    tdx_vm_type: int
    """Argument of KVM_CREATE_VM, and its bit in KVM_CAP_VM_TYPES."""
    cmd: type[ctypes.Structure]
    """``struct kvm_tdx_cmd``; both have `id`, `flags`, `data` and `hw_error`."""
    capabilities: type[Flexible[Any]]
    init_vm: type[Flexible[Any]]
    capabilities_command: Command
    init_vm_command: Command
    init_vcpu: Command
    init_mem_region: Command
    finalize_vm: Command
    get_cpuid: Command | None
    """None where there is no such sub-command."""
    release_vm: Command | None
    """None where closing the file descriptors is what destroys a TD."""
    xfam_in_init_vm: bool
    """False: XFAM follows from CPUID leaf 0xD."""
    gpaw_cpuid_shift: int
    """Where in EAX of CPUID 0x80000008 INIT_VM looks for the guest's address width."""
    max_vcpus_by_enable_cap: bool
    """KVM_ENABLE_CAP(KVM_CAP_MAX_VCPUS) sets the TD's limit; otherwise the kernel derives it."""
    typed_tdx_exits: bool
    """False: every TDVMCALL for user space is one raw KVM_EXIT_TDX, `kvm_run.tdx_v17`."""
    capabilities_written_back: bool
    """Whether KVM_TDX_CAPABILITIES stores the command structure again."""

    @property
    def commands(self) -> tuple[Command, ...]:
        """Every sub-command, by number."""
        every = (
            self.capabilities_command, self.init_vm_command, self.init_vcpu, self.init_mem_region,
            self.finalize_vm, self.get_cpuid, self.release_vm,
        )  # fmt: skip
        return tuple(sorted((one for one in every if one), key=lambda one: one.id))

    def command_name(self, command_id: int) -> str:
        """Return the kernel's name of sub-command `command_id`."""
        for command in self.commands:
            if command.id == command_id:
                return command.name
        return f"KVM_MEMORY_ENCRYPT_OP({command_id})"

    def __str__(self) -> str:
        return self.name


def _command(member: KvmTdxCmdId | KvmTdxCmdIdV17, fd: CommandFd) -> Command:
    return Command(member.name, int(member), fd)


_M = KvmTdxCmdId
_V = KvmTdxCmdIdV17

MAINLINE: Final = Dialect(
    name="mainline",
    tdx_vm_type=KvmVmType.KVM_X86_TDX_VM,
    cmd=KvmTdxCmd,
    capabilities=KvmTdxCapabilities,
    init_vm=KvmTdxInitVm,
    capabilities_command=_command(_M.KVM_TDX_CAPABILITIES, CommandFd.VM),
    init_vm_command=_command(_M.KVM_TDX_INIT_VM, CommandFd.VM),
    init_vcpu=_command(_M.KVM_TDX_INIT_VCPU, CommandFd.VCPU),
    init_mem_region=_command(_M.KVM_TDX_INIT_MEM_REGION, CommandFd.VCPU),
    finalize_vm=_command(_M.KVM_TDX_FINALIZE_VM, CommandFd.VM),
    get_cpuid=_command(_M.KVM_TDX_GET_CPUID, CommandFd.VCPU),
    release_vm=None,
    xfam_in_init_vm=True,
    gpaw_cpuid_shift=16,
    max_vcpus_by_enable_cap=False,
    typed_tdx_exits=True,
    capabilities_written_back=False,
)

V17: Final = Dialect(
    name="v17",
    tdx_vm_type=KVM_X86_TDX_VM_V17,
    cmd=KvmTdxCmdV17,
    capabilities=KvmTdxCapabilitiesV17,
    init_vm=KvmTdxInitVmV17,
    capabilities_command=_command(_V.KVM_TDX_CAPABILITIES, CommandFd.VM),
    init_vm_command=_command(_V.KVM_TDX_INIT_VM, CommandFd.VM),
    init_vcpu=_command(_V.KVM_TDX_INIT_VCPU, CommandFd.VCPU),
    init_mem_region=_command(_V.KVM_TDX_INIT_MEM_REGION, CommandFd.VM),
    finalize_vm=_command(_V.KVM_TDX_FINALIZE_VM, CommandFd.VM),
    get_cpuid=None,
    release_vm=_command(_V.KVM_TDX_RELEASE_VM, CommandFd.VM),
    xfam_in_init_vm=False,
    gpaw_cpuid_shift=0,
    max_vcpus_by_enable_cap=True,
    typed_tdx_exits=False,
    capabilities_written_back=True,
)

DIALECTS: Final = {dialect.name: dialect for dialect in (MAINLINE, V17)}


def detect(check_extension: Callable[[int], int]) -> Dialect | None:
    """Return the TDX dialect of the kernel behind `check_extension`, or None when it offers no TDX.

    `check_extension` is KVM_CHECK_EXTENSION on /dev/kvm, for instance `Kvm.check_extension`.
    """
    types = check_extension(KvmCap.KVM_CAP_VM_TYPES)
    if types >> MAINLINE.tdx_vm_type & 1:
        return MAINLINE
    if not types >> V17.tdx_vm_type & 1:
        return None
    if types >> KvmVmType.KVM_X86_SEV_ES_VM & 1 or types >> KvmVmType.KVM_X86_SNP_VM & 1:
        return None
    if check_extension(KvmCap.KVM_CAP_PRE_FAULT_MEMORY):
        return None
    return V17 if check_extension(KvmCap.KVM_CAP_X86_BUS_LOCK_EXIT) else None
