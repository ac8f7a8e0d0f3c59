"""The guest's own page tables: linear address to host-physical address, through both levels of paging.

Source: Intel SDM Vol. 3, "Paging" and "The Extended Page Table Mechanism (EPT)". Protection keys, CET and
EPT accessed/dirty bits are not modelled; linear addresses are not checked to be canonical.
"""

from collections.abc import Callable
from typing import Final

from sim_backend.cpu.engine import SecondLevel
from sim_backend.hw.memory import PhysicalMemory

READ: Final = 1
WRITE: Final = 2
FETCH: Final = 4
"""Access kinds: the bits of an EPT entry's permissions and of an EPT-violation qualification."""

CR0_PE: Final = 1 << 0
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11

_P, _RW, _US, _A, _D, _PS = 1, 2, 4, 0x20, 0x40, 0x80
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_NX: Final = 1 << 63


class PageFault(Exception):  # noqa: N818 - the architecture's name
    """The guest's page tables forbid the access: #PF with `error_code`."""

    def __init__(self, error_code: int) -> None:
        super().__init__(f"#PF({error_code:#x})")
        self.error_code = error_code


class EptViolation(Exception):  # noqa: N818 - the architecture's name
    """The second level forbids the access; `qualification` in VMX format, GLA-valid set by who knows it."""

    def __init__(self, gpa: int, access: int, entry: int, *, page_walk: bool) -> None:
        super().__init__(f"EPT violation at GPA {gpa:#x}")
        self.gpa = gpa
        self.entry = entry
        self.qualification = access | (entry & 7) << 3 | (0x80 if page_walk else 0x180)


class Paging:
    """Both levels of paging of one virtual CPU. `configure` after each change of a control register."""

    __slots__ = (
        "_levels",
        "_nxe",
        "_q",
        "_ram_bytes",
        "_read",
        "_smap",
        "_smep",
        "_top_shift",
        "_wp",
        "_write",
        "cr3",
        "ept",
        "second_level",
        "walk_linear",
    )

    def __init__(self, memory: PhysicalMemory, second_level: SecondLevel) -> None:
        self._q = memory.q
        self._ram_bytes = memory.ram_bytes
        self._read = memory.read
        self._write = memory.write
        self.second_level = second_level
        self.ept: dict[int, int] = {}  # GFN to leaf entry: what a TLB may keep until INVEPT
        self.cr3 = 0
        self._wp = self._nxe = self._smep = self._smap = False
        self._levels = 0
        self._top_shift = 0
        self.walk_linear: Callable[[int, int, bool, bool], int] = self._identity

    def configure(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Take over the registers that decide how linear addresses translate."""
        self.cr3 = cr3
        self._wp = bool(cr0 & CR0_WP)
        self._nxe = bool(efer & EFER_NXE)
        self._smep = bool(cr4 & CR4_SMEP)
        self._smap = bool(cr4 & CR4_SMAP)
        if not cr0 & CR0_PG:
            self.walk_linear = self._identity
        elif efer & EFER_LMA:
            self._levels = 5 if cr4 & CR4_LA57 else 4
            self._top_shift = 48 if cr4 & CR4_LA57 else 39
            self.walk_linear = self._walk_64bit_entries
        elif cr4 & CR4_PAE:
            self._top_shift = 30
            self.walk_linear = self._walk_64bit_entries
        else:
            self.walk_linear = self._walk_32bit_pse if cr4 & CR4_PSE else self._walk_32bit

    def guest_page(self, gpa: int, access: int, *, page_walk: bool = False) -> int:
        """Return the HPA of `gpa`'s 4 KiB page for `access`; raise `EptViolation`."""
        entry = self.ept.get(gpa >> 12)
        if entry is None:
            entry = self.second_level.walk(gpa & ~0xFFF)
            if entry & 7:
                self.ept[gpa >> 12] = entry
        if access & ~entry & 7:
            entry = self._walk_again(gpa, access, page_walk=page_walk)
        return entry & _ADDRESS

    def _walk_again(self, gpa: int, access: int, *, page_walk: bool) -> int:
        """Return the entry of `gpa` as it is now: what is cached may have gained permissions since."""
        entry = self.second_level.walk(gpa & ~0xFFF)
        if access & ~entry & 7:
            raise EptViolation(gpa, access, entry, page_walk=page_walk)
        self.ept[gpa >> 12] = entry
        return entry

    def translate(self, gla: int, access: int, user: bool, smap_off: bool) -> int:
        """Return HPA and permissions (bits 2:0) of the page of `gla`; raise `PageFault` or `EptViolation`.

        Sets accessed and dirty bits. Write permission is granted only on a page already dirty, so that the
        first write sets the bit. `smap_off` is RFLAGS.AC.
        """
        guest = self.walk_linear(gla, access, user, smap_off)
        gfn = guest >> 12
        entry = self.ept.get(gfn)
        if entry is None:
            entry = self.second_level.walk(guest & ~0xFFF)
            if entry & 7:
                self.ept[gfn] = entry
        if access & ~entry & 7:
            entry = self._walk_again(guest & ~0xFFF, access, page_walk=False)
        return (entry & _ADDRESS) | (guest & entry & 7)

    def _identity(self, gla: int, access: int, user: bool, smap_off: bool) -> int:  # noqa: ARG002
        return (gla & 0xFFFF_F000) | 7

    def _load(self, gpa: int) -> int:
        """Read the 64-bit paging-structure entry at `gpa`."""
        entry = self.ept.get(gpa >> 12)
        if entry is None or not entry & 1:
            hpa = self.guest_page(gpa, READ, page_walk=True)
        else:
            hpa = entry & _ADDRESS
        hpa |= gpa & 0xFF8
        if hpa < self._ram_bytes:
            return self._q[hpa >> 3]
        return int.from_bytes(self._read(hpa, 8), "little")

    def _set_bits(self, gpa: int, bits: int, size: int) -> None:
        """Set accessed or dirty bits in the paging-structure entry at `gpa`."""
        hpa = self.guest_page(gpa, READ | WRITE, page_walk=True) | (gpa & 0xFFF)
        value = int.from_bytes(self._read(hpa, size), "little") | bits
        self._write(hpa, value.to_bytes(size, "little"))

    def _walk_64bit_entries(self, gla: int, access: int, user: bool, smap_off: bool) -> int:
        """4-level, 5-level and PAE paging: entries of 64 bits. Return the GPA page and permissions."""
        shift = self._top_shift
        if shift == 30:  # PAE: four PDPTEs, 32-byte aligned, without permissions
            address = (self.cr3 & 0xFFFF_FFE0) | (gla >> 27 & 0x18)
            entry = self._load(address)
            if not entry & _P:
                raise PageFault(self._error(0, access, user))
            shift = 21
            address = (entry & _ADDRESS) | (gla >> 18 & 0xFF8)
        else:
            address = (self.cr3 & _ADDRESS) | (gla >> shift << 3 & 0xFF8)
        allowed = _RW | _US
        no_execute = 0
        while True:
            entry = self._load(address)
            if not entry & _P:
                raise PageFault(self._error(0, access, user))
            allowed &= entry
            no_execute |= entry
            if no_execute & _NX and not self._nxe:
                raise PageFault(self._error(_P | 8, access, user))
            if shift == 12 or (entry & _PS and shift <= 30):
                break
            if entry & _PS:
                raise PageFault(self._error(_P | 8, access, user))
            if not entry & _A:
                self._set_bits(address, _A, 8)
            shift -= 9
            address = (entry & _ADDRESS) | (gla >> shift << 3 & 0xFF8)
        rights = self._rights(allowed, bool(no_execute & _NX), access, user, smap_off)
        if shift == 12:
            page = entry & _ADDRESS
        else:
            mask = (1 << shift) - 1
            if entry & _ADDRESS & mask & ~0x1000:
                raise PageFault(self._error(_P | 8, access, user))
            page = (entry & _ADDRESS & ~mask) | (gla & mask & ~0xFFF)
        return page | self._finish(address, entry, rights, access, 8)

    def _walk_32bit(self, gla: int, access: int, user: bool, smap_off: bool) -> int:
        return self._walk_32bit_entries(gla, access, user, smap_off, pse=False)

    def _walk_32bit_pse(self, gla: int, access: int, user: bool, smap_off: bool) -> int:
        return self._walk_32bit_entries(gla, access, user, smap_off, pse=True)

    def _walk_32bit_entries(self, gla: int, access: int, user: bool, smap_off: bool, *, pse: bool) -> int:
        """32-bit paging: two levels, entries of 32 bits, 4 MiB pages with PSE-36."""
        address = (self.cr3 & 0xFFFF_F000) | (gla >> 20 & 0xFFC)
        entry = self._load(address) >> (address << 3 & 32) & 0xFFFF_FFFF
        if not entry & _P:
            raise PageFault(self._error(0, access, user))
        allowed = entry & (_RW | _US)
        if pse and entry & _PS:
            if entry & 1 << 21:
                raise PageFault(self._error(_P | 8, access, user))
            page = (entry & 0xFFC0_0000) | (entry & 0x1F_E000) << 19 | (gla & 0x3F_F000)
        else:
            if not entry & _A:
                self._set_bits(address, _A, 4)
            address = (entry & 0xFFFF_F000) | (gla >> 10 & 0xFFC)
            entry = self._load(address) >> (address << 3 & 32) & 0xFFFF_FFFF
            if not entry & _P:
                raise PageFault(self._error(0, access, user))
            allowed &= entry
            page = entry & 0xFFFF_F000
        rights = self._rights(allowed, no_execute=False, access=access, user=user, smap_off=smap_off)
        return page | self._finish(address, entry, rights, access, 4)

    def _rights(self, allowed: int, no_execute: bool, access: int, user: bool, smap_off: bool) -> int:
        """Combine the permissions of all levels; raise `PageFault` when they forbid `access`."""
        if user:
            if not allowed & _US:
                raise PageFault(self._error(_P, access, user))
            rights = READ | (allowed & _RW) | (0 if no_execute else FETCH)
        else:
            rights = READ | (allowed & _RW if self._wp else WRITE) | (0 if no_execute else FETCH)
            if allowed & _US:
                if self._smep:
                    rights &= ~FETCH
                if self._smap and not smap_off:
                    rights &= FETCH
        if access & ~rights:
            raise PageFault(self._error(_P, access, user))
        return rights

    def _finish(self, address: int, entry: int, rights: int, access: int, size: int) -> int:
        """Set the leaf's accessed and dirty bits; withhold write permission from a clean page."""
        wanted = _A | _D if access & WRITE else _A
        if wanted & ~entry:
            self._set_bits(address, wanted, size)
        elif entry & _D:
            return rights
        return rights if access & WRITE else rights & ~WRITE

    def _error(self, code: int, access: int, user: bool) -> int:
        if access & WRITE:
            code |= 2
        if user:
            code |= 4
        if access & FETCH and (self._nxe or self._smep):
            code |= 16
        return code
