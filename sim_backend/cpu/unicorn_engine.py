"""CPU contexts on Unicorn, over one machine's physical memory.

Unicorn is used as a translator only. Address translation is our own (`paging`), in the TLB-fill hook. All
interception is TCG's SVM intercepts, switched on in its translation flags, so that an exit needs no callback:
`uc_emu_start` returns, and the exception index says why.
"""

from typing import Final

from sim_backend.cpu import unicorn_internals
from sim_backend.cpu.arbiter import Arbiter
from sim_backend.cpu.engine import Cpu
from sim_backend.cpu.errors import EngineError, EngineSelfTestError
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.cpu.unicorn_instance import UnicornInstance
from sim_backend.cpu.unicorn_selftest import self_test
from sim_backend.hw.memory import PhysicalMemory


class UnicornEngine:
    """Makes CPU contexts that execute from `memory`: implements `sim_backend.cpu.engine.CpuFactory`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory: Final = memory
        self.arbiter: Final = Arbiter()
        self._windows: dict[int, dict[int, tuple[int, int]]] = {}  # instance handle: base: (length, HVA)

    def new_cpu(self) -> Cpu:
        """Return a context in the architectural reset state; raise `EngineSelfTestError`."""
        ensure_self_tested()
        return self._new_cpu()

    def _new_cpu(self) -> UnicornCpu:
        instance = UnicornInstance()
        instance.map(0, self.memory.ram_bytes, self.memory.pointer)
        self._windows[instance.handle] = {}
        return UnicornCpu(self, instance)

    def give_back(self, instance: UnicornInstance) -> None:
        """Take an instance out of use.

        It is closed, not kept: opening one takes 0.2 ms, while unmapping memory from one takes 10 ms a GiB.
        """
        del self._windows[instance.handle]
        instance.close()

    def window_pointer(self, instance: UnicornInstance, hpa: int) -> int | None:
        """Return the HVA of the window page at `hpa`, None when `instance` does not map it (any more)."""
        base, length, pointer = self.memory.backing(hpa)
        if self._windows[instance.handle].get(base) != (length, pointer):
            return None
        return pointer + hpa - base

    def map_backing(self, instance: UnicornInstance, hpa: int) -> None:
        """Map the window that holds `hpa`, in place of what was mapped there."""
        base, length, pointer = self.memory.backing(hpa)
        if not pointer:
            raise EngineError(f"the window at HPA {base:#x} has no address in this process to execute from")
        windows = self._windows[instance.handle]
        for old_base, (old_length, _) in list(windows.items()):
            if old_base < base + length and base < old_base + old_length:
                instance.unmap(old_base, old_length)
                del windows[old_base]
        instance.map(base, length, pointer)
        windows[base] = (length, pointer)


def ensure_self_tested() -> None:
    """Run the self-test once in a process; raise `EngineSelfTestError` that says what to do."""
    if _self_tested:
        return
    _self_tested.append(True)
    try:
        run_self_test()
    except EngineError as error:
        _self_tested.clear()
        remedy = f"pip install --force-reinstall unicorn=={unicorn_internals.UNICORN_VERSION}"
        text = str(error) if "pip install" in str(error) else f"{error}; {remedy}"
        raise EngineSelfTestError(text) from error


def run_self_test() -> None:
    """Check every assumption about Unicorn on a scratch machine; raise `EngineSelfTestError`."""
    memory = PhysicalMemory(0x10000)
    engine = UnicornEngine(memory)
    cpu = engine._new_cpu()  # noqa: SLF001 - before new_cpu() may be used
    try:
        self_test(cpu, memory.write)
    finally:
        cpu.close()
        memory.close()


_self_tested: Final[list[bool]] = []
