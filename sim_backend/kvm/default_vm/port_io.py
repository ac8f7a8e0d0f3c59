"""IN and OUT of an ordinary guest (`kvm_fast_pio`, and the emulator's string forms)."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.hw.gprs import RAX
from sim_backend.kvm.default_vm.emulator import emulate_instruction
from sim_backend.kvm.default_vm.guest_events import skip_instruction
from sim_backend.kvm.default_vm.io_exits import exit_for_port_read, exit_for_port_write, port_data

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_IN: Final = 1 << 3
_STRING: Final = 1 << 4
_QUIRK_PORT: Final = 0x7E
_QUIRK_OUT_7E_INC_RIP: Final = 1 << 3


def emulate_port_io(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Serve the access in the kernel, or exit with KVM_EXIT_IO and complete it at the next KVM_RUN."""
    qualification = cpu.exit.qualification
    size = (qualification & 7) + 1
    port = qualification >> 16 & 0xFFFF
    if qualification & _STRING:
        return emulate_instruction(vcpu, cpu)  # memory is the emulator's to move
    bus = vcpu.vm.io_bus
    if qualification & _IN:
        data = bus.read(vcpu, port, size, pio=True)
        if data is not None:
            _set_accumulator(cpu, data, size)
            skip_instruction(vcpu, cpu)
            return True
        rip = cpu.rip

        def complete_in() -> bool:
            if cpu.rip == rip:  # user space may have moved it meanwhile
                _set_accumulator(cpu, port_data(vcpu, size), size)
                skip_instruction(vcpu, cpu)
            return True

        return exit_for_port_read(vcpu, port, size, 1, complete_in)
    data = (cpu.gprs[RAX] & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if bus.write(vcpu, port, data, pio=True):
        skip_instruction(vcpu, cpu)
        return True
    quirk = port == _QUIRK_PORT and not vcpu.vm.disabled_quirks & _QUIRK_OUT_7E_INC_RIP
    if quirk or vcpu.vm.host.profile.behaves("interprets_guest_code"):
        skip_instruction(vcpu, cpu)
        return exit_for_port_write(vcpu, port, data)
    rip = cpu.rip

    def complete_out() -> bool:
        if cpu.rip == rip:
            skip_instruction(vcpu, cpu)
        return True

    return exit_for_port_write(vcpu, port, data, complete_out)


def _set_accumulator(cpu: Cpu, data: bytes, size: int) -> None:
    value = int.from_bytes(data, "little")
    if size == 4:
        cpu.gprs[RAX] = value
    else:
        mask = (1 << 8 * size) - 1
        cpu.gprs[RAX] = cpu.gprs[RAX] & ~mask | value
