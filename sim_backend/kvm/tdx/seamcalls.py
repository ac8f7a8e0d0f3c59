"""The SEAMCALLs that KVM issues, one method a leaf, with the kernel's own retry on missing entropy.

Names and operand order follow the kernel's wrappers (`arch/x86/virt/vmx/tdx/tdx.c`). A method returns the
completion status, RAX, unless it says otherwise. `lp` is the logical processor that executes the
instruction. This is the only file of the KVM model that knows which register holds which operand.
"""

from typing import Final

from sim_backend.hw.gprs import R8, RAX, Gprs
from sim_backend.kvm.seam import Seam
from uapi_ctypes.tdx_leaves import SeamcallLeaf

STATUS_MASK: Final = 0xFFFF_FFFF_0000_0000
"""What of RAX identifies a status; the lower half is an operand or an exit reason."""

SUCCESS: Final = 0
NON_RECOVERABLE_VCPU: Final = 0x4000_0001 << 32
NON_RECOVERABLE_TD: Final = 0x4000_0002 << 32  # KVM's constant; module 1.5.01 returns 0x60000002
TD_NON_ACCESSIBLE: Final = 0x6000_0005 << 32
TD_WRONG_APIC_MODE: Final = 0x6000_0007 << 32  # KVM's constant; module 1.5.01 returns 0xE0000007
INTERRUPTED_RESUMABLE: Final = 0x8000_0003 << 32
OPERAND_INVALID: Final = 0xC000_0100 << 32
OPERAND_BUSY: Final = 0x8000_0200 << 32
RND_NO_ENTROPY: Final = 0x8000_0203 << 32
VCPU_NOT_ASSOCIATED: Final = 0x8000_0702 << 32
KEY_GENERATION_FAILED: Final = 0x8000_0800 << 32
NO_HKID_READY_TO_WBCACHE: Final = 0x0000_0821 << 32
FLUSHVP_NOT_DONE: Final = 0x8000_0824 << 32
EPT_ENTRY_STATE_INCORRECT: Final = 0xC000_0B0D << 32

ERROR: Final = 1 << 63
NON_RECOVERABLE: Final = 1 << 62
SOFTWARE_ERROR: Final = 0x8000_FF00 << 32
"""The kernel's own marker, all bits set: the SEAMCALL instruction itself failed (#GP, #UD, VMfailInvalid)."""

OPERAND_SEPT: Final = 0x92

_ENTROPY_TRIES: Final = 10  # RDRAND_RETRY_LOOPS

_VP_ENTER: Final = int(SeamcallLeaf.TDH_VP_ENTER)
_MNG_ADDCX: Final = int(SeamcallLeaf.TDH_MNG_ADDCX)
_MEM_PAGE_ADD: Final = int(SeamcallLeaf.TDH_MEM_PAGE_ADD)
_MEM_SEPT_ADD: Final = int(SeamcallLeaf.TDH_MEM_SEPT_ADD)
_VP_ADDCX: Final = int(SeamcallLeaf.TDH_VP_ADDCX)
_MEM_PAGE_AUG: Final = int(SeamcallLeaf.TDH_MEM_PAGE_AUG)
_MEM_RANGE_BLOCK: Final = int(SeamcallLeaf.TDH_MEM_RANGE_BLOCK)
_MNG_KEY_CONFIG: Final = int(SeamcallLeaf.TDH_MNG_KEY_CONFIG)
_MNG_CREATE: Final = int(SeamcallLeaf.TDH_MNG_CREATE)
_VP_CREATE: Final = int(SeamcallLeaf.TDH_VP_CREATE)
_MNG_RD: Final = int(SeamcallLeaf.TDH_MNG_RD)
_MR_EXTEND: Final = int(SeamcallLeaf.TDH_MR_EXTEND)
_MR_FINALIZE: Final = int(SeamcallLeaf.TDH_MR_FINALIZE)
_VP_FLUSH: Final = int(SeamcallLeaf.TDH_VP_FLUSH)
_MNG_VPFLUSHDONE: Final = int(SeamcallLeaf.TDH_MNG_VPFLUSHDONE)
_MNG_KEY_FREEID: Final = int(SeamcallLeaf.TDH_MNG_KEY_FREEID)
_MNG_INIT: Final = int(SeamcallLeaf.TDH_MNG_INIT)
_VP_INIT: Final = int(SeamcallLeaf.TDH_VP_INIT)
_VP_RD: Final = int(SeamcallLeaf.TDH_VP_RD)
_PHYMEM_PAGE_RECLAIM: Final = int(SeamcallLeaf.TDH_PHYMEM_PAGE_RECLAIM)
_MEM_PAGE_REMOVE: Final = int(SeamcallLeaf.TDH_MEM_PAGE_REMOVE)
_SYS_RD: Final = int(SeamcallLeaf.TDH_SYS_RD)
_MEM_TRACK: Final = int(SeamcallLeaf.TDH_MEM_TRACK)
_PHYMEM_CACHE_WB: Final = int(SeamcallLeaf.TDH_PHYMEM_CACHE_WB)
_PHYMEM_PAGE_WBINVD: Final = int(SeamcallLeaf.TDH_PHYMEM_PAGE_WBINVD)
_VP_WR: Final = int(SeamcallLeaf.TDH_VP_WR)

_VERSION_1: Final = 1 << 16


def is_busy(status: int) -> bool:
    """Tell whether `status` is OPERAND_BUSY, whatever the operand."""
    return status & STATUS_MASK == OPERAND_BUSY


def is_software_error(status: int) -> bool:
    """Tell whether the SEAMCALL was not executed at all."""
    return status & SOFTWARE_ERROR == SOFTWARE_ERROR


class Seamcalls:
    """Issues SEAMCALLs through `seam`, which stands for the instruction."""

    def __init__(self, seam: Seam) -> None:
        self._seamcall: Final = seam.seamcall

    def raw(self, lp: int, leaf: int, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0) -> Gprs:
        """Execute `leaf` and return all registers; try up to ten times while entropy is missing."""
        for _ in range(_ENTROPY_TRIES):
            regs = [leaf, rcx, rdx, 0, 0, 0, 0, 0, r8, r9, 0, 0, 0, 0, 0, 0]
            self._seamcall(lp, regs)
            if regs[RAX] != RND_NO_ENTROPY:
                break
        return regs

    def sys_rd(self, lp: int, field: int) -> tuple[int, int]:
        """Return (status, value) of a global metadata field."""
        regs = self.raw(lp, _SYS_RD, rdx=field)
        return regs[RAX], regs[R8]

    # --- The TD ---

    def mng_create(self, lp: int, tdr: int, hkid: int) -> int:
        """TDH.MNG.CREATE."""
        return self.raw(lp, _MNG_CREATE, tdr, hkid)[RAX]

    def mng_key_config(self, lp: int, tdr: int) -> int:
        """TDH.MNG.KEY.CONFIG, for the package of `lp`."""
        return self.raw(lp, _MNG_KEY_CONFIG, tdr)[RAX]

    def mng_addcx(self, lp: int, tdr: int, tdcs: int) -> int:
        """TDH.MNG.ADDCX."""
        return self.raw(lp, _MNG_ADDCX, tdcs, tdr)[RAX]

    def mng_init(self, lp: int, tdr: int, td_params: int) -> int:
        """TDH.MNG.INIT with the HPA of TD_PARAMS."""
        return self.raw(lp, _MNG_INIT, tdr, td_params)[RAX]

    def mng_rd(self, lp: int, tdr: int, field: int) -> tuple[int, int]:
        """TDH.MNG.RD: return (status, value)."""
        regs = self.raw(lp, _MNG_RD, tdr, field)
        return regs[RAX], regs[R8]

    def mr_extend(self, lp: int, tdr: int, gpa: int) -> int:
        """TDH.MR.EXTEND of the 256 bytes at `gpa`."""
        return self.raw(lp, _MR_EXTEND, gpa, tdr)[RAX]

    def mr_finalize(self, lp: int, tdr: int) -> int:
        """TDH.MR.FINALIZE."""
        return self.raw(lp, _MR_FINALIZE, tdr)[RAX]

    def mng_vpflushdone(self, lp: int, tdr: int) -> int:
        """TDH.MNG.VPFLUSHDONE."""
        return self.raw(lp, _MNG_VPFLUSHDONE, tdr)[RAX]

    def mng_key_freeid(self, lp: int, tdr: int) -> int:
        """TDH.MNG.KEY.FREEID."""
        return self.raw(lp, _MNG_KEY_FREEID, tdr)[RAX]

    # --- Its vCPUs ---

    def vp_create(self, lp: int, tdr: int, tdvpr: int) -> int:
        """TDH.VP.CREATE."""
        return self.raw(lp, _VP_CREATE, tdvpr, tdr)[RAX]

    def vp_addcx(self, lp: int, tdvpr: int, tdcx: int) -> int:
        """TDH.VP.ADDCX."""
        return self.raw(lp, _VP_ADDCX, tdcx, tdvpr)[RAX]

    def vp_init(self, lp: int, tdvpr: int, initial_rcx: int) -> int:
        """TDH.VP.INIT as v17 issues it: two operands."""
        return self.raw(lp, _VP_INIT, tdvpr, initial_rcx)[RAX]

    def vp_init_v1(self, lp: int, tdvpr: int, initial_rcx: int, x2apic_id: int) -> int:
        """TDH.VP.INIT version 1, which also takes the x2APIC id that CPUID enumerates."""
        return self.raw(lp, _VP_INIT | _VERSION_1, tdvpr, initial_rcx, x2apic_id)[RAX]

    def vp_rd(self, lp: int, tdvpr: int, field: int) -> tuple[int, int]:
        """TDH.VP.RD: return (status, value)."""
        regs = self.raw(lp, _VP_RD, tdvpr, field)
        return regs[RAX], regs[R8]

    def vp_wr(self, lp: int, tdvpr: int, field: int, value: int, mask: int) -> int:
        """TDH.VP.WR of the bits `mask` of a field."""
        return self.raw(lp, _VP_WR, tdvpr, field, value, mask)[RAX]

    def vp_flush(self, lp: int, tdvpr: int) -> int:
        """TDH.VP.FLUSH, on the LP that the vCPU is associated with."""
        return self.raw(lp, _VP_FLUSH, tdvpr)[RAX]

    def vp_enter(self, lp: int, regs: Gprs) -> None:
        """TDH.VP.ENTER: `regs` carry RCX = TDVPR and the TDVMCALL answers in, the TD exit out."""
        regs[RAX] = _VP_ENTER
        self._seamcall(lp, regs)

    # --- Its memory ---

    def mem_sept_add(self, lp: int, tdr: int, gpa: int, level: int, page: int) -> int:
        """TDH.MEM.SEPT.ADD: fill the entry of `gpa` at `level` (1 is 2 MiB) with a table page."""
        return self.raw(lp, _MEM_SEPT_ADD, gpa | level, tdr, page)[RAX]

    def mem_page_add(self, lp: int, tdr: int, gpa: int, page: int, source: int) -> int:
        """TDH.MEM.PAGE.ADD of one 4 KiB page."""
        return self.raw(lp, _MEM_PAGE_ADD, gpa, tdr, page, source)[RAX]

    def mem_page_aug(self, lp: int, tdr: int, gpa: int, page: int) -> int:
        """TDH.MEM.PAGE.AUG of one 4 KiB page."""
        return self.raw(lp, _MEM_PAGE_AUG, gpa, tdr, page)[RAX]

    def mem_range_block(self, lp: int, tdr: int, gpa: int) -> int:
        """TDH.MEM.RANGE.BLOCK of one 4 KiB page."""
        return self.raw(lp, _MEM_RANGE_BLOCK, gpa, tdr)[RAX]

    def mem_track(self, lp: int, tdr: int) -> int:
        """TDH.MEM.TRACK."""
        return self.raw(lp, _MEM_TRACK, tdr)[RAX]

    def mem_page_remove(self, lp: int, tdr: int, gpa: int) -> int:
        """TDH.MEM.PAGE.REMOVE of one 4 KiB page."""
        return self.raw(lp, _MEM_PAGE_REMOVE, gpa, tdr)[RAX]

    # --- Physical memory ---

    def phymem_page_reclaim(self, lp: int, page: int) -> int:
        """TDH.PHYMEM.PAGE.RECLAIM."""
        return self.raw(lp, _PHYMEM_PAGE_RECLAIM, page)[RAX]

    def phymem_page_wbinvd(self, lp: int, page_and_hkid: int) -> int:
        """TDH.PHYMEM.PAGE.WBINVD of an HPA with its HKID bits."""
        return self.raw(lp, _PHYMEM_PAGE_WBINVD, page_and_hkid)[RAX]

    def phymem_cache_wb(self, lp: int, *, resume: bool) -> int:
        """TDH.PHYMEM.CACHE.WB on the package of `lp`."""
        return self.raw(lp, _PHYMEM_CACHE_WB, int(resume))[RAX]
