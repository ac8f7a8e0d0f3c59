"""What every TDX sub-command checks before it looks at its own arguments."""

import ctypes
import errno
from collections.abc import Callable
from typing import Any

import pytest

from tdxhw.expect import fails_with
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.td import TrustDomain
from uapi_ctypes.dialect import CommandFd, Dialect

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
UNMAPPED = 0x1000
"""An address that no process maps: below vm.mmap_min_addr."""
UNKNOWN_ID = 99


def test_a_sub_command_on_an_ordinary_vm_is_enotty(ordinary_vm: Callable[..., OrdinaryVm], dialect: Dialect) -> None:
    vm = ordinary_vm().vm

    for command in dialect.commands:
        with fails_with(errno.ENOTTY):
            vm.memory_encrypt_op(dialect.cmd(command.id))


def test_an_unreadable_command_is_efault(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EFAULT):
        td.vm.memory_encrypt_op(UNMAPPED)


def test_an_unknown_sub_command_is_einval(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.memory_encrypt_op(dialect.cmd(UNKNOWN_ID))


def test_a_vcpu_s_sub_command_on_the_vm_is_einval(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    for command in dialect.commands:
        if command.fd is CommandFd.VCPU:
            with fails_with(errno.EINVAL):
                td.vm.tdx_command(command)


def test_a_vm_s_sub_command_on_a_vcpu_is_einval(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()
    td.init_vm()
    vcpu = td.create_vcpu()

    for command in dialect.commands:
        if command.fd is CommandFd.VM:
            with fails_with(errno.EINVAL):
                vcpu.tdx_command(command)


def spoiled(dialect: Dialect, command_id: int) -> ctypes.Structure:
    """Return a command whose hw_error is not zero."""
    cmd: Any = dialect.cmd(command_id, 0, UNMAPPED)
    cmd.hw_error = 1
    made: ctypes.Structure = cmd
    return made


def test_hw_error_must_be_zero_on_input(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    for command in dialect.commands:
        if command.fd is CommandFd.VM:
            with fails_with(errno.EINVAL):
                td.vm.memory_encrypt_op(spoiled(dialect, command.id))


def test_hw_error_must_be_zero_for_an_unknown_sub_command_too(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.memory_encrypt_op(spoiled(dialect, UNKNOWN_ID))


def test_reg_region_is_not_for_tds(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.ENOTTY):
        td.vm.memory_encrypt_reg_region(0, 0x1000)
