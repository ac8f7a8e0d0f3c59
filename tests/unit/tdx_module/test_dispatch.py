"""SEAMCALL dispatch: which error comes first, and what happens to registers."""

import pytest

from sim_backend.hw.gprs import RAX, new_gprs
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.dispatch import BEFORE_READY, LEAVES
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

INVALID_RAX = Rax(Status.OPERAND_INVALID, Operand.RAX)


def seamcall(host: SeamcallHost, rax: int) -> Rax:
    regs = new_gprs()
    regs[RAX] = rax
    assert not host.module.seamcall(0, regs)
    return Rax.decode(regs[RAX])


@pytest.mark.parametrize("rax", [1 << 24 | 33, 1 << 32 | 33, 1 << 63 | 33, 1 << 16 | 33])
def test_reserved_bits_and_versions_come_before_the_state(fresh_host: SeamcallHost, rax: int) -> None:
    assert seamcall(fresh_host, rax) == INVALID_RAX


@pytest.mark.parametrize("leaf", [9, 42, 46, 97, 0xFFFF])
def test_before_it_is_ready_the_module_does_not_look_at_the_leaf(fresh_host: SeamcallHost, leaf: int) -> None:
    assert seamcall(fresh_host, leaf) == Rax(Status.SYS_NOT_READY)


@pytest.mark.parametrize("leaf", [42, 46, 47, 50, 54, 63, 67, 69, 97, 0xFFFF])
def test_a_ready_module_refuses_leaves_that_it_does_not_have(host: SeamcallHost, leaf: int) -> None:
    assert seamcall(host, leaf) == INVALID_RAX


@pytest.mark.parametrize("leaf", sorted(BEFORE_READY))
def test_initialisation_leaves_run_before_the_module_is_ready(fresh_host: SeamcallHost, leaf: int) -> None:
    assert seamcall(fresh_host, leaf).status is not Status.SYS_NOT_READY


def test_after_shutdown_only_the_no_op_remains(host: SeamcallHost) -> None:
    assert seamcall(host, SeamcallLeaf.TDH_SYS_SHUTDOWN) == Rax(Status.SUCCESS)
    assert host.module.sys_state == SysState.SYS_SHUTDOWN
    for leaf in SeamcallLeaf:
        expected = Status.SUCCESS if leaf == SeamcallLeaf.TDH_SYS_LP_SHUTDOWN else Status.SYS_SHUTDOWN
        assert seamcall(host, leaf) == Rax(expected)


def test_registers_that_a_leaf_does_not_write_come_back(host: SeamcallHost) -> None:
    regs = [0x1000 + number for number in range(16)]
    regs[RAX] = SeamcallLeaf.TDH_SYS_LP_SHUTDOWN
    before = regs[1:]
    host.module.seamcall(0, regs)
    assert regs[1:] == before


def test_every_lock_is_free_after_a_failed_leaf(host: SeamcallHost) -> None:
    td = host.create_td(init=False)
    host.call(SeamcallLeaf.TDH_MNG_ADDCX, rcx=td.tdr, rdx=td.tdr, accept=Status.OPERAND_BUSY)
    assert not host.module.pamt.held
    host.init_td(td, TdParams())


def test_the_table_has_every_leaf_of_the_abi_but_one() -> None:
    assert set(SeamcallLeaf) - set(LEAVES) == {SeamcallLeaf.TDH_MEM_SEPT_WR}
