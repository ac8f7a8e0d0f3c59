"""`OrdinaryVm`: a VM of the default type, as small as it can be. The same on a real and on a simulated kernel."""

from collections.abc import Mapping
from typing import Final, Self

from tdxhw.guest_memory import GuestMemory, Slot
from uapi_ctypes.device import Kvm
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KvmVmType
from uapi_ctypes.vcpu import Vcpu

_RFLAGS_FIXED: Final = 1 << 1
_CPUID_ENTRIES: Final = 256
_CR0_PG_NE_ET_PE: Final = 1 << 31 | 1 << 5 | 1 << 4 | 1
_CR4_PAE: Final = 1 << 5
_EFER_LMA_LME: Final = 1 << 10 | 1 << 8
_PAGE_TABLES: Final = 0x8000
_PTE_PRESENT_WRITABLE: Final = 0b11
_PTE_LARGE: Final = 1 << 7
_CODE_SEGMENT: Final = 0b1011
_DATA_SEGMENT: Final = 0b0011


class OrdinaryVm:
    """A default VM without irqchip: HLT comes back to user space."""

    shared_bit = 0

    def __init__(self, kernel: Kernel, vm_type: int = KvmVmType.KVM_X86_DEFAULT_VM) -> None:
        self.kernel = kernel
        self.vcpus: list[Vcpu] = []
        self.kvm = Kvm(kernel)
        try:
            self.vm = self.kvm.create_vm(vm_type)
        except BaseException:
            self.kvm.close()
            raise
        self.memory = GuestMemory(self.vm)

    def add_slot(self, gpa: int, size: int, *, private: bool = False) -> Slot:
        """Add memory; with `private` backed by a guest_memfd too, where the VM type offers that."""
        return self.memory.add(gpa, size, private=private)

    def set_private(self, gpa: int, size_bytes: int, *, private: bool) -> None:
        """Convert memory, where the VM type offers attributes."""
        self.memory.set_private(gpa, size_bytes, private=private)

    def create_vcpu(self, vcpu_id: int | None = None) -> Vcpu:
        """Create the next vCPU, in its reset state."""
        vcpu = self.vm.create_vcpu(len(self.vcpus) if vcpu_id is None else vcpu_id)
        self.vcpus.append(vcpu)
        return vcpu

    def set_supported_cpuid(self, vcpu: Vcpu) -> None:
        """Give `vcpu` the CPUID that KVM supports: without it long mode, for one, does not exist."""
        vcpu.set_cpuid2(self.kvm.get_supported_cpuid(_CPUID_ENTRIES))

    def start_real_mode(self, vcpu: Vcpu, code: bytes, gpa: int = 0x1000) -> None:
        """Put real-mode `code` at `gpa` [bytes, below 64 KiB] and point `vcpu` at it, all segments at zero."""
        self.memory.write(gpa, code)
        sregs = vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags, regs.rsp = gpa, _RFLAGS_FIXED, 0
        vcpu.set_regs(regs)

    def start_long_mode(self, vcpu: Vcpu, code: bytes, gpa: int = 0x1000) -> None:
        """Put 64-bit `code` at `gpa` and point `vcpu` at it: the first 2 MiB mapped to themselves, an empty IDT.

        The page tables are at `_PAGE_TABLES`. `vcpu` gets the CPUID that KVM supports: *Since Linux 7.2, KVM_SET_SREGS
        refuses an EFER that the vCPU's CPUID does not allow (6.18: takes it).*
        """
        self.set_supported_cpuid(vcpu)
        self.memory.write(gpa, code)
        for table, entry in (
            (_PAGE_TABLES, _PAGE_TABLES + 0x1000 | _PTE_PRESENT_WRITABLE),
            (_PAGE_TABLES + 0x1000, _PAGE_TABLES + 0x2000 | _PTE_PRESENT_WRITABLE),
            (_PAGE_TABLES + 0x2000, _PTE_PRESENT_WRITABLE | _PTE_LARGE),
        ):
            self.memory.write(table, entry.to_bytes(8, "little"))
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_PG_NE_ET_PE, _PAGE_TABLES, _CR4_PAE, _EFER_LMA_LME
        sregs.idt.base = sregs.idt.limit = 0
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if name == "cs" else 16
            segment.type = _CODE_SEGMENT if name == "cs" else _DATA_SEGMENT
            segment.l = name == "cs"
            segment.db = name != "cs"
            segment.dpl = segment.unusable = 0
            segment.g = segment.s = segment.present = 1
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags, regs.rsp = gpa, _RFLAGS_FIXED, gpa
        vcpu.set_regs(regs)

    def debug_registers(self, vcpu: Vcpu) -> Mapping[str, int] | None:
        """Return `vcpu`'s registers: nothing protects them."""
        regs = vcpu.get_regs()
        return {field[0]: getattr(regs, field[0]) for field in regs._fields_}

    def close(self) -> None:
        """Give everything back. Idempotent."""
        try:
            self.vm.close()
        finally:
            self.kvm.close()
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
