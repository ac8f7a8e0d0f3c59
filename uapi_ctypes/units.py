"""Address types: passing one where another is wanted is a type error, not a wrong answer."""

from typing import Final, NewType

Gpa = NewType("Gpa", int)
"""Guest-physical address [bytes]."""
Hpa = NewType("Hpa", int)
"""Host-physical address [bytes], HKID bits clear."""
Hva = NewType("Hva", int)
"""Host-virtual address [bytes], what mmap() returns."""
Gva = NewType("Gva", int)
"""Guest-virtual address [bytes]."""
Gfn = NewType("Gfn", int)
"""Guest frame number [4 KiB pages], ``Gpa >> 12``."""
Pfn = NewType("Pfn", int)
"""Host frame number [4 KiB pages], ``Hpa >> 12``."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
"""[bytes]."""
