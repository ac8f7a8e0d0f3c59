"""An ordinary VM whose real-mode guest reaches the IOAPIC through DS and its xAPIC through ES."""

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, MEMORY_BYTES, SmallVm, UserMemory
from uapi_ctypes.device import Kvm
from uapi_ctypes.kvm_state import KvmLapicState

HANDLER = 0x3000
DONE, HANDLED = 0x99, 0x98  # ports
CPUID = b"\x0f\xa2"
STI, CLI, HLT = b"\xfb", b"\xfa", b"\xf4"
OUT_DONE, OUT_HANDLED_IRET = b"\xe6\x99", b"\xe6\x98\xcf"


def ioapic_write(pin: int, entry: int) -> bytes:
    """Return code that sets the low half of a redirection entry."""
    return _store(0x3E, 0, 0x10 + 2 * pin) + _store(0x3E, 0x10, entry)


def apic_write(register: int, value: int) -> bytes:
    """Return code that writes a register of the xAPIC page."""
    return _store(0x26, register, value)


def outb(port: int, value: int) -> bytes:
    """Return code that writes a byte to a port."""
    return b"\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"


def _store(segment: int, offset: int, value: int) -> bytes:
    return b"\x66\xb8" + value.to_bytes(4, "little") + bytes([segment]) + b"\x66\xa3" + offset.to_bytes(2, "little")


def register(page: KvmLapicState, offset: int) -> int:
    """Return a 32-bit register of a KVM_GET_LAPIC page."""
    return int.from_bytes(bytes(page.regs[offset : offset + 4]), "little")


class InterruptingVm(SmallVm):
    """One vCPU with `SmallVm`'s memory; every vector's handler says so on port 0x98."""

    def __init__(self, kernel: SimKernel, *, split: bool = False, cpuid: bool = True) -> None:
        self.kernel = kernel
        self.kvm = Kvm(kernel)
        self.vm = self.kvm.create_vm()
        if split:
            self.vm.enable_cap(121, 24)
        else:
            self.vm.create_irqchip()
        self.memory = UserMemory()
        self.vm.set_user_memory_region(0, 0, MEMORY_BYTES, self.memory.hva)
        self.vcpus = [self.vm.create_vcpu(0)]
        if cpuid:
            self.vcpu.set_cpuid2(self.kvm.get_supported_cpuid(256))
        for vector in range(256):
            self.memory[4 * vector] = HANDLER.to_bytes(4, "little")
        self.memory[HANDLER] = OUT_HANDLED_IRET
        self.set_apic({0xF0: 0x1FF})
        sregs = self.vcpu.get_sregs()
        sregs.ds.base, sregs.es.base = 0xFEC0_0000, 0xFEE0_0000
        self.vcpu.set_sregs(sregs)

    def set_apic(self, registers: dict[int, int]) -> None:
        """Change registers of the local APIC's page."""
        page = self.vcpu.get_lapic()
        for offset, value in registers.items():
            page.regs[offset : offset + 4] = value.to_bytes(4, "little")
        self.vcpu.set_lapic(page)

    def put(self, code: bytes, *, rflags: int = 2) -> None:
        """Have the vCPU execute `code`, then write to port 0x99 and halt."""
        self.memory[CODE] = code + OUT_DONE + HLT
        self.start(self.vcpu, CODE, rflags=rflags)
        self.vcpu.set_mp_state(0)

    def port_after(self, code: bytes, *, rflags: int = 2) -> int:
        """Run `code` and return the port of the exit."""
        self.put(code, rflags=rflags)
        return self.next_port()

    def next_port(self) -> int:
        """Run on and return the port of the exit."""
        self.vcpu.run()
        assert self.vcpu.exit_reason == 2, self.vcpu.exit_reason
        return int(self.vcpu.kvm_run.io.port)

    def apic(self, offset: int) -> int:
        """Return a register of the local APIC."""
        return register(self.vcpu.get_lapic(), offset)

    def entry(self, pin: int) -> int:
        """Return the IOAPIC's redirection entry of `pin`."""
        chip = bytes(self.vm.get_irqchip(2))
        return int.from_bytes(chip[32 + 8 * pin : 40 + 8 * pin], "little")

    def is_high(self, pin: int) -> bool:
        """Tell whether a masked pin of the IOAPIC is raised."""
        chip = bytes(self.vm.get_irqchip(2))
        return bool(int.from_bytes(chip[24:28], "little") >> pin & 1)

    def master(self) -> tuple[int, int, int, int]:
        """Return last_irr, irr, isr and init_state of the master 8259."""
        chip = bytes(self.vm.get_irqchip(0))[8:]
        return chip[0], chip[1], chip[3], chip[9]
