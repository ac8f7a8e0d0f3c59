"""How far the module's initialisation has got."""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from uapi_ctypes.tdx_leaves import SeamcallLeaf

_H = SeamcallLeaf


class SysState(IntEnum):
    """PL.SYS_STATE."""

    SYSINIT_PENDING = 0
    SYSINIT_DONE = 1
    SYSCONFIG_DONE = 2
    SYS_READY = 3
    SYS_SHUTDOWN = 4


_S = SysState

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from              leaf                     to
    (_S.SYSINIT_PENDING, _H.TDH_SYS_INIT):       _S.SYSINIT_DONE,
    (_S.SYSINIT_DONE,    _H.TDH_SYS_CONFIG):     _S.SYSCONFIG_DONE,
    (_S.SYSCONFIG_DONE,  _H.TDH_SYS_KEY_CONFIG): _S.SYS_READY,  # on the last package
    (_S.SYS_READY,       _H.TDH_SYS_SHUTDOWN):   _S.SYS_SHUTDOWN,
})
# fmt: on
