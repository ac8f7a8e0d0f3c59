"""What keeps a TD alive, and the order in which everything goes back."""

import errno
import os

import pytest

from sim_backend.kvm.errors import Errno
from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.handle import Handle
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H

BUSY = 0x8000_0200 << 32
FLUSHVP_NOT_DONE = 0x8000_0824 << 32
INTERRUPTED = 0x8000_0003 << 32
KVM_DEV_TYPE_VFIO = 4


def collapse(leaves: list[H]) -> list[H]:
    """Return the leaves with runs of the same one written once."""
    return [leaf for index, leaf in enumerate(leaves) if index == 0 or leaves[index - 1] != leaf]


def test_everything_goes_back_in_the_kernels_order(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().done(), n_vcpus=2)
    td.run_to_end()
    seam.calls.clear()
    td.close()
    assert collapse(seam.leaves()) == [
        *[H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_TRACK, H.TDH_MEM_PAGE_REMOVE, H.TDH_PHYMEM_PAGE_WBINVD] * 16,
        H.TDH_VP_FLUSH,
        H.TDH_MNG_VPFLUSHDONE,
        H.TDH_PHYMEM_CACHE_WB,
        H.TDH_MNG_KEY_FREEID,
        H.TDH_PHYMEM_PAGE_RECLAIM,
        H.TDH_PHYMEM_PAGE_WBINVD,
    ]
    assert seam.leaves().count(H.TDH_VP_FLUSH) == 2
    assert seam.leaves().count(H.TDH_PHYMEM_CACHE_WB) == td.machine.profile.packages


def test_vcpus_go_before_tables_and_the_tdr_goes_last(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().done())
    vm = td.machine.host.vms[-1]
    vcpu = vm.vcpus[0].vendor
    state = td.ops.td
    assert state.mirror is not None
    expected = [*vcpu.tdcx, vcpu.tdvpr]
    tables = [page for level in state.mirror.tables for page in level.values()]
    tdcs, tdr = list(state.tdcs), state.tdr
    td.close()
    reclaimed = [call.rcx for call in seam.calls if call.leaf == H.TDH_PHYMEM_PAGE_RECLAIM]
    assert reclaimed == [*expected, *tables, *tdcs, tdr]
    flushed = seam.calls[-1]
    global_hkid = td.machine.tdx.key_ids.global_hkid if td.machine.tdx else 0
    assert flushed.leaf == H.TDH_PHYMEM_PAGE_WBINVD
    assert flushed.rcx >> 40 != 0, "with a key id"
    assert td.machine.tdx is not None
    assert flushed.rcx == tdr | global_hkid << td.machine.tdx.key_ids.hkid_shift


@pytest.mark.parametrize("kept", ["vcpu", "gmem", "run_mapping"])
def test_each_of_these_alone_keeps_the_td(td: TestTd, machine: Machine, kept: str) -> None:
    td.build(Program().done())
    free = machine.free_hkids
    vcpu, gmem = td.vcpus[0], td.gmem1
    if kept != "vcpu":
        Handle.close(vcpu)  # the fd alone
        if kept != "run_mapping":
            vcpu.run_area.close()
    td.gmem0.close()
    if kept != "gmem":
        gmem.close()
    td.vm.close_fd()
    assert machine.free_hkids == free
    if kept == "gmem":
        gmem.close()
    elif kept == "run_mapping":
        vcpu.run_area.close()
    else:
        vcpu.close()
    assert machine.free_hkids == free + 1


def test_a_device_keeps_the_td(td: TestTd, machine: Machine) -> None:
    td.build(Program().done())
    free = machine.free_hkids
    device = td.vm.create_device(KVM_DEV_TYPE_VFIO)
    for each in (td.vcpu, td.gmem0, td.gmem1):
        each.close()
    td.vm.close_fd()
    assert machine.free_hkids == free
    device.close()
    assert machine.free_hkids == free + 1


def test_neither_slots_nor_irqfds_keep_anything(td: TestTd, machine: Machine) -> None:
    td.build(Program().done())
    free = machine.free_hkids
    event = os.eventfd(0, os.EFD_NONBLOCK)
    td.vm.irqfd(event, 5)
    td.gmem0.close()
    td.gmem1.close()
    td.close()
    assert machine.free_hkids == free + 1
    os.eventfd_write(event, 1)
    os.close(event)


def test_a_vcpu_that_was_never_initialised_is_not_flushed(seam: ScriptedSeam, td: TestTd) -> None:
    td.enable_caps().init_vm()
    td.create_vcpu(0)
    td.create_vcpu(1, init=False)
    seam.calls.clear()
    td.close()
    assert seam.leaves().count(H.TDH_VP_FLUSH) == 1


def test_a_vcpu_that_the_module_holds_for_flushed_is_fine(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().out(0x40, 1).done())
    td.run()
    vcpu = td.ops.vm.vcpus[0]
    td.ops.host.seamcalls.vp_flush(vcpu.lp, vcpu.vendor.tdvpr)
    td.ops.vcpu_load(vcpu, (vcpu.lp + 1) % td.machine.profile.n_cpus)
    assert seam.leaves()[-2:] == [H.TDH_VP_FLUSH, H.TDH_VP_FLUSH]
    assert not td.ops.vm.dead
    td.run_to_end()


def test_a_vcpu_that_cannot_be_flushed_bugs_the_vm(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().out(0x40, 1).done())
    td.run()
    vcpu = td.ops.vm.vcpus[0]
    seam.fail(H.TDH_VP_FLUSH, 0xC000_0100 << 32)
    td.ops.vcpu_load(vcpu, (vcpu.lp + 1) % td.machine.profile.n_cpus)
    assert td.ops.vm.bugged
    td.ops.host.seamcalls.vp_flush(vcpu.lp, vcpu.vendor.tdvpr)  # or its key id would be lost for all other tests


def test_a_duplicated_fd_keeps_nothing_that_it_does_not_name(td: TestTd, machine: Machine) -> None:
    td.build(Program().done())
    free = machine.free_hkids
    duplicate = os.dup(td.vm.fd)
    try:
        td.close()
        assert machine.free_hkids == free + 1
    finally:
        os.close(duplicate)


def test_an_interrupted_cache_flush_is_resumed(seam: ScriptedSeam, td: TestTd, machine: Machine) -> None:
    td.build(Program().done())
    seam.fail(H.TDH_PHYMEM_CACHE_WB, INTERRUPTED, INTERRUPTED)
    seam.calls.clear()

    def start_instead_of_resuming(lp: int, regs: list[int]) -> None:
        resumed_for_real = regs[0] == H.TDH_PHYMEM_CACHE_WB and len(resumes_seen) >= 2
        if regs[0] == H.TDH_PHYMEM_CACHE_WB:
            resumes_seen.append(regs[1])
        if resumed_for_real:
            regs[1] = 0  # the module was never interrupted
        seam.execute(lp, regs)

    resumes_seen: list[int] = []
    seam.hook = start_instead_of_resuming
    td.close()
    assert resumes_seen == [0, 1, 1, *[0] * (machine.profile.packages - 1)]


@pytest.mark.parametrize("machine", ["7.3 of its own"], indirect=True)
@pytest.mark.parametrize(("leaf", "status"), [(H.TDH_MNG_VPFLUSHDONE, FLUSHVP_NOT_DONE), (H.TDH_MNG_KEY_FREEID, BUSY)])
def test_a_key_id_that_the_module_keeps_is_leaked_with_every_page(
    seam: ScriptedSeam, td: TestTd, machine: Machine, leaf: H, status: int
) -> None:
    td.build(Program().done())
    seam.fail(leaf, status)
    td.close()
    assert H.TDH_PHYMEM_PAGE_RECLAIM not in seam.leaves()
    leaked = machine.pages.leaked
    assert machine.pages.in_use == len(leaked) == 1 + 6 + 6 + 3, "TDR, TDCS, TDVPS, Secure-EPT pages"
    assert machine.tdx is not None
    assert machine.module is not None
    assert len(machine.module.tdrs) == 1


def test_a_vcpu_that_moves_to_another_processor_is_flushed_on_the_old_one(seam: ScriptedSeam, td: TestTd) -> None:
    td.build(Program().out(0x40, 1).done())
    td.run()
    vcpu = td.machine.host.vms[-1].vcpus[0]
    old = vcpu.lp
    seam.calls.clear()
    other = (old + 1) % td.machine.profile.n_cpus
    vcpu.vm.ops.vcpu_load(vcpu, other)
    assert [(call.leaf, call.lp) for call in seam.calls] == [(H.TDH_VP_FLUSH, old)]
    td.run_to_end()


class TestCpuHotplug:
    def last_of_package_0(self, machine: Machine) -> range:
        return range(machine.profile.n_cpus // machine.profile.packages)

    def test_the_last_cpu_of_a_package_stays_while_a_td_exists(self, td: TestTd, machine: Machine) -> None:
        assert machine.tdx is not None
        td.build(Program().done())
        *others, last = self.last_of_package_0(machine)
        try:
            for lp in others:
                machine.tdx.offline_cpu(lp)
            with pytest.raises(Errno) as raised:
                machine.tdx.offline_cpu(last)
            assert raised.value.errno == errno.EBUSY
            td.run_to_end()
            td.close()
            machine.tdx.offline_cpu(last)
            machine.lps.set_online(last, True)
        finally:
            for lp in others:
                machine.lps.set_online(lp, True)

    def test_vcpus_of_a_cpu_that_goes_are_flushed(self, td: TestTd, machine: Machine) -> None:
        assert machine.tdx is not None
        td.build(Program().out(0x40, 1).done())
        td.run()
        vcpu = machine.host.vms[-1].vcpus[0]
        gone = vcpu.lp
        machine.tdx.offline_cpu(gone)
        try:
            assert vcpu.vendor.associated_lp == -1
            td.run_to_end()
            assert vcpu.lp != gone
        finally:
            machine.lps.set_online(gone, True)
