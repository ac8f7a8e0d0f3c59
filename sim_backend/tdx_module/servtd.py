"""Service TDs: the binding of a migration TD to the TD it serves.

Spec: TDX Module Base Spec, "Service TDs"; ABI Reference, "SERVTD_ATTR", "Service TD Binding Handle".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.locks import EXCLUSIVE, HOST_PRIORITY, HP_READER
from sim_backend.tdx_module.metadata_sys import SERVTD_ATTR_FIXED0
from sim_backend.tdx_module.pamt import PageType
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdcs import Tdcs
    from sim_backend.tdx_module.tdr import Tdr

MAX_SERVTDS: Final = 1
INFO_HASH_BYTES: Final = 48
ATTR_INSTANCE_BINDING: Final = 1 << 0
_ATTR_IGNORE_SHIFT: Final = 32
_TYPE_MIGTD: Final = 0
_SLOT_MASK: Final = 0xFFF
_TDR_MASK: Final = 0xF_FFFF_FFFF_F000
_U64: Final = (1 << 64) - 1
_LAYOUT: Final = Struct("<BxHxxxxQ4Q48s32x")
_HASH_INPUT: Final = Struct("<48sHQ")


class BindingState(IntEnum):
    """SERVTD_BINDING_STATE."""

    NOT_BOUND = 0
    PRE_BOUND = 1
    BOUND = 2


@dataclass(slots=True)
class Binding:
    """A slot of the binding table. Implements `tdcs.ServiceTdBinding`."""

    state: BindingState = BindingState.NOT_BOUND
    type: int = 0
    attributes: int = 0
    uuid: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    info_hash: bytes = bytes(INFO_HASH_BYTES)

    @property
    def is_bound(self) -> bool:
        """False in the state NOT_BOUND."""
        return self.state is not BindingState.NOT_BOUND

    @property
    def ignored_tdinfo(self) -> int:
        """The `tdreport.IGNORE_*` bits of SERVTD_ATTR."""
        return self.attributes >> _ATTR_IGNORE_SHIFT

    def hash_input(self) -> bytes:
        """Return SERVTD_INFO_HASH (48 bytes), SERVTD_TYPE (u16) and SERVTD_ATTR (u64)."""
        return _HASH_INPUT.pack(self.info_hash, self.type, self.attributes)

    def encode(self) -> bytes:
        """Return the slot as the metadata shows it [128 bytes]."""
        return _LAYOUT.pack(self.state, self.type, self.attributes, *self.uuid, self.info_hash)


def binding(tdcs: Tdcs) -> Binding:
    """Return the TD's only slot."""
    if not tdcs.servtd_bindings:
        tdcs.servtd_bindings.append(Binding())
    slot = tdcs.servtd_bindings[0]
    assert isinstance(slot, Binding)
    return slot


def check_operands(slot: int, servtd_type: int, attributes: int) -> None:
    """Check R8 (slot), R9 (type) and R10 (SERVTD_ATTR); raise OPERAND_INVALID."""
    if slot >= MAX_SERVTDS:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    if servtd_type != _TYPE_MIGTD:
        raise LeafError(Status.OPERAND_INVALID, Operand.R9)
    if attributes & ~SERVTD_ATTR_FIXED0:
        raise LeafError(Status.OPERAND_INVALID, Operand.R10)


def ignored_tdinfo(attributes: int) -> int:
    """Return the `tdreport.IGNORE_*` bits of a SERVTD_ATTR."""
    return attributes >> _ATTR_IGNORE_SHIFT


def make_handle(servtd_uuid: list[int], target_tdr: int, slot: int) -> int:
    """Return the binding handle: the target's TDR and the slot, offset by the service TD's UUID."""
    return (target_tdr | slot) + servtd_uuid[0] & _U64


def break_handle(handle: int, servtd_uuid: list[int]) -> tuple[int, int]:
    """Return (HPA of the target's TDR, slot) of a handle that a service TD with this UUID was given."""
    plain = handle - servtd_uuid[0] & _U64
    return plain & _TDR_MASK, plain & _SLOT_MASK


def guest_lock_tdr(module: TdxModule, hpa: int) -> Tdr:
    """Lock the TDR of another TD shared, as a guest: it yields to a host that waits, and never makes it yield."""
    pamt = module.pamt
    block = None if hpa & pamt.hpa_mask else pamt.blocks.get(hpa >> 30)
    if block is not None:
        for index in (block[0], block[1] + (hpa >> 20 & 0x3FE), block[2] + (hpa >> 11 & 0x7FFFE)):
            word = module.q[index]
            if word & HOST_PRIORITY:
                raise LeafError(Status.OPERAND_BUSY_HOST_PRIORITY, Operand.TDR)
            if word & EXCLUSIVE:
                module.q[index] = word & ~0xFFFF | (word + HP_READER) & 0xFFFF  # the failed reader stays counted
                raise LeafError(Status.OPERAND_BUSY, Operand.TDR)
    pamt.lock(hpa, PageType.TDR, Operand.TDR, 0)
    return module.tdrs[hpa]
