import errno

import pytest

from tests.unit.kvm.tdx.guest_code import Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H


def failing(td: TestTd) -> KvmError:
    with pytest.raises(KvmError) as raised:
        td.vm.tdx_finalize_vm()
    return raised.value


def test_a_td_that_was_never_initialised_is_einval(td: TestTd) -> None:
    assert failing(td).errno == errno.EINVAL


def test_a_second_time_is_einval(td: TestTd) -> None:
    td.build(Program().done())
    error = failing(td)
    assert (error.errno, error.hw_error) == (errno.EINVAL, 0)


def test_without_an_initialised_vcpu_the_module_refuses_and_the_vm_is_bugged(td: TestTd) -> None:
    td.enable_caps().init_vm()
    td.create_vcpu(init=False)
    error = failing(td)
    assert (error.errno, error.hw_error) == (errno.EIO, 0xC0000609 << 32)
    with pytest.raises(KvmError) as raised:
        td.vm.check_extension(66)
    assert raised.value.errno == errno.EIO


def test_a_busy_module_is_ebusy_with_its_status_and_a_retry_is_legal(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm()
    td.create_vcpu()
    seam.fail(H.TDH_MR_FINALIZE, 0x8000_0200 << 32 | 0x80)
    error = failing(td)
    assert (error.errno, error.hw_error) == (errno.EBUSY, 0x8000_0200 << 32 | 0x80)
    td.vm.tdx_finalize_vm()


def test_flags_and_data_are_not_looked_at(td: TestTd) -> None:
    td.enable_caps().init_vm()
    td.create_vcpu()
    td.vm.tdx_command(td.dialect.finalize_vm, 0x10, 0xFFFF)


@pytest.mark.parametrize("machine", ["6.16"], indirect=True)
def test_6_16_refuses_while_a_page_is_mapped_and_not_added(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm().add_memory()
    td.create_vcpu()
    seam.fail(H.TDH_MEM_PAGE_ADD, 0x8000_0200 << 32)
    with pytest.raises(KvmError) as raised:
        td.add_image(Program().done())
    assert raised.value.errno == errno.EBUSY
    assert failing(td).errno == errno.EINVAL
    td.add_image(Program().done())
    td.finalize()
    td.run_to_end()


@pytest.mark.parametrize("machine", ["6.16"], indirect=True)
def test_6_16_forgets_such_a_page_when_a_hole_is_punched(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm().add_memory()
    td.create_vcpu()
    seam.fail(H.TDH_MEM_PAGE_ADD, 0x8000_0200 << 32)
    with pytest.raises(KvmError, match="EBUSY"):
        td.add_image(Program().done())
    td.gmem0.punch_hole(0, 0x1000)
    assert seam.leaves()[-1] == H.TDH_MEM_RANGE_BLOCK, "refused: the module never had it"
    td.vm.tdx_finalize_vm()
