"""TDR: the root page of a TD, and its life-cycle state machine."""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from sim_backend.tdx_module.tdcs import Tdcs
from uapi_ctypes.tdx_leaves import SeamcallLeaf

_H = SeamcallLeaf


class LifecycleState(IntEnum):
    """TDR.LIFECYCLE_STATE."""

    HKID_ASSIGNED = 0
    KEYS_CONFIGURED = 1
    BLOCKED = 2
    TEARDOWN = 3


_L = LifecycleState

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from               leaf                       to
    (_L.HKID_ASSIGNED,   _H.TDH_MNG_KEY_CONFIG):  _L.KEYS_CONFIGURED,  # once every package has the key
    (_L.HKID_ASSIGNED,   _H.TDH_MNG_VPFLUSHDONE): _L.BLOCKED,
    (_L.KEYS_CONFIGURED, _H.TDH_MNG_VPFLUSHDONE): _L.BLOCKED,
    (_L.BLOCKED,         _H.TDH_MNG_KEY_FREEID):  _L.TEARDOWN,
})
"""TDH.MNG.CREATE makes a TDR in HKID_ASSIGNED; TDH.PHYMEM.PAGE.RECLAIM ends one in TEARDOWN."""
# fmt: on


class Tdr:
    """The fields of a TDR, named as in the metadata tables."""

    __slots__ = (
        "chldcnt",
        "fatal",
        "fields",
        "handoff_version",
        "hkid",
        "hpa",
        "lifecycle_state",
        "num_tdcx",
        "pkg_config_bitmap",
        "seamdb_index",
        "seamdb_nonce",
        "td_uuid",
        "tdcs",
        "tdcx_pa",
    )

    def __init__(self, hpa: int, hkid: int) -> None:
        self.hpa = hpa
        self.hkid = hkid
        self.fatal = False
        self.lifecycle_state: int = LifecycleState.HKID_ASSIGNED
        self.num_tdcx = 0
        self.chldcnt = 0  # [4 KiB pages]
        self.tdcx_pa: list[int] = []  # HPAs, `num_tdcx` of them
        self.td_uuid = [0, 0, 0, 0]
        self.pkg_config_bitmap = 0
        self.handoff_version = 0
        self.seamdb_index = 0
        self.seamdb_nonce = [0, 0, 0, 0]
        self.tdcs = Tdcs()
        self.fields: dict[int, int] = {}  # metadata field id -> value, for fields with no attribute
