"""The two exits with which an instruction asks user space's devices: KVM_EXIT_IO and KVM_EXIT_MMIO."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.kvm_run_page import EXIT_REASON, PIO_PAGE_OFFSET, UNION, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_IO: Final = 2
KVM_EXIT_MMIO: Final = 6
FRAGMENT: Final = 8  # [bytes] the most that one MMIO exit carries


def exit_for_port_read(vcpu: "Vcpu", port: int, size: int, count: int, complete: Callable[[], bool]) -> bool:
    """Ask for `count` elements of `size` [bytes] from a port; they are in the PIO page when `complete` is called."""
    length = size * count
    vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + length] = bytes(length)
    return _exit_io(vcpu, 0, size, port, count, complete)


def port_data(vcpu: "Vcpu", length: int) -> bytes:
    """Return what user space put into the PIO page."""
    return bytes(vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + length])


def exit_for_port_write(vcpu: "Vcpu", port: int, data: bytes, complete: Callable[[], bool] | None = None) -> bool:
    """Tell of one write to a port."""
    vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + len(data)] = data
    return _exit_io(vcpu, 1, len(data), port, 1, complete)


def _exit_io(
    vcpu: "Vcpu", direction: int, size: int, port: int, count: int, complete: Callable[[], bool] | None
) -> bool:
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_IO
    run.u8[UNION] = direction
    run.u8[UNION + 1] = size
    run.u16[UNION // 2 + 1] = port
    run.u32[UNION_U32 + 1] = count
    run.u64[UNION_U64 + 1] = PIO_PAGE_OFFSET
    vcpu.complete_userspace_io = complete
    return False


def _fill_mmio(vcpu: "Vcpu", gpa: int, size: int, data: bytes | None) -> None:
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_MMIO
    run.u64[UNION_U64] = gpa
    if data is not None:
        run.u8[UNION + 8 : UNION + 8 + size] = data
    run.u32[UNION_U32 + 4] = size
    run.u8[UNION + 20] = data is not None


def exit_for_mmio_reads(
    vcpu: "Vcpu", fragments: list[tuple[int, int]], complete: Callable[[list[bytes]], bool]
) -> bool:
    """Ask for each fragment (GPA, length [bytes]), eight bytes at a time; hand all answers to `complete`."""
    answers: list[bytes] = []

    def ask(index: int, so_far: bytes) -> bool:
        if index == len(fragments):
            return complete(answers)
        gpa, length = fragments[index]
        part = min(FRAGMENT, length - len(so_far))
        _fill_mmio(vcpu, gpa + len(so_far), part, None)

        def answered() -> bool:
            data = so_far + bytes(vcpu.run.u8[UNION + 8 : UNION + 8 + part])
            if len(data) < length:
                return ask(index, data)
            answers.append(data)
            return ask(index + 1, b"")

        vcpu.complete_userspace_io = answered
        return False

    return ask(0, b"")


def exit_for_mmio_writes(vcpu: "Vcpu", fragments: list[tuple[int, bytes]]) -> bool:
    """Tell of the writes of an instruction that is otherwise over, one exit for each."""

    def tell(index: int) -> bool:
        gpa, data = fragments[index]
        _fill_mmio(vcpu, gpa, len(data), data)

        def told() -> bool:
            return True if index + 1 == len(fragments) else tell(index + 1)

        vcpu.complete_userspace_io = told
        return False

    return tell(0)
