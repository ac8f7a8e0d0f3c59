"""A guest payload: the bytes that a VM starts from, loaded from the committed build.

Each payload is ``payloads/NAME.S`` with its build beside it: ``NAME.bin``, and ``NAME.json`` with the
symbols and the digests that tie the three together.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Self

from tdxhw.guest.layout import IMAGE_BYTES, IMAGE_GPA, PARAMETERS_GPA, RESET_VECTOR

PAYLOAD_DIRECTORY: Final = Path(__file__).parent / "payloads"


class PayloadError(Exception):
    """A payload is unknown, cut off, or not what was built."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A guest image, ready to be copied into guest memory."""

    name: str
    image: bytes
    gpa: int  # where the image goes [bytes, 4 KiB-aligned]
    entry: int  # address of the first instruction [bytes]
    symbols: Mapping[str, int]  # guest-virtual addresses, equal to GPAs [bytes]

    @classmethod
    def load(cls, name: str, directory: Path = PAYLOAD_DIRECTORY) -> Self:
        """Load the committed build of payload `name`; raise `PayloadError`."""
        try:
            description = json.loads((directory / f"{name}.json").read_text("ascii"))
            image = (directory / f"{name}.bin").read_bytes()
        except FileNotFoundError:
            raise PayloadError(f"no payload named {name!r}; there are: {', '.join(names(directory))}") from None
        except (OSError, ValueError) as error:
            raise PayloadError(f"payload {name}: {error}") from error
        try:
            symbols = {symbol: int(address, 16) for symbol, address in description["symbols"].items()}
            size, digest = description["image_bytes"], description["image_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PayloadError(f"payload {name}: {name}.json is damaged: {error!r}") from error
        if len(image) != size or size != IMAGE_BYTES:
            raise PayloadError(f"payload {name}: {name}.bin is {len(image)} bytes, not {IMAGE_BYTES}: truncated?")
        if hashlib.sha256(image).hexdigest() != digest:
            raise PayloadError(f"payload {name}: {name}.bin is not what {name}.json describes: damaged?")
        return cls(name, image, IMAGE_GPA, RESET_VECTOR, symbols)

    def with_parameters(self, parameters: bytes) -> Self:
        """Return a copy whose parameter page begins with `parameters`; they become part of the measurement."""
        if len(parameters) > 4096:
            raise PayloadError(f"payload {self.name}: {len(parameters)} bytes do not fit the parameter page")
        return self.patched(PARAMETERS_GPA, parameters)

    def patched(self, gpa: int, data: bytes) -> Self:
        """Return a copy with `data` at `gpa`; raise `PayloadError` outside the image."""
        offset = gpa - self.gpa
        if not 0 <= offset <= len(self.image) - len(data):
            raise PayloadError(f"payload {self.name}: {gpa:#x} is outside the image")
        image = self.image[:offset] + data + self.image[offset + len(data) :]
        return type(self)(self.name, image, self.gpa, self.entry, self.symbols)


def names(directory: Path = PAYLOAD_DIRECTORY) -> list[str]:
    """Return the names of all payloads with a committed build."""
    return sorted(path.stem for path in directory.glob("*.json"))


@cache
def load(name: str) -> Payload:
    """Load a payload once for the whole process; raise `PayloadError`."""
    return Payload.load(name)
