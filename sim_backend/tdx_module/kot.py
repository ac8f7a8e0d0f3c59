"""Key Ownership Table: which TD a private HKID belongs to, and how far its release has got."""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from sim_backend.tdx_module.locks import SharexLock
from uapi_ctypes.tdx_leaves import SeamcallLeaf

_H = SeamcallLeaf


class HkidState(IntEnum):
    """KOT entry state."""

    FREE = 0
    ASSIGNED = 1
    FLUSHED = 2
    RESERVED = 3


_K = HkidState

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from         leaf                       to
    (_K.FREE,      _H.TDH_SYS_CONFIG):      _K.RESERVED,  # the module's own HKID; never given back
    (_K.FREE,      _H.TDH_MNG_CREATE):      _K.ASSIGNED,
    (_K.ASSIGNED,  _H.TDH_MNG_VPFLUSHDONE): _K.FLUSHED,
    (_K.FLUSHED,   _H.TDH_MNG_KEY_FREEID):  _K.FREE,
})
# fmt: on


class KeyOwnershipTable:
    """`state[hkid]`, and per package whether its caches still have to be written back."""

    __slots__ = ("lock", "state", "wbinvd_bitmap")

    def __init__(self, hkids: int) -> None:
        """All of the KeyIDs 0 .. `hkids` - 1 start free; shared ones are never looked at."""
        self.lock = SharexLock()
        self.state: list[int] = [HkidState.FREE] * hkids
        self.wbinvd_bitmap = [0] * hkids  # bit n: TDH.PHYMEM.CACHE.WB is still due on package n
