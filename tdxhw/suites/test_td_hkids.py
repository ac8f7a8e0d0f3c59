"""Private HKIDs are a finite pool: exhausted, refilled, never lost."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import TrustDomain, count_hkids
from uapi_ctypes.dialect import Dialect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import Kernel

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]
MORE_THAN_ANY_HOST_HAS = 1 << 15


def exhaust(trust_domain: MAKE_TD) -> list[TrustDomain]:
    """Initialise TDs until there is no HKID left; return those that got one."""
    held: list[TrustDomain] = []
    while True:
        td = trust_domain().create()
        try:
            td.init_vm()
        except KvmError as error:
            td.close()
            if error.errno != errno.ENOSPC:
                raise
            return held
        held.append(td)


def test_a_td_without_hkid_is_enospc_and_another_s_end_makes_room(trust_domain: MAKE_TD) -> None:
    held = exhaust(trust_domain)
    assert held
    one_more = trust_domain().create()
    with fails_with(errno.ENOSPC):
        one_more.init_vm()

    held.pop().close()

    one_more.init_vm()  # the refused one may simply try again


def test_creating_a_td_costs_no_hkid_before_init_vm(trust_domain: MAKE_TD, kernel: Kernel, dialect: Dialect) -> None:
    free = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)
    trust_domain().create()

    assert count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS) == free


def test_no_hkid_is_lost_by_a_hundred_lives(trust_domain: MAKE_TD, kernel: Kernel, dialect: Dialect) -> None:
    free = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)

    for _ in range(100):
        td = trust_domain().build()
        td.finalize()
        td.close()

    assert count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS) == free


def test_a_td_lives_until_its_last_file_is_closed(trust_domain: MAKE_TD, kernel: Kernel, dialect: Dialect) -> None:
    free = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)
    td = trust_domain().create()
    td.init_vm()
    td.create_vcpu()

    td.vm.close_fd()
    with_open_vcpu = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)
    td.vcpus[0].close()

    assert with_open_vcpu == free - 1
    assert count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS) == free


def test_a_guest_memfd_keeps_its_td_alive(trust_domain: MAKE_TD, kernel: Kernel, dialect: Dialect) -> None:
    free = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)
    td = trust_domain().create()
    td.init_vm()
    gmem = td.vm.create_guest_memfd(1 << 20)

    td.vm.close_fd()
    with_open_gmem = count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS)
    gmem.close()

    assert with_open_gmem == free - 1
    assert count_hkids(kernel, dialect, MORE_THAN_ANY_HOST_HAS) == free
