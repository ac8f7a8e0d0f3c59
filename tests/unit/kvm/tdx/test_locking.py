"""Which locks a TDX sub-command takes: what it waits for, and what it does not."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.unit.kvm.tdx.guest_code import Program
from tests.unit.kvm.tdx.vmm import TestTd, error_of

NEVER_S = 0.1  # [s] a call that has not come back by then is waiting
SOON_S = 10.0


class Background(threading.Thread):
    """One call on a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self.error = -1
        self.start()

    def run(self) -> None:
        self.error = error_of(self._call)

    def waits(self) -> bool:
        """Tell whether the call does not come back."""
        self.join(NEVER_S)
        return self.is_alive()

    def result(self) -> int:
        """Return the errno that the call came back with."""
        self.join(SOON_S)
        assert not self.is_alive()
        return self.error


@contextmanager
def spinning(td: TestTd) -> Iterator[None]:
    """Keep vCPU 0 inside KVM_RUN."""
    runner = Background(td.vcpu.run)
    vcpu = td.machine.host.vms[-1].vcpus[0]
    while not vcpu.in_guest:
        time.sleep(0.001)
    try:
        yield
    finally:
        td.vcpu.kvm_run.immediate_exit = 1
        vcpu.kick()
        assert runner.result() == errno.EINTR


def test_a_vm_command_waits_until_no_vcpu_is_running(td: TestTd) -> None:
    td.build(Program().spin())
    with spinning(td):
        command = Background(td.vm.tdx_finalize_vm)
        assert command.waits()
    assert command.result() == errno.EINVAL


def test_a_vcpu_command_waits_for_the_other_vcpus_too(td: TestTd) -> None:
    td.build(Program().spin(), n_vcpus=2)
    with spinning(td):
        command = Background(td.vcpus[1].tdx_init_vcpu)
        assert command.waits()
    assert command.result() == errno.EINVAL


def test_capabilities_waits_for_nobody(td: TestTd) -> None:
    td.build(Program().spin())
    with spinning(td):
        assert not Background(lambda: td.vm.tdx_capabilities(64)).waits()


@pytest.mark.parametrize("machine", ["6.16", "v17"], indirect=True)
def test_6_16_and_v17_lock_less(td: TestTd) -> None:
    td.build(Program().spin(), n_vcpus=2)
    with spinning(td):
        for call in (td.vm.tdx_finalize_vm, td.vcpus[1].tdx_init_vcpu):
            command = Background(call)
            assert not command.waits()
            assert command.result() == errno.EINVAL


class SlowCreation:
    """Makes KVM_CREATE_VCPU stop in the middle, in the hook of the TD's own code."""

    def __init__(self, td: TestTd) -> None:
        ops = td.ops
        create = ops.vcpu_create
        self.begun, self.go_on = threading.Event(), threading.Event()

        def vcpu_create(vcpu: object) -> None:
            self.begun.set()
            assert self.go_on.wait(SOON_S)
            create(vcpu)  # type: ignore[arg-type]

        ops.vcpu_create = vcpu_create  # type: ignore[method-assign]


def test_a_command_waits_for_a_vcpu_that_is_being_created(td: TestTd) -> None:
    td.enable_caps().init_vm()
    slow = SlowCreation(td)
    creation = Background(lambda: td.create_vcpu(0, init=False))
    assert slow.begun.wait(SOON_S)
    command = Background(td.vm.tdx_finalize_vm)
    assert command.waits()
    slow.go_on.set()
    assert creation.result() == 0
    assert command.result() == errno.EIO, "no vCPU was initialised"


@pytest.mark.parametrize("machine", ["7.2"], indirect=True)
def test_in_7_2_a_command_is_ebusy_while_a_vcpu_is_being_created(td: TestTd) -> None:
    td.enable_caps().init_vm()
    slow = SlowCreation(td)
    creation = Background(lambda: td.create_vcpu(0, init=False))
    assert slow.begun.wait(SOON_S)
    assert Background(td.vm.tdx_finalize_vm).result() == errno.EBUSY
    slow.go_on.set()
    assert creation.result() == 0
    td.set_cpuid(td.vcpu)
    td.vcpu.tdx_init_vcpu()
    td.finalize()


@pytest.mark.parametrize("machine", ["7.2"], indirect=True)
def test_in_7_2_two_creations_of_one_id_can_be_under_way_and_one_is_eexist(td: TestTd) -> None:
    td.enable_caps().init_vm()
    slow = SlowCreation(td)
    creations = [Background(lambda: td.create_vcpu(0, init=False)) for _ in range(2)]
    assert slow.begun.wait(SOON_S)
    slow.go_on.set()
    assert sorted(creation.result() for creation in creations) == [0, errno.EEXIST]
    assert td.ops.vm.created_vcpus == 1
    assert [vcpu.index for vcpu in td.ops.vm.vcpus] == [0]
