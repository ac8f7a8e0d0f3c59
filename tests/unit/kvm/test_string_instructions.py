"""String instructions that KVM emulates: where RIP, RFLAGS.RF and the counts stand at an exit."""

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm
from uapi_ctypes.kvm_run import KvmExit

RF = 1 << 16
DF = 1 << 10
PORT = 0x80
HANDLER = 0x5000


def started(kernel: SimKernel, code: bytes, **registers: int) -> SmallVm:
    small = SmallVm(kernel, code + b"\xf4")
    small.memory[HANDLER] = b"\xf4"
    for vector in range(32):
        small.memory[4 * vector] = HANDLER.to_bytes(4, "little")
    regs = small.vcpu.get_regs()
    for name, value in {"rdx": PORT, **registers}.items():
        setattr(regs, name, value)
    small.vcpu.set_regs(regs)
    return small


def test_behind_the_last_element_rip_is_still_at_the_instruction_and_rf_is_set(kernel: SimKernel) -> None:
    with started(kernel, b"\xf3\x6e", rsi=0x3000, rcx=2) as small:  # rep outsb
        for left in (1, 0):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
            at_exit = small.vcpu.get_regs()
            assert (at_exit.rip, at_exit.rcx, at_exit.rflags & RF) == (CODE, left, RF)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rflags & RF == 0


def test_without_a_prefix_rip_is_behind_the_instruction(kernel: SimKernel) -> None:
    with started(kernel, b"\x6e", rsi=0x3000) as small:  # outsb
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        at_exit = small.vcpu.get_regs()
        assert (at_exit.rip, at_exit.rflags & RF) == (CODE + 1, 0)


def test_ins_downwards_asks_again_for_what_follows_an_exit(kernel: SimKernel) -> None:
    with started(kernel, b"\xf3\x6c", rdi=0x8000, rcx=3, rflags=DF | 2) as small:  # rep insb
        sregs = small.vcpu.get_sregs()
        sregs.es.base = 0x8000  # the first element is behind memory, the others are in it
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert small.vcpu.kvm_run.io.count == 1, "as far as the start of the page, where none is left"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        assert small.vcpu.kvm_run.mmio.phys_addr == 0x1_0000
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert small.vcpu.kvm_run.io.count == 2


def test_ins_to_mmio_is_one_write_of_all_elements(kernel: SimKernel) -> None:
    with started(kernel, b"\xf3\x6c", rdi=0, rcx=3) as small:  # rep insb
        sregs = small.vcpu.get_sregs()
        sregs.es.base = 0x2_0000
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert small.vcpu.kvm_run.io.count == 3
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        written = small.vcpu.kvm_run.mmio
        assert (written.phys_addr, written.len, written.is_write) == (0x2_0000, 3, 1)


@pytest.mark.parametrize(
    ("code", "registers"),
    [
        (b"\x6f", {"rsi": 0xFFFF}),  # outsw
        (b"\x6d", {"rdi": 0xFFFF}),  # insw
    ],
    ids=["OUTS", "INS"],
)
def test_an_operand_that_leaves_its_segment_is_gp(kernel: SimKernel, code: bytes, registers: dict[str, int]) -> None:
    with started(kernel, code, **registers) as small:
        exits = [small.vcpu.run()]
        if exits == [KvmExit.KVM_EXIT_IO]:  # INS reads the port before it looks at memory
            exits.append(small.vcpu.run())
        assert exits[-1] == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == HANDLER + 1


def test_elements_are_emulated_in_a_row_without_rf_in_between(kernel: SimKernel) -> None:
    with started(kernel, b"\xf3\xac", rsi=0x8000, rcx=3) as small:  # rep lodsb
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = 0x8000
        small.vcpu.set_sregs(sregs)
        for left in (3, 2, 1):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
            at_exit = small.vcpu.get_regs()
            assert (at_exit.rcx, at_exit.rip, at_exit.rflags & RF) == (left, CODE, 0)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
