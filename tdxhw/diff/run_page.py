"""What KVM_RUN reads from the run page and what it leaves there, by the kernel's names."""

from typing import Any, Final

from tdxhw.diff.fields import Fields, fields_of
from tdxhw.diff.names import Names
from uapi_ctypes.kernel import KernelMapping
from uapi_ctypes.kvm_run import KVM_EXIT_IO_OUT, KvmExit, KvmRun
from uapi_ctypes.kvm_state import KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS

_MEMBERS: Final = {
    KvmExit.KVM_EXIT_UNKNOWN: "hw",
    KvmExit.KVM_EXIT_EXCEPTION: "ex",
    KvmExit.KVM_EXIT_IO: "io",
    KvmExit.KVM_EXIT_HYPERCALL: "hypercall",
    KvmExit.KVM_EXIT_DEBUG: "debug",
    KvmExit.KVM_EXIT_MMIO: "mmio",
    KvmExit.KVM_EXIT_FAIL_ENTRY: "fail_entry",
    KvmExit.KVM_EXIT_TPR_ACCESS: "tpr_access",
    KvmExit.KVM_EXIT_INTERNAL_ERROR: "internal",
    KvmExit.KVM_EXIT_SYSTEM_EVENT: "system_event",
    KvmExit.KVM_EXIT_IOAPIC_EOI: "eoi",
    KvmExit.KVM_EXIT_HYPERV: "hyperv",
    KvmExit.KVM_EXIT_X86_RDMSR: "msr",
    KvmExit.KVM_EXIT_X86_WRMSR: "msr",
    KvmExit.KVM_EXIT_NOTIFY: "notify",
    KvmExit.KVM_EXIT_MEMORY_FAULT: "memory_fault",
    KvmExit.KVM_EXIT_TDX: "tdx",
}
"""Member of the union by exit reason. The others have none."""
_SYNCED: Final = ((KVM_SYNC_X86_REGS, "regs"), (KVM_SYNC_X86_SREGS, "sregs"), (KVM_SYNC_X86_EVENTS, "events"))


class RunPage:
    """The run page of one vCPU."""

    def __init__(self, mapping: KernelMapping, *, v17: bool) -> None:
        self._run: Any = mapping.view(KvmRun)
        self._memory = mapping.memory
        self._tdx = "tdx_v17" if v17 else "tdx"
        self._answering: int | None = None
        """The exit that user space answers with the next KVM_RUN."""

    def inputs(self, names: Names) -> Fields:
        """Return what user space hands over: the controls, the answer to the previous exit, registers to load."""
        run = self._run
        found: Fields = {
            name: value
            for name in ("request_interrupt_window", "immediate_exit", "kvm_valid_regs", "kvm_dirty_regs")
            if (value := getattr(run, name))
        }
        found |= self._answer()
        found |= self._registers(run.kvm_dirty_regs, names)
        return found

    def outputs(self, names: Names, *, failed: bool) -> tuple[str, Fields]:
        """Return the exit's name and its fields. After a failure only a memory fault has any."""
        run = self._run
        reason: int = run.exit_reason
        found: Fields = {
            name: value
            for name in ("ready_for_interrupt_injection", "if_flag", "flags", "cr8", "apic_base")
            if (value := getattr(run, name))
        }
        self._answering = None if failed else reason
        if not failed or reason == KvmExit.KVM_EXIT_MEMORY_FAULT:
            found |= self._exit(reason, names)
            found |= self._registers(run.kvm_valid_regs, names)
        return KvmExit.name_of(reason), found

    def _registers(self, which: int, names: Names) -> Fields:
        found: Fields = {}
        for bit, name in _SYNCED:
            if which & bit:
                found |= fields_of(getattr(self._run.s.regs, name), names, f"s.regs.{name}.")
        return found

    def _answer(self) -> Fields:
        run = self._run
        match self._answering:
            case KvmExit.KVM_EXIT_IO if run.io.direction != KVM_EXIT_IO_OUT:
                return {"io.data": self._io_data()}
            case KvmExit.KVM_EXIT_MMIO if not run.mmio.is_write:
                return {"mmio.data": _hex(bytes(run.mmio.data)[: run.mmio.len])}
            case KvmExit.KVM_EXIT_X86_RDMSR:
                return {"msr.error": run.msr.error, "msr.data": run.msr.data}
            case KvmExit.KVM_EXIT_X86_WRMSR:
                return {"msr.error": run.msr.error}
            case KvmExit.KVM_EXIT_HYPERCALL:
                return {"hypercall.ret": run.hypercall.ret}
            case KvmExit.KVM_EXIT_TDX:
                return fields_of(getattr(run, self._tdx), Names(), f"{self._tdx}.")
            case _:
                return {}

    def _exit(self, reason: int, names: Names) -> Fields:
        member = _MEMBERS.get(KvmExit(reason)) if reason in set(KvmExit) else None
        if member is None:
            return {}
        if member == "tdx":
            member = self._tdx
        part = getattr(self._run, member)
        found = fields_of(part, names, f"{member}.")
        match member:
            case "io":
                if part.direction == KVM_EXIT_IO_OUT:
                    found["io.data"] = self._io_data()
            case "mmio":
                found.pop("mmio.data", None)
                if part.is_write:
                    found["mmio.data"] = _hex(bytes(part.data)[: part.len])
            case "msr":
                if reason == KvmExit.KVM_EXIT_X86_RDMSR:
                    found.pop("msr.data", None)  # what an earlier exit left there
            case "internal" | "system_event":
                # KVM does not clear the union: words beyond ndata are an earlier exit's.
                for index in range(part.ndata, len(part.data)):
                    found.pop(f"{member}.data[{index}]", None)
        return found

    def _io_data(self) -> str:
        io = self._run.io
        return _hex(bytes(self._memory[io.data_offset : io.data_offset + io.size * io.count]))


def _hex(data: bytes) -> str:
    return "hex:" + data.hex()
