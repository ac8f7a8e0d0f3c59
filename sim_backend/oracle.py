"""The oracle: what KVM believes about a TD against what the TDX module knows, page by page.

KVM keeps a mirror of the Secure EPT because it cannot read the real one, and its attributes, memory slots,
guest_memfd pages and page allocator have to agree with what the module holds. On hardware a disagreement
surfaces much later, as a failed SEAMCALL. Here it is looked for after every system call (``boot(…, oracle=True)``)
and the first page that disagrees is named, with what each side says of it.

Sits beside machine.py: nothing else may look into both models.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sim_backend.kernel import SimKernel
from sim_backend.kvm.address_space import AddressSpace
from sim_backend.kvm.guest_memfd import GuestMemfd
from sim_backend.kvm.host import KvmHost
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.mmu.mirror_ept import MirrorEpt
from sim_backend.kvm.tdx.ops import TdxOps
from sim_backend.kvm.tdx.tdx_host import TdxHost
from sim_backend.tdx_module.errors import SimBug
from sim_backend.tdx_module.invariants import check_invariants, touched_entries
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept_states import FREE_ENTRY, HPA_MASK, PS, SeptState, state_of
from sim_backend.tdx_module.tdr import LifecycleState, Tdr
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import IoctlArg

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_ALL_GFNS: Final = 1 << 40
_NOTHING: Final = frozenset({SeptState.FREE, SeptState.REMOVED})
_BLOCKED: Final = frozenset({SeptState.BLOCKED, SeptState.PENDING_BLOCKED})


@dataclass(frozen=True, slots=True)
class SecureEpt:
    """The module's private mappings of a TD, read from its tables."""

    leaves: dict[int, tuple[int, int]]  # GFN -> (HPA, SeptState)
    tables: dict[tuple[int, int], int]  # (level, GFN >> 9 * level) -> HPA of the table below


def read_secure_ept(module: TdxModule, tdr: Tdr) -> SecureEpt:
    """Read all of it. Empty while the TD has no Secure EPT, and once its key is gone."""
    found = SecureEpt({}, {})
    if tdr.lifecycle_state == LifecycleState.KEYS_CONFIGURED and tdr.tdcs.sept_root:
        _read_table(module, tdr.tdcs.sept_root, tdr.tdcs.pwl, 0, found)
    return found


def _read_table(module: TdxModule, table: int, level: int, first: int, found: SecureEpt) -> None:
    for index, entry in enumerate(module.q[table >> 3 : (table >> 3) + 512].tolist()):
        if entry == FREE_ENTRY:
            continue
        state = state_of(entry)
        if state in _NOTHING:
            continue
        key = first << 9 | index
        if entry & PS:
            found.leaves[key << 9 * level] = (entry & HPA_MASK, state)
        else:
            found.tables[level, key] = entry & HPA_MASK
            _read_table(module, entry & HPA_MASK, level - 1, key, found)


class Oracle:
    """Compares the models of one host. `checks` counts how often it did."""

    def __init__(self, host: KvmHost, tdx: TdxHost | None, module: TdxModule | None) -> None:
        self._host: Final = host
        self._pages: Final[HostPages] = host.pages
        self._tdx: Final = tdx
        self._module: Final = module
        self.checks = 0

    def check(self) -> None:
        """Compare everything; raise `SimBug` naming the first page that disagrees.

        No call may be under way: between a SEAMCALL and KVM's note of it the two do disagree.
        """
        self.checks += 1
        module = self._module
        owned: dict[int, str] = {}  # HPA -> who KVM says has it
        known_tdrs: set[int] = set()
        if module is not None:
            check_invariants(module)
        for vm in self._host.vms:
            if isinstance(vm.ops, TdxOps) and module is not None:
                known_tdrs.add(vm.ops.td.tdr)
                self._check_td(vm.ops, module, owned)
            for gmem in vm.gmems:
                self._check_guest_memfd(gmem, owned)
        if module is not None:
            self._check_forgotten(module, known_tdrs, owned)
        self._check_allocator(owned)

    # ---- one TD -----------------------------------------------------------------------------------------

    def _check_td(self, ops: TdxOps, module: TdxModule, owned: dict[int, str]) -> None:
        td = ops.td
        self._check_control_pages(ops, module, owned)
        if td.shared is not None:
            for hpa in td.shared.table_pages():
                _claim(owned, hpa, "a shared EPT table")
            for gfn, hpa in td.shared.mapped():
                self._check_shared_page(ops.vm, gfn, hpa)
        mirror = td.mirror
        if mirror is None:
            return
        mirrored = {gfn: mirror.lookup(gfn) for gfn in mirror.mapped_gfns(0, _ALL_GFNS)}
        for gfn, hpa in mirrored.items():
            self._check_private_page(ops, gfn, hpa)
        tdr = module.tdrs.get(td.tdr)
        if tdr is not None and tdr.lifecycle_state == LifecycleState.KEYS_CONFIGURED:
            secure = read_secure_ept(module, tdr)
            self._compare_leaves(ops, mirrored, secure)
            self._compare_tables(mirror, secure)

    def _check_control_pages(self, ops: TdxOps, module: TdxModule, owned: dict[int, str]) -> None:
        td = ops.td
        pages = [(hpa, PageType.TDCX, "a TDCS page") for hpa in td.tdcs]
        if td.tdr:
            if td.tdr not in module.tdrs:
                raise SimBug(f"KVM has a TDR at HPA {td.tdr:#x}, the module has none there")
            tdr = module.tdrs[td.tdr]
            if td.hkid != (0 if tdr.lifecycle_state == LifecycleState.TEARDOWN else tdr.hkid):
                raise SimBug(
                    f"KVM has HKID {td.hkid} for the TDR at HPA {td.tdr:#x}, the module has HKID {tdr.hkid}"
                    f" ({LifecycleState(tdr.lifecycle_state).name})"
                )
            pages.append((td.tdr, PageType.TDR, "a TDR"))
        for vcpu in ops.vm.vcpus:
            vendor = vcpu.vendor
            _claim(owned, vendor.pi_descriptor, f"the posted-interrupt descriptor of vCPU {vcpu.id}")
            if vendor.tdvpr:
                pages.append((vendor.tdvpr, PageType.TDVPR, f"the TDVPR of vCPU {vcpu.id}"))
            pages += [(hpa, PageType.TDCX, f"a TDVPS page of vCPU {vcpu.id}") for hpa in vendor.tdcx]
        if td.mirror is not None:
            for level in td.mirror.tables:
                pages += [(hpa, PageType.EPT, "a Secure EPT page") for hpa in level.values()]
        for hpa, page_type, what in pages:
            _claim(owned, hpa, what)
            self._check_pamt(module, hpa, page_type, 0 if page_type == PageType.TDR else td.tdr, what)

    @staticmethod
    def _check_pamt(module: TdxModule, hpa: int, page_type: int, owner: int, what: str) -> None:
        entry = module.pamt.entry_4k(hpa)
        found = module.pamt.page_type(entry)
        if found != page_type:
            raise SimBug(f"KVM has {what} at HPA {hpa:#x}, PAMT says {PageType(found).name}")
        if owner and module.pamt.owner(entry) != owner:
            raise SimBug(
                f"KVM has {what} of the TDR at HPA {owner:#x} at HPA {hpa:#x},"
                f" PAMT says it belongs to the TDR at HPA {module.pamt.owner(entry):#x}"
            )

    def _check_private_page(self, ops: TdxOps, gfn: int, hpa: int) -> None:
        """Check that a private mapping is one that attributes, slots and guest_memfd allow."""
        vm = ops.vm
        where = f"GPA {gfn << 12:#x}: KVM's mirror maps HPA {hpa:#x}"
        if not vm.attributes.is_private(gfn):
            raise SimBug(f"{where}, the memory attribute says shared")
        slot = vm.find_memslot(gfn)
        if slot is None or slot.gmem is None:
            raise SimBug(f"{where}, no memory slot with a guest_memfd is there")
        page = slot.gmem.private_pages().get(slot.gmem_index(gfn))
        if page != hpa:
            raise SimBug(f"{where}, guest_memfd has {_at(page)} for it")

    @staticmethod
    def _check_shared_page(vm: "Vm", gfn: int, hpa: int) -> None:
        where = f"GPA {gfn << 12:#x}: the shared EPT maps HPA {hpa:#x}"
        if vm.attributes.is_private(gfn):
            raise SimBug(f"{where}, the memory attribute says private")
        slot = vm.find_memslot(gfn)
        if slot is None:
            raise SimBug(f"{where}, no memory slot is there")
        if slot.gmem is None and slot.window is None:
            raise SimBug(f"{where}, its memory slot has given its user memory up")
        if slot.window is not None and not slot.is_gmem_only() and hpa != slot.user_hpa(vm.host.memory, gfn):
            raise SimBug(f"{where}, its memory slot says HPA {slot.user_hpa(vm.host.memory, gfn):#x}")

    def _compare_leaves(self, ops: TdxOps, mirrored: dict[int, int], secure: SecureEpt) -> None:
        leaves = secure.leaves
        for gfn in sorted(mirrored.keys() | leaves.keys()):
            mine, (theirs, state) = mirrored.get(gfn), leaves.get(gfn, (None, SeptState.FREE))
            if mine == theirs and state not in _BLOCKED:
                continue
            if mine is None and theirs in self._pages.leaked:
                continue  # KVM failed to remove it, bugged the VM and gave the page up
            raise SimBug(
                f"GPA {gfn << 12:#x}: KVM's mirror EPT has {_at(mine)},"
                f" the Secure EPT has {_at(theirs)} ({SeptState(state).name})"
                f"{', and the VM is bugged' if ops.vm.bugged else ''}"
            )

    @staticmethod
    def _compare_tables(mirror: MirrorEpt, secure: SecureEpt) -> None:
        mirrored = {(level, key): hpa for level, tables in enumerate(mirror.tables) for key, hpa in tables.items()}
        for level, key in sorted(mirrored.keys() | secure.tables.keys()):
            mine, theirs = mirrored.get((level, key)), secure.tables.get((level, key))
            if mine != theirs:
                raise SimBug(
                    f"the table of GPA {key << 9 * level + 12:#x} below level {level}:"
                    f" KVM's mirror EPT has {_at(mine)}, the Secure EPT has {_at(theirs)}"
                )

    # ---- pages ------------------------------------------------------------------------------------------

    def _check_guest_memfd(self, gmem: GuestMemfd, owned: dict[int, str]) -> None:
        ops = gmem.vm.ops
        mapped: set[int] = set()
        if isinstance(ops, TdxOps) and ops.td.mirror is not None:
            mapped = {ops.td.mirror.lookup(gfn) for gfn in ops.td.mirror.mapped_gfns(0, _ALL_GFNS)}
        for index, hpa in gmem.private_pages().items():
            what = f"page {index} of the guest_memfd with fd {gmem.fd}"
            _claim(owned, hpa, what)
            if hpa in self._pages.leaked or self._module is None:
                continue
            if hpa in mapped:
                assert isinstance(ops, TdxOps)
                self._check_pamt(self._module, hpa, PageType.REG, ops.td.tdr, what)
            else:
                self._check_pamt(self._module, hpa, PageType.NDA, 0, f"unmapped {what}")

    def _check_forgotten(self, module: TdxModule, known_tdrs: set[int], owned: dict[int, str]) -> None:
        """Check that KVM still knows of whatever the module holds, or has said that it leaked it."""
        assert self._tdx is not None
        leaked_hkids = self._tdx.hkids.leaked
        leaked_pages = self._pages.leaked
        for hpa, page_type, owner in _module_pages(module):
            tdr_hpa = hpa if page_type == PageType.TDR else owner
            tdr = module.tdrs[tdr_hpa]
            if hpa in leaked_pages:
                _claim(owned, hpa, "a leaked page", again=True)
            elif tdr.lifecycle_state != LifecycleState.TEARDOWN and tdr.hkid in leaked_hkids:
                _claim(owned, hpa, "a page leaked with its HKID", again=True)
            elif tdr_hpa not in known_tdrs:
                name = PageType(page_type).name
                raise SimBug(f"the module has the {name} page at HPA {hpa:#x}, its VM is gone and KVM leaked nothing")
            elif hpa not in owned:
                raise SimBug(f"the module has a {PageType(page_type).name} page at HPA {hpa:#x}, KVM has forgotten it")

    def _check_allocator(self, owned: dict[int, str]) -> None:
        pages = self._pages
        used = owned.keys() | pages.leaked
        if pages.in_use != len(used):
            raise SimBug(f"{pages.in_use} host pages are allocated, and {len(used)} have an owner")
        both = used & pages.free_pages()
        if both:
            hpa = min(both)
            raise SimBug(f"the page at HPA {hpa:#x} is free, and {owned.get(hpa, 'leaked')}")


def _module_pages(module: TdxModule) -> Iterator[tuple[int, int, int]]:
    """Yield (HPA, type, owner) of every 4 KiB page that PAMT says is in use."""
    pamt = module.pamt
    for tdmr in module.tdmrs:
        for hpa, word in touched_entries(module.memory, tdmr, 0):
            if word >> 16 & 0xFF > PageType.RSVD:
                entry = pamt.entry_4k(hpa)
                yield hpa, pamt.page_type(entry), pamt.owner(entry)


def _claim(owned: dict[int, str], hpa: int, what: str, *, again: bool = False) -> None:
    other = owned.setdefault(hpa, what)
    if other is not what and not again:
        raise SimBug(f"the page at HPA {hpa:#x} is {other} and {what}")


def _at(hpa: int | None) -> str:
    return "nothing" if hpa is None else f"HPA {hpa:#x}"


class CheckedKernel(SimKernel):
    """A kernel that asks the oracle after each system call, and when calls overlap after the last of them."""

    def __init__(self, host: KvmHost, oracle: Oracle, mm: AddressSpace | None = None) -> None:
        super().__init__(host, mm)
        self.oracle: Final = oracle
        self._under_way = 0
        self._count_lock: Final = threading.Lock()

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        """Issue `request`; raise `KvmError`, or `SimBug` when the models disagree afterwards."""
        with self._checked():
            return super().ioctl(fd, request, arg)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Allocate or punch; raise `KvmError` or `SimBug`."""
        with self._checked():
            super().fallocate(fd, mode, offset, length)

    def close(self, fd: int) -> None:
        """Close `fd`; raise `KvmError` or `SimBug`."""
        with self._checked():
            super().close(fd)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        with self._count_lock:
            self._under_way += 1
        crashed = False
        try:
            yield
        except KvmError:
            raise
        except BaseException:
            crashed = True  # that is what to report: the models were left in the middle of something
            raise
        finally:
            # The lock is held while the models are compared, so no other call can begin meanwhile.
            with self._count_lock:
                self._under_way -= 1
                if not self._under_way and not crashed:
                    self.oracle.check()
