"""TDH.EXPORT.RESTORE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.sept import walk
from sim_backend.tdx_module.sept_states import TDEL, TDHP, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdcs import Tdcs

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_EXPORT_RESTORE]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_EXPORT_RESTORE]

_HPA: Final = 0xF_FFFF_FFFF_F000
_LIST_FORMAT: Final = 7
_LIST_RESERVED: Final = 7 << 52
_FIRST_SHIFT: Final = 3
_LAST_SHIFT: Final = 55
_INDEX: Final = 0x1FF

# An entry of the list: level 1:0, GPA 51:12, operation 53:52, status 60:56.
_ENTRY_RESERVED: Final = 0xF << 3 | 3 << 54 | 7 << 61
_ENTRY_LEVEL: Final = 3
_ENTRY_OPERATION: Final = 1 << 52  # clear: no operation, or one that is cancelled
_ENTRY_RESULT: Final = 3 << 52 | 0x1F << 56
_STATUS_SHIFT: Final = 56
_SKIPPED, _WALK_FAILED, _BUSY, _STATE_INCORRECT, _ENTRY_INVALID = 1, 2, 3, 4, 15


def tdh_export_restore(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Make pages ordinary again after an export that was aborted.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA list: format 0 in 2:0, first entry 11:3, HPA 51:12, last entry 63:55
    RDX     in  HPA of the TDR page
    RCX     out the list with its first entry moved past the entries that are done
    ======= === ============================================================

    Each entry of the list is given its status. RAX[31:0] counts the entries that could not be restored.

    Spec: TDX Module ABI Reference, TDH.EXPORT.RESTORE.
    """
    gpa_list = regs[RCX]

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state; so is its Secure EPT.
    tdr = module.lock_tdr(regs[RDX], Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs
    if not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)

    # 2. RCX is a list of at least one entry.
    first, last = gpa_list >> _FIRST_SHIFT & _INDEX, gpa_list >> _LAST_SHIFT
    list_hpa = gpa_list & _HPA
    if gpa_list & (_LIST_FORMAT | _LIST_RESERVED) or first > last:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    module.check_shared_hpa(list_hpa, 4096, Operand.RCX)

    # 3. Each entry on its own.
    failed = 0
    rest = gpa_list & ~(_INDEX << _FIRST_SHIFT)
    for number in range(first, last + 1):
        address = list_hpa + 8 * number
        entry = int.from_bytes(module.read_shared(address, 8), "little")
        status = _restore(module, tdcs, entry)
        failed += status != _SKIPPED
        # NOP, with the status
        module.write_shared(address, (entry & ~_ENTRY_RESULT | status << _STATUS_SHIFT).to_bytes(8, "little"))
        if status == _ENTRY_INVALID:
            regs[RCX] = rest | number << _FIRST_SHIFT
            raise LeafError(Status.OPERAND_INVALID, Operand.GPA_LIST_ENTRY)
        if number < last and module.platform.interrupt_pending(lp):
            regs[RCX] = rest | (number + 1) << _FIRST_SHIFT
            raise LeafError(Status.INTERRUPTED_RESUMABLE)
    regs[RCX] = rest | (last + 1 & _INDEX) << _FIRST_SHIFT
    return failed


def _restore(module: TdxModule, tdcs: Tdcs, entry: int) -> int:
    """Return the status of one entry. Outside an export session no page is in a state to restore."""
    if entry & (_ENTRY_RESERVED | _ENTRY_LEVEL):
        return _ENTRY_INVALID
    if not entry & _ENTRY_OPERATION:
        return _SKIPPED
    gpa = entry & _HPA
    if gpa >> tdcs.shared_bit:
        return _ENTRY_INVALID
    q = module.q
    index, level = walk(q, tdcs, gpa, 0)
    if level:
        return _WALK_FAILED
    sept_entry = q[index]
    if sept_entry & TDEL:
        q[index] = sept_entry | TDHP
        return _BUSY
    q[index] = sept_entry & ~TDHP
    if not _SEPT_STATES >> state_of(sept_entry) & 1:
        return _STATE_INCORRECT
    raise NotModelled("TDH_EXPORT_RESTORE: a migration session")
