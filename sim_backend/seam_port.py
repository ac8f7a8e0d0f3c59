"""The SEAMCALL instruction of the simulated machine: the one place where KVM's model and the module's meet.

A logical processor that enters a TD alternates here between its CPU, which runs guest code, and the module, which
handles the exits; the caller of TDH.VP.ENTER sees neither.
"""

import threading
from typing import Final

from sim_backend.cpu.engine import Cpu, ExitReason
from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module.dispatch import seamcall, vmexit  # the methods of `TdxModule`, a call less each
from sim_backend.tdx_module.module import TdxModule

RESCHEDULE_VECTOR: Final = 0xFD
"""The IPI that only makes an LP look around (`arch/x86/include/asm/irq_vectors.h`)."""


class SeamPort:
    """Executes SEAMCALLs of all logical processors; satisfies `sim_backend.kvm.seam.Seam`.

    The module model is not re-entrant, so one lock admits one LP at a time; it is free while guest code runs.
    """

    def __init__(self, module: TdxModule) -> None:
        self.module: Final = module
        self._lock: Final = threading.Lock()
        self._arrived: Final[list[set[int]]] = [set() for _ in module.platform.lps]  # vectors that wait at each LP
        self._stale: Final[set[Cpu]] = set()  # they ran when the shared EPT changed

    def seamcall(self, lp: int, regs: Gprs) -> None:
        """Execute SEAMCALL on `lp`: RAX is the leaf in, the completion status out.

        TDH.VP.ENTER returns at the TD exit. What the CPU model cannot execute (`UnsupportedInstruction`)
        propagates after the LP has left the TD, as an external interrupt would have made it.
        """
        with self._lock:
            if not seamcall(self.module, lp, regs):
                return
        self._run_td(lp, regs)

    def _run_td(self, lp: int, regs: Gprs) -> None:
        module, lock, arrived = self.module, self._lock, self._arrived[lp]
        vcpu = module.running[lp]
        assert vcpu is not None
        cpu = vcpu.cpu
        assert cpu is not None
        if arrived:
            for vector in tuple(arrived):
                cpu.external_interrupt(vector)
        try:
            while True:
                if cpu in self._stale:
                    self._stale.discard(cpu)
                    cpu.invalidate()
                cpu.run()
                with lock:
                    if vmexit(module, lp, regs):
                        return
        except BaseException:
            if module.running[lp] is not None:
                cpu.exit.reason = ExitReason.EXTERNAL_INTERRUPT
                cpu.exit.qualification = 0
                with lock:
                    vmexit(module, lp, regs)
            raise
        finally:
            if arrived:
                arrived.clear()  # the host's handlers have run

    def kick(self, lp: int) -> None:
        """Send an IPI to `lp`: a TD that runs there, or is about to, exits soon. Callable from any thread."""
        self.interrupt(lp, RESCHEDULE_VECTOR)

    def interrupt(self, lp: int, vector: int) -> None:
        """Send an IPI with `vector` to `lp`. A TD there exits, or posts interrupts. Callable from any thread."""
        self._arrived[lp].add(vector)
        vcpu = self.module.running[lp]
        if vcpu is not None and vcpu.cpu is not None:
            vcpu.cpu.external_interrupt(vector)

    def invept(self, lp: int) -> None:
        """Execute INVEPT: no TD keeps a translation through the shared EPT as it was; `lp` does not matter.

        A vCPU that runs right now is made to exit and forgets its translations before it goes on.
        """
        del lp
        with self._lock:
            running = self.module.running
            for vcpu in self.module.tdvpses.values():
                if vcpu.cpu is None:
                    continue
                if vcpu in running:
                    self._stale.add(vcpu.cpu)
                    vcpu.cpu.kick()
                else:
                    vcpu.cpu.invalidate()

    def mem_page_add_extend(self, lp: int, regs: Gprs) -> None:
        """Execute TDH.MEM.PAGE.ADD and, when it succeeds, TDH.MR.EXTEND of the whole page."""
        with self._lock:
            self.module.mem_page_add_extend(lp, regs)
