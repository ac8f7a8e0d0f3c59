"""vCPUs of a TD: KVM_CREATE_VCPU, KVM_TDX_INIT_VCPU, KVM_TDX_GET_CPUID, KVM_RUN before its time."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.expect import fails_with
from tdxhw.td import TrustDomain
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.dialect import Dialect
from uapi_ctypes.kvm import KvmMpStateValue
from uapi_ctypes.kvm_state import KvmCpuid2

pytestmark = pytest.mark.requires("tdx")

MAKE_TD = Callable[..., TrustDomain]


def initialised(trust_domain: MAKE_TD) -> TrustDomain:
    td = trust_domain().create()
    td.init_vm()
    return td


def test_init_vcpu_makes_the_vcpu_runnable(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()

    assert td.vcpus[0].get_mp_state() == KvmMpStateValue.KVM_MP_STATE_RUNNABLE


@pytest.mark.requires("two-vcpus")
def test_init_vcpu_makes_every_vcpu_runnable_not_only_the_first(trust_domain: MAKE_TD) -> None:
    """A TD has no INIT and SIPI: firmware parks the others."""
    td = initialised(trust_domain)
    states = []
    for vcpu in (td.create_vcpu(), td.create_vcpu()):
        states.append(vcpu.get_mp_state())
        td.set_cpuid(vcpu)
        td.init_vcpu(vcpu)
        states.append(vcpu.get_mp_state())

    runnable, uninitialised = KvmMpStateValue.KVM_MP_STATE_RUNNABLE, KvmMpStateValue.KVM_MP_STATE_UNINITIALIZED
    assert states == [runnable, runnable, uninitialised, runnable]


def test_init_vcpu_a_second_time_is_einval(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()

    with fails_with(errno.EINVAL):
        td.init_vcpu(td.vcpus[0])


def test_init_vcpu_with_flags_is_einval(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()
    td.set_cpuid(vcpu)

    with fails_with(errno.EINVAL):
        vcpu.tdx_command(dialect.init_vcpu, 0, flags=1)


def test_init_vcpu_without_x2apic_in_cpuid_is_einval(trust_domain: MAKE_TD) -> None:
    """It sets the APIC base to x2APIC mode, and KVM allows that only if the vCPU's CPUID has it."""
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()

    with fails_with(errno.EINVAL):
        td.init_vcpu(vcpu)


def test_init_vcpu_can_be_retried_after_its_einval(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()
    with fails_with(errno.EINVAL):
        td.init_vcpu(vcpu)

    td.set_cpuid(vcpu)
    td.init_vcpu(vcpu)


def test_init_vcpu_after_finalize_is_einval(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = trust_domain().build()
    td.finalize()

    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_command(dialect.init_vcpu)


@pytest.mark.dialects("mainline")
def test_a_vcpu_cannot_be_created_after_finalize(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()
    td.finalize()

    with fails_with(errno.EIO):
        td.create_vcpu()


def test_the_same_vcpu_id_twice_is_eexist(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)
    td.create_vcpu(0)

    with fails_with(errno.EEXIST):
        td.create_vcpu(0)


@pytest.mark.dialects("mainline")
def test_the_number_of_vcpus_is_not_settable(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.enable_cap(KvmCap.KVM_CAP_MAX_VCPUS, 1)


@pytest.mark.dialects("v17")
def test_the_number_of_vcpus_is_settable(trust_domain: MAKE_TD) -> None:
    td = trust_domain(max_vcpus=1).create()

    assert td.vm.check_extension(KvmCap.KVM_CAP_MAX_VCPUS) == 1
    td.init_vm()
    td.create_vcpu()
    with fails_with(errno.EINVAL):
        td.create_vcpu()


@pytest.mark.dialects("v17")
def test_the_number_of_vcpus_cannot_be_zero(trust_domain: MAKE_TD) -> None:
    td = trust_domain().create()

    with fails_with(errno.EINVAL):
        td.vm.enable_cap(KvmCap.KVM_CAP_MAX_VCPUS, 0)


@pytest.mark.dialects("mainline")
def test_get_cpuid_says_how_many_entries_it_needs(trust_domain: MAKE_TD, dialect: Dialect) -> None:
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()
    exact = vcpu.tdx_get_cpuid(256).nent
    small = KvmCpuid2.allocate(1)
    assert dialect.get_cpuid is not None

    with fails_with(errno.E2BIG):
        vcpu.tdx_command(dialect.get_cpuid, small)
    assert small.nent == exact > 1


@pytest.mark.dialects("mainline")
@pytest.mark.parametrize("gpaw", [48, 52])
def test_get_cpuid_shows_the_address_width_that_was_configured(trust_domain: MAKE_TD, gpaw: int) -> None:
    td = trust_domain(gpaw=gpaw).create()
    td.init_vm()
    entries = td.create_vcpu().tdx_get_cpuid(256).filled()

    assert [entry.eax >> 16 & 0xFF for entry in entries if entry.function == 0x8000_0008] == [gpaw]


@pytest.mark.dialects("mainline")
def test_get_cpuid_shows_that_this_is_a_td(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)
    entries = td.create_vcpu().tdx_get_cpuid(256).filled()

    leaf = next(entry for entry in entries if entry.function == 0x21)
    signature = b"".join(value.to_bytes(4, "little") for value in (leaf.ebx, leaf.edx, leaf.ecx))
    assert signature == b"IntelTDX    "


@pytest.mark.dialects("mainline")
def test_get_cpuid_after_finalize_is_einval(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()
    td.finalize()

    with fails_with(errno.EINVAL):
        td.vcpus[0].tdx_get_cpuid(256)


@pytest.mark.dialects("mainline")
def test_kvm_run_before_finalize_is_einval(trust_domain: MAKE_TD) -> None:
    td = trust_domain().build()

    with fails_with(errno.EINVAL):
        td.vcpus[0].run()


@pytest.mark.dialects("mainline")
def test_kvm_run_on_a_vcpu_that_was_never_initialised_is_einval(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)

    with fails_with(errno.EINVAL):
        td.create_vcpu().run()


def test_immediate_exit_comes_before_every_td_check(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()
    vcpu.kvm_run.immediate_exit = 1

    with fails_with(errno.EINTR):
        vcpu.run()


@pytest.mark.dialects("v17")
def test_set_cpuid_must_agree_with_init_vm(trust_domain: MAKE_TD) -> None:
    td = initialised(trust_domain)
    vcpu = td.create_vcpu()
    configs = td.capabilities().filled()
    entries = td.cpuid_table(vcpu)
    config = next(c for c in configs if c.eax | c.ebx | c.ecx | c.edx and any(e.function == c.leaf for e in entries))
    entry = next(entry for entry in entries if entry.function == config.leaf)
    register = next(name for name in ("eax", "ebx", "ecx", "edx") if getattr(config, name))
    mask = getattr(config, register)
    setattr(entry, register, getattr(entry, register) ^ (mask & -mask))

    with fails_with(errno.EINVAL):
        vcpu.set_cpuid2(KvmCpuid2.of(entries))
