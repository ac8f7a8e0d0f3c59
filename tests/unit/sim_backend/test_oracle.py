"""The oracle finds what either model changed behind the other's back, and names the page."""

import re
import threading
from collections.abc import Callable, Iterator

import pytest

from sim_backend.hw.gprs import RAX
from sim_backend.kvm.tdx.ops import TdxOps
from sim_backend.machine import Machine, boot
from sim_backend.oracle import Oracle, read_secure_ept
from sim_backend.tdx_module.errors import SimBug
from sim_backend.tdx_module.pamt import PageType
from tests.unit.kvm.tdx.guest_code import IMAGE_GPA, Program
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.tdx_leaves import SeamcallLeaf

GFN = IMAGE_GPA >> 12


@pytest.fixture(params=["7.3", "v17"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = boot(request.param, oracle=True, faults=[])
    yield machine
    machine.memory.close()  # not shutdown(): a test may have left the models in a state that they cannot undo


@pytest.fixture
def td(machine: Machine) -> TestTd:
    return TestTd(machine).build(Program().done())


@pytest.fixture
def oracle(machine: Machine) -> Oracle:
    assert machine.oracle is not None
    return machine.oracle


def ops_of(machine: Machine) -> TdxOps:
    ops = machine.host.vms[-1].ops
    assert isinstance(ops, TdxOps)
    return ops


def test_a_td_from_creation_to_the_end_gives_the_oracle_no_reason_to_complain(machine: Machine, oracle: Oracle) -> None:
    with TestTd(machine) as td:
        td.build(Program().done(), n_vcpus=2)
        td.run_to_end()
        td.vm.set_memory_attributes(0, 0x10_0000, 0)
        td.gmem0.punch_hole(0, 0x2000)
        assert machine.module is not None
        tdr = machine.module.tdrs[ops_of(machine).td.tdr]
        assert len(read_secure_ept(machine.module, tdr).leaves) == 14
    assert machine.leftovers() == []
    assert oracle.checks >= 20


def mirror_forgets_a_page(machine: Machine) -> str:
    ops_of(machine).td.mirror.unmap(GFN + 3)  # type: ignore[union-attr]
    return f"GPA {IMAGE_GPA + 0x3000:#x}: KVM's mirror EPT has nothing, the Secure EPT has HPA 0x[0-9a-f]+ (MAPPED)"


def mirror_has_another_page(machine: Machine) -> str:
    td = ops_of(machine).td
    assert td.mirror is not None
    first, second = td.mirror.lookup(GFN), td.mirror.lookup(GFN + 1)
    td.mirror.unmap(GFN)
    td.mirror.map(GFN, second)
    return f"GPA {IMAGE_GPA:#x}: KVM's mirror maps HPA {second:#x}, guest_memfd has HPA {first:#x} for it"


def attribute_flips_without_a_zap(machine: Machine) -> str:
    machine.host.vms[-1].attributes.set_range(GFN + 5, GFN + 6, private=False)
    return f"GPA {IMAGE_GPA + 0x5000:#x}: KVM's mirror maps HPA 0x[0-9a-f]+, the memory attribute says shared"


def slot_vanishes_without_a_zap(machine: Machine) -> str:
    machine.host.vms[-1].memslots[0].remove(0)
    return f"GPA {IMAGE_GPA:#x}: .* no memory slot with a guest_memfd is there"


def gmem_page_is_freed_without_a_zap(machine: Machine) -> str:
    gmem = machine.host.vms[-1].gmems[0]
    machine.pages.free(gmem._pages.pop(2))
    return f"GPA {IMAGE_GPA + 0x2000:#x}: KVM's mirror maps HPA 0x[0-9a-f]+, guest_memfd has nothing for it"


def module_page_is_blocked(machine: Machine) -> str:
    assert machine.tdx is not None
    machine.tdx.seamcalls.mem_range_block(0, ops_of(machine).td.tdr, IMAGE_GPA + 0x7000)
    return (
        f"GPA {IMAGE_GPA + 0x7000:#x}: KVM's mirror EPT has HPA (0x[0-9a-f]+), the Secure EPT has HPA \\1"
        r" \(BLOCKED\)"
    )


def pamt_says_something_else(machine: Machine) -> str:
    assert machine.module is not None
    pamt, tdcx = machine.module.pamt, ops_of(machine).td.tdcs[0]
    pamt.set_page_type(pamt.entry_4k(tdcx), PageType.EPT)
    return "PAMT says|its TD says"


def table_is_forgotten(machine: Machine) -> str:
    td = ops_of(machine).td
    assert td.mirror is not None
    machine.pages.free(td.mirror.tables[2].pop(GFN >> 18))
    return f"the table of GPA {GFN >> 18 << 30:#x} below level 2: KVM's mirror EPT has nothing, the Secure EPT has HPA"


def a_page_has_no_owner(machine: Machine) -> str:
    machine.pages.alloc()
    return r"(\d+) host pages are allocated, and \d+ have an owner"


def an_owned_page_is_free(machine: Machine) -> str:
    hpa = machine.host.vms[-1].vcpus[0].vendor.pi_descriptor
    machine.pages.free(hpa)
    machine.pages.in_use += 1
    return f"the page at HPA {hpa:#x} is free, and the posted-interrupt descriptor of vCPU 0"


def kvm_forgets_its_key(machine: Machine) -> str:
    ops_of(machine).td.hkid = 0
    return r"KVM has HKID 0 for the TDR at HPA 0x[0-9a-f]+, the module has HKID \d+"


def vm_vanishes(machine: Machine) -> str:
    for gmem in machine.host.vms[-1].gmems:
        for hpa in gmem.private_pages().values():
            machine.pages.free(hpa)
    machine.host.vms.pop()
    return r"the module has the \w+ page at HPA 0x[0-9a-f]+, its VM is gone and KVM leaked nothing"


SPOILERS: list[Callable[[Machine], str]] = [
    mirror_forgets_a_page,
    mirror_has_another_page,
    attribute_flips_without_a_zap,
    slot_vanishes_without_a_zap,
    gmem_page_is_freed_without_a_zap,
    module_page_is_blocked,
    pamt_says_something_else,
    table_is_forgotten,
    a_page_has_no_owner,
    an_owned_page_is_free,
    kvm_forgets_its_key,
    vm_vanishes,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=[spoil.__name__ for spoil in SPOILERS])
@pytest.mark.usefixtures("td")
def test_names_the_first_page_that_disagrees(machine: Machine, oracle: Oracle, spoil: Callable[[Machine], str]) -> None:
    oracle.check()
    expected = spoil(machine).replace("(MAPPED)", r"\(MAPPED\)")

    with pytest.raises(SimBug) as found:
        oracle.check()
    assert re.search(expected, str(found.value)), str(found.value)


def test_a_module_that_only_claims_to_remove_a_page_is_caught_at_that_ioctl(machine: Machine, td: TestTd) -> None:
    assert machine.faults is not None

    def lie(lp: int, regs: list[int]) -> bool:
        del lp
        regs[RAX] = 0
        return True

    machine.faults.seam.intercept(SeamcallLeaf.TDH_MEM_PAGE_REMOVE, lie)
    with pytest.raises(SimBug, match=f"GPA {IMAGE_GPA:#x}"):
        td.vm.set_memory_attributes(IMAGE_GPA, 0x1000, 0)


@pytest.mark.parametrize("machine", ["7.3"], indirect=True)
def test_calls_that_overlap_are_checked_when_the_last_returns(machine: Machine, oracle: Oracle, td: TestTd) -> None:
    td.close()
    ready = threading.Event()
    with TestTd(machine) as spinning:
        spinning.build(Program().spin())
        checks = oracle.checks
        thread = threading.Thread(target=_run_until_told, args=(spinning, ready))
        thread.start()
        ready.wait()
        while not machine.host.vms[-1].vcpus[0].in_guest:
            pass
        spinning.vm.set_memory_attributes(0, 0x10_0000, 0)
        assert oracle.checks == checks
        spinning.vm.set_memory_attributes(0, 0x10_0000, PRIVATE)
        spinning.vcpu.kvm_run.immediate_exit = 1
        machine.host.vms[-1].vcpus[0].kick()
        thread.join()
        assert oracle.checks == checks + 1
    assert machine.leftovers() == []


def _run_until_told(td: TestTd, ready: threading.Event) -> None:
    ready.set()
    with pytest.raises(KvmError, match="EINTR"):
        td.vcpu.run()


@pytest.mark.parametrize("machine", ["7.3"], indirect=True)
def test_pending_pages_agree_as_well(machine: Machine, oracle: Oracle, td: TestTd) -> None:
    td.vcpu.pre_fault_memory(KvmPreFaultMemory(0, 0x4000))
    before = oracle.checks

    td.vm.set_memory_attributes(0x1000, 0x2000, 0)
    assert oracle.checks == before + 1
    mirror = ops_of(machine).td.mirror
    assert mirror is not None
    assert list(mirror.mapped_gfns(0, 16)) == [0, 3]
