"""What `RecordingKernel` writes down, on the simulated kernel."""

import threading
from collections.abc import Iterator

import pytest

from sim_backend.machine import boot
from tdxhw.diff.recording_kernel import Call, RecordingKernel
from tdxhw.ordinary_vm import OrdinaryVm
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import BackendLimit, KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KvmMemFlag
from uapi_ctypes.kvm_state import KvmSregs
from uapi_ctypes.mapping import anonymous


@pytest.fixture(scope="module")
def sim() -> Iterator[Kernel]:
    machine = boot("pvm")
    yield machine.kernel()
    machine.shutdown()


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def kernel(sim: Kernel, calls: list[Call]) -> RecordingKernel:
    recording = RecordingKernel(sim, calls.append)
    recording.begin()
    return recording


def named(calls: list[Call], request: str) -> list[Call]:
    return [call for call in calls if call["req"] == request]


def test_objects_get_names_in_the_order_of_their_creation(kernel: RecordingKernel, calls: list[Call]) -> None:
    with Kvm(kernel) as kvm, kvm.create_vm() as vm:
        vm.create_vcpu(0)
        vm.create_vcpu(7)

    assert [(call.get("obj"), call["req"], call["ret"]) for call in calls] == [
        (None, "open", "kvm0"),
        ("kvm0", "KVM_CREATE_VM", "vm0"),
        ("kvm0", "KVM_GET_VCPU_MMAP_SIZE", 12288),
        ("vm0", "KVM_CREATE_VCPU", "vcpu0"),
        ("vcpu0", "mmap", 0),
        ("vm0", "KVM_CREATE_VCPU", "vcpu1"),
        ("vcpu1", "mmap", 0),
        ("vcpu1", "close", 0),
        ("vcpu0", "close", 0),
        ("vm0", "close", 0),
        ("kvm0", "close", 0),
    ]


def test_a_refusal_is_recorded_and_raised(kernel: RecordingKernel, calls: list[Call]) -> None:
    with Kvm(kernel) as kvm, kvm.create_vm() as vm, pytest.raises(KvmError, match="EINVAL"):
        vm.set_user_memory_region(0, 0x800, 0x1000, 0)

    (refused,) = named(calls, "KVM_SET_USER_MEMORY_REGION")
    assert refused["errno"] == "EINVAL"
    assert refused["arg"] == {"guest_phys_addr": 0x800, "memory_size": 0x1000}
    assert "ret" not in refused


def test_what_a_call_wrote_is_recorded_and_what_it_left_alone_is_not(
    kernel: RecordingKernel, calls: list[Call]
) -> None:
    with Kvm(kernel) as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        sregs = vcpu.get_sregs()
        vcpu.ioctl(KvmRequest.KVM_GET_SREGS, sregs)

    first, second = named(calls, "KVM_GET_SREGS")
    assert first["arg"] == {}
    assert first["out"]["cs.base"] == 0xFFFF_0000
    assert second["arg"] == first["out"]
    assert "out" not in second
    assert isinstance(sregs, KvmSregs)


def test_an_exit_is_recorded_with_its_fields_and_the_answer_to_it(kernel: RecordingKernel, calls: list[Call]) -> None:
    with OrdinaryVm(kernel) as vm:
        vm.add_slot(0, 0x10000)
        vcpu = vm.create_vcpu()
        vm.start_real_mode(vcpu, b"\xe4\x11\xe6\x10\xf4")  # in al, 0x11; out 0x10, al; hlt
        vcpu.run()
        vcpu.io_data()[0] = 0x5A
        vcpu.run()
        vcpu.run()

    read, written, halted = named(calls, "KVM_RUN")
    assert read["exit"] == "KVM_EXIT_IO"
    assert (read["out"]["io.port"], read["out"]["io.size"], "io.data" in read["out"]) == (0x11, 1, False)
    assert written["arg"] == {"io.data": "hex:5a"}
    assert (written["out"]["io.direction"], written["out"]["io.data"]) == (1, "hex:5a")
    assert (halted["exit"], halted["arg"]) == ("KVM_EXIT_HLT", {})


def test_a_run_that_fails_has_no_exit_fields(kernel: RecordingKernel, calls: list[Call]) -> None:
    with Kvm(kernel) as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.kvm_run.immediate_exit = 1
        with pytest.raises(KvmError):
            vcpu.run()

    (run,) = named(calls, "KVM_RUN")
    assert (run["errno"], run["arg"]) == ("EINTR", {"immediate_exit": 1})
    assert not any("." in path for path in run["out"])


def test_what_the_simulator_does_not_do_is_recorded_by_name(kernel: RecordingKernel, calls: list[Call]) -> None:
    with OrdinaryVm(kernel) as vm:
        vm.add_slot(0, 0x1_0000)
        vcpu = vm.create_vcpu()
        vm.start_real_mode(vcpu, bytes.fromhex("0f 23 f8 f4"))  # mov dr7, eax
        regs = vcpu.get_regs()
        regs.rax = 0x403  # a breakpoint of the guest's own
        vcpu.set_regs(regs)
        with pytest.raises(BackendLimit):
            vcpu.run()
    (run,) = named(calls, "KVM_RUN")
    assert "DR7" in run["limit"]
    assert "ret" not in run
    assert "errno" not in run


def test_the_dirty_bitmap_is_part_of_the_answer(kernel: RecordingKernel, calls: list[Call]) -> None:
    with OrdinaryVm(kernel) as vm, anonymous(4096) as bitmap:
        slot = vm.add_slot(0, 0x10000)
        vm.start_real_mode(vm.create_vcpu(), b"\xc6\x06\x00\x20\xaa\xf4")  # mov byte [0x2000], 0xaa; hlt
        vm.vm.set_user_memory_region(0, 0, 0x10000, slot.shared.address, KvmMemFlag.KVM_MEM_LOG_DIRTY_PAGES)
        vm.vcpus[0].run()
        vm.vm.get_dirty_log(0, bitmap.address)

    (log,) = named(calls, "KVM_GET_DIRTY_LOG")
    assert int(log["out"]["*dirty_bitmap"].removeprefix("hex:")[:2], 16) & 0b100


def test_nothing_is_recorded_before_and_after(kernel: RecordingKernel, calls: list[Call]) -> None:
    kernel.end()
    with Kvm(kernel) as kvm, kvm.create_vm() as vm:
        vm.create_vcpu(0)

    assert calls == []


def test_calls_of_other_threads_carry_their_name(kernel: RecordingKernel, calls: list[Call]) -> None:
    with Kvm(kernel) as kvm:
        thread = threading.Thread(target=kvm.get_api_version, name="worker")
        thread.start()
        thread.join()

    assert [call.get("thread") for call in calls] == [None, "worker", None]


def test_a_closed_descriptor_keeps_its_name(kernel: RecordingKernel, calls: list[Call]) -> None:
    kvm = Kvm(kernel)
    fd = kvm.fd
    kvm.close()
    with pytest.raises(KvmError):
        kernel.ioctl(fd, KvmRequest.KVM_GET_API_VERSION)

    assert (calls[-1]["obj"], calls[-1]["errno"]) == ("kvm0", "EBADF")
