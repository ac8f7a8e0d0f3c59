"""The state of TDH.PHYMEM.CACHE.WB on one package."""

from dataclasses import dataclass, field

from sim_backend.tdx_module.locks import SharexLock


@dataclass(slots=True)
class CacheWriteBack:
    """One package's entry of the write-back table."""

    lock: SharexLock = field(default_factory=SharexLock)
    interrupted_at: int = 0  # next block to write back; 0 when nothing was interrupted
    hkids: list[int] = field(default_factory=list)  # those that were flushed at the start
