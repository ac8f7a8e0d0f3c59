"""A TD with its guest side at hand: pages, a vCPU on a `StaticCpu`, and the instructions that leave the guest."""

from typing import Any, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.static_cpu import StaticCpu
from sim_backend.hw.gprs import GPR_NAMES, R8, RAX, RSP, Gprs, new_gprs
from sim_backend.seamcall_host import SeamcallHost, Td, TdParams
from sim_backend.tdx_module.tdvps import Tdvps
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Rax, Status

GPA: Final = 0x4000
"""A page that the TD has from the start."""
FREE_GPA: Final = 0x9000
"""A GPA whose Secure EPT entry is free."""
SHARED: Final = 1 << 47
SOURCE: Final = 0x20_0000
TDCALL_BYTES: Final = 4
VE: Final = 0x8000_0314
GP: Final = 0x8000_0B0D
UD: Final = 0x8000_0306
DF: Final = 0x8000_0B08


class Guest:
    """One TD, finalised, with a vCPU that LP 0 runs in 64-bit mode."""

    def __init__(self, host: SeamcallHost, params: TdParams | None = None, *, enter: bool = True) -> None:
        self.host = host
        self.module = host.module
        self.td: Td = host.create_td(params)
        self.tdvpr = host.create_vcpu(self.td, rcx=0xABCD)
        self.page = host.add_page(self.td, GPA, SOURCE)
        host.finalize(self.td)
        if enter:
            self.enter()

    @property
    def tdr(self) -> Any:
        return self.module.tdrs[self.td.tdr]

    @property
    def tdcs(self) -> Any:
        return self.tdr.tdcs

    @property
    def tdvps(self) -> Tdvps:
        return self.module.tdvpses[self.tdvpr]

    @property
    def cpu(self) -> StaticCpu:
        cpu = self.tdvps.cpu
        assert isinstance(cpu, StaticCpu)
        return cpu

    @property
    def is_running(self) -> bool:
        return any(self.module.running)

    def seamcall(self, leaf: SeamcallLeaf, *, lp: int = 0, **registers: int) -> Rax | None:
        """Execute a SEAMCALL; return its status, or None when the LP is in the TD. `regs` are the registers."""
        self.regs = new_gprs()
        self.regs[RAX] = leaf
        for name, value in registers.items():
            self.regs[_INDEX[name]] = value
        if self.module.seamcall(lp, self.regs):
            return None
        return Rax.decode(self.regs[RAX])

    def enter(self, *, lp: int = 0, **registers: int) -> None:
        """Enter the guest, in 64-bit mode at CPL 0."""
        registers.setdefault("rcx", self.tdvpr)
        assert self.seamcall(SeamcallLeaf.TDH_VP_ENTER, lp=lp, **registers) is None
        self.cpu.state.efer |= 1 << 10
        self.cpu.state.cs.ar |= 1 << 13

    def exit(self, reason: ExitReason, *, lp: int = 0, **information: int) -> Rax | None:
        """Make the guest exit; return RAX of the TD exit, or None when the module resumed the guest."""
        exit_ = self.cpu.exit
        for name in exit_.__slots__:
            setattr(exit_, name, 0)
        exit_.reason = reason
        exit_.instruction_length = 2
        for name, value in information.items():
            setattr(exit_, name, value)
        self.regs = new_gprs()
        if not self.module.vmexit(lp, self.regs):
            return None
        return Rax.decode(self.regs[RAX])

    def tdcall(self, leaf: int, *, lp: int = 0, **registers: int) -> Rax:
        """Execute a TDCALL that resumes the guest after it; return what the guest finds in RAX."""
        assert self.try_tdcall(leaf, lp=lp, **registers) is None, "the TDCALL left the guest"
        return Rax.decode(self.cpu.gprs[RAX])

    def try_tdcall(self, leaf: int, *, lp: int = 0, **registers: int) -> Rax | None:
        """Execute a TDCALL; return RAX of the TD exit, or None when the module resumed the guest."""
        gprs: Gprs = self.cpu.gprs
        for index in range(16):
            if index != RSP:
                gprs[index] = 0
        gprs[RAX] = leaf
        for name, value in registers.items():
            gprs[_INDEX[name]] = value
        return self.exit(ExitReason.TDCALL, lp=lp, instruction_length=TDCALL_BYTES)

    def vm_rd(self, field_id: int) -> int:
        """Read a TD-scope field as the guest."""
        assert self.tdcall(TdcallLeaf.TDG_VM_RD, rdx=field_id) == Rax(Status.SUCCESS)
        return self.cpu.gprs[R8]

    def mng_rd(self, field_id: int) -> int:
        """Read a TD-scope field as the host."""
        return self.host.call(SeamcallLeaf.TDH_MNG_RD, rcx=self.td.tdr, rdx=field_id)[R8]

    def vp_rd(self, field_id: int, *, lp: int = 0) -> int:
        """Read a vCPU field as the host."""
        return self.host.call(SeamcallLeaf.TDH_VP_RD, rcx=self.tdvpr, rdx=field_id, lp=lp)[R8]


_INDEX: Final = {name: index for index, name in enumerate(GPR_NAMES)}
