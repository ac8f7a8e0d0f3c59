"""Multi-key memory encryption as software sees it: which KeyIDs there are, and what PCONFIG answers."""

from dataclasses import dataclass
from enum import IntEnum


class PconfigResult(IntEnum):
    """RAX after PCONFIG with the MKTME key-program leaf (Intel SDM Vol. 2, PCONFIG)."""

    SUCCESS = 0
    ENTROPY_ERROR = 2
    DEVICE_BUSY = 5


@dataclass(frozen=True, slots=True)
class KeyIds:
    """How the KeyID space is split between the host and TDX."""

    bits: int  # KeyID bits at the top of a physical address
    num_mktme: int  # shared KeyIDs besides 0: 1 .. num_mktme
    num_tdx: int  # private KeyIDs that follow
    maxpa: int = 52  # physical-address width, KeyID bits included [bits]

    @property
    def start_bit(self) -> int:
        """The lowest KeyID bit of a physical address; the bits below it address memory."""
        return self.maxpa - self.bits

    @property
    def first_private(self) -> int:
        """The lowest private KeyID."""
        return self.num_mktme + 1

    @property
    def last_private(self) -> int:
        """The highest private KeyID; below `first_private` when there is none."""
        return self.num_mktme + self.num_tdx

    def is_private(self, hkid: int) -> bool:
        """Tell whether `hkid` is one of TDX's."""
        return self.first_private <= hkid <= self.last_private
