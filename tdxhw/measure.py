"""Predict MRTD: the SHA-384 over every page that is added to a TD and every chunk that is measured.

Each TDH.MEM.PAGE.ADD contributes 128 bytes (its name and the GPA), each TDH.MR.EXTEND 128 bytes and the 256 bytes
that it measures (TDX Module Base Specification, "TD Measurement"). The order is the VMM's choice, and it
changes the result.
"""

import hashlib
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final

from tdxhw.tdvf import PAGE_SIZE, Section

CHUNK_SIZE: Final = 256
"""What one TDH.MR.EXTEND measures [bytes]."""
_PAGE_ADD: Final = b"MEM.PAGE.ADD".ljust(16, b"\0")
_EXTEND: Final = b"MR.EXTEND".ljust(16, b"\0")


class Order(Enum):
    """In which order pages are added and measured."""

    PAGE_BY_PAGE = "page-by-page"
    """Add a page, measure it, go on: KVM_TDX_INIT_MEM_REGION."""
    ADD_THEN_EXTEND = "add-then-extend"
    """Add a whole section, then measure it: VMMs on kernels where measuring is a call of its own."""


def steps(sections: Sequence[Section], order: Order) -> Iterator[tuple[int, bytes, bool]]:
    """Yield each step as GPA, page contents, and whether the step measures (else it adds)."""
    for section in sections:
        if not section.is_added:
            continue
        if order is Order.PAGE_BY_PAGE:
            for index in range(section.pages):
                gpa, page = section.gpa + index * PAGE_SIZE, section.page(index)
                yield gpa, page, False
                if section.is_measured:
                    yield gpa, page, True
            continue
        for measuring in (False, True) if section.is_measured else (False,):
            for index in range(section.pages):
                yield section.gpa + index * PAGE_SIZE, section.page(index), measuring


def mrtd(sections: Sequence[Section], order: Order = Order.PAGE_BY_PAGE) -> bytes:
    """Return MRTD, 48 bytes, by hashing alone."""
    digest = hashlib.sha384()
    for gpa, page, measuring in steps(sections, order):
        if not measuring:
            digest.update((_PAGE_ADD + gpa.to_bytes(8, "little")).ljust(128, b"\0"))
            continue
        for offset in range(0, PAGE_SIZE, CHUNK_SIZE):
            digest.update((_EXTEND + (gpa + offset).to_bytes(8, "little")).ljust(128, b"\0"))
            digest.update(page[offset : offset + CHUNK_SIZE])
    return digest.digest()
