"""KVM_TDX_FINALIZE_VM and, in v17, KVM_TDX_RELEASE_VM."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import TrustDomain
from uapi_ctypes.tdx_status import Status

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]


def test_finalizes_a_td_once(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()
    td.finalize()

    with fails_with(errno.EINVAL):
        td.finalize()


def test_before_init_vm_it_is_einval(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.finalize()


@pytest.mark.dialects("mainline")
def test_without_an_initialised_vcpu_the_module_refuses_and_the_vm_is_dead(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.init_vm()
    td.create_vcpu()  # created is not enough: VP.INIT counts

    with fails_with(errno.EIO, Status.NO_VCPUS):
        td.finalize()
    with fails_with(errno.EIO):
        td.vm.check_extension(0)


@pytest.mark.dialects("v17")
def test_without_an_initialised_vcpu_it_is_eio_and_can_be_retried(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.init_vm()
    vcpu = td.create_vcpu()
    with fails_with(errno.EIO):
        td.finalize()

    td.set_cpuid(vcpu)
    td.init_vcpu(vcpu)
    td.finalize()


def test_flags_and_data_are_not_looked_at(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()

    td.vm.tdx_command(td.dialect.finalize_vm, 0xDEAD_BEEF, flags=7)
    with fails_with(errno.EINVAL):
        td.finalize()


@pytest.mark.dialects("v17")
def test_release_vm_always_succeeds(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.vm.tdx_release_vm()  # even before INIT_VM


@pytest.mark.dialects("v17")
def test_after_release_vm_nothing_can_be_initialised_any_more(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()
    td.init_vm()
    vcpu = td.create_vcpu()
    td.set_cpuid(vcpu)

    td.vm.tdx_release_vm()

    with fails_with(errno.EINVAL):
        td.init_vcpu(vcpu)
    with fails_with(errno.EINVAL):
        td.finalize()


@pytest.mark.dialects("v17")
@pytest.mark.requires("hkids>=2")
def test_release_vm_gives_the_hkid_back_while_the_vm_is_still_open(trust_domain: MAKE_TD) -> None:
    first = trust_domain().build()
    first.finalize()

    first.vm.tdx_release_vm()

    trust_domain().build().finalize()
