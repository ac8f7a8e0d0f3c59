"""Module profiles: 1.5.01 as recorded, and the hybrid that the mainline host needs."""

import pytest

from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.gprs import R8, RAX, RCX, new_gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Status

TDX_FEATURES0 = 0x0A00000300000008
NO_RBP_MOD, TOPOLOGY_ENUM = 1 << 18, 1 << 20


def bring_up(name: str) -> SeamcallHost:
    platform = load_platform("golden")
    host = SeamcallHost(
        TdxModule(platform, PhysicalMemory(platform.ram_bytes), load_profile(name), StaticCpus()), tdmr_gib=1
    )
    host.bring_up()
    return host


def test_1_5_01_is_exact_and_says_so() -> None:
    profile = load_profile("1.5.01")
    assert profile.exact
    assert not profile.additions
    assert (profile.major_version, profile.minor_version) == (1, 5)


def test_the_hybrid_names_each_addition_and_its_source() -> None:
    profile = load_profile("mainline-host")
    assert not profile.exact
    assert len(profile.additions) == 4
    assert all(addition.what and addition.source for addition in profile.additions)


def test_an_unknown_profile_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        load_profile("2.0")


@pytest.mark.parametrize(("name", "topology"), [("1.5.01", False), ("mainline-host", True)])
def test_tdx_features0_is_what_the_kernel_looks_at(name: str, topology: bool) -> None:
    features = bring_up(name).call(SeamcallLeaf.TDH_SYS_RD, rdx=TDX_FEATURES0)[R8]
    assert features & NO_RBP_MOD
    assert bool(features & TOPOLOGY_ENUM) == topology


def test_only_the_hybrid_has_vp_init_version_1() -> None:
    for name, status in (("1.5.01", Status.OPERAND_INVALID), ("mainline-host", Status.SUCCESS)):
        host = bring_up(name)
        td = host.create_td()
        tdvpr = host.create_vcpu(td, init=False)
        host.call(SeamcallLeaf.TDH_VP_INIT, version=1, rcx=tdvpr, r8=6, accept=status)
        host.call(SeamcallLeaf.TDH_VP_INIT, version=2, rcx=tdvpr, accept=Status.OPERAND_INVALID)


def test_the_fatal_statuses_are_those_that_the_kernel_knows() -> None:
    """A TD that executes what no TD should becomes fatal; KVM compares the status with its own constant."""
    for name, status in (("1.5.01", 0x6000_0002), ("mainline-host", 0x4000_0002)):
        host = bring_up(name)
        module = host.module
        td = host.create_td()
        tdvpr = host.create_vcpu(td)
        host.finalize(td)
        regs = new_gprs()
        regs[RAX], regs[RCX] = SeamcallLeaf.TDH_VP_ENTER, tdvpr
        assert module.seamcall(0, regs)
        tdvps = module.running[0]
        assert tdvps is not None
        assert tdvps.cpu is not None
        tdvps.cpu.exit.reason = 52  # the VMX-preemption timer, which no TD has
        assert module.vmexit(0, regs)
        assert regs[RAX] >> 32 == status
        assert module.tdrs[td.tdr].fatal
