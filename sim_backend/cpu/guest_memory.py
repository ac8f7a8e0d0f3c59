"""Memory as one virtual CPU on Unicorn sees it: two levels of paging, what TCG's TLB holds, and where code came from.

TCG keeps translations and translated code of its own, and asks again only where it has none. So whatever it was told
is noted here, to be forgotten when it is no longer true.
"""

import ctypes
from typing import TYPE_CHECKING, Final

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.engine import SecondLevel
from sim_backend.cpu.paging import FETCH, READ, WRITE, EptViolation, PageFault, Paging
from sim_backend.cpu.unicorn_instance import UnicornInstance
from sim_backend.cpu.user_pages import UserPages, page_is_usable

if TYPE_CHECKING:
    from sim_backend.cpu.unicorn_engine import UnicornEngine

_Q_CR2: Final = (u.ENV_CR >> 3) + 2
_Q_CR3: Final = (u.ENV_CR >> 3) + 3
_Q_EFLAGS: Final = u.ENV_EFLAGS >> 3
_RFLAGS_AC: Final = 1 << 18
_NO_WINDOW: Final = -1


class GuestMemory:
    """What a CPU needs of memory. `fault` and a missing window are what the last `fill_tlb` found in the way."""

    def __init__(self, engine: "UnicornEngine", instance: UnicornInstance, second_level: SecondLevel) -> None:
        self._engine = engine
        self._instance = instance
        self._memory = engine.memory
        self._ram_bytes = engine.memory.ram_bytes
        self._paging = Paging(engine.memory, second_level)
        self.fault: PageFault | EptViolation | None = None
        self._missing_window = _NO_WINDOW
        self._fetch_pages: dict[int, int] = {}  # linear page to HPA
        self._code_pages: set[int] = set()  # HPAs of pages that may have translated code
        self._user_pages = UserPages()
        self._user_code: dict[int, tuple[int, bytes]] = {}  # HPA of a code page in a window to its address and bytes

    # ---- What makes the translations ----

    @property
    def second_level(self) -> SecondLevel:
        """The EPT. Another one forgets every translation; not while the guest runs."""
        return self._paging.second_level

    @second_level.setter
    def second_level(self, second_level: SecondLevel) -> None:
        if second_level is not self._paging.second_level:
            self._paging.second_level = second_level
            self.invalidate()

    def configure(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Follow the control registers."""
        self._paging.configure(cr0, cr3, cr4, efer)
        self._flush_tlb()

    def invalidate(self) -> None:
        """Forget every cached second-level translation (INVEPT). Not while the guest runs."""
        paging = self._paging
        if paging.ept:
            paging.ept.clear()
            self._flush_tlb()

    def _flush_tlb(self) -> None:
        self._instance.flush_tlb()
        self._user_pages.clear()

    def invalidate_code(self, hpa: int, length: int) -> None:
        """Forget code translated from these host pages: somebody else wrote there."""
        pages = self._code_pages
        if pages and any(page in pages for page in range(hpa & ~0xFFF, hpa + length, 4096)):
            self._forget_code()

    def _forget_code(self) -> None:
        self._instance.flush_code()
        self._code_pages.clear()
        self._user_code.clear()
        # A page whose code is forgotten must pass through `fill_tlb` again to be noted again.
        self._flush_tlb()

    def revalidate(self) -> None:
        """Before a run: forget what user space has unmapped, or written to, since the last one without telling."""
        there = self._user_pages
        if there.pages and not there.all_there():
            self._flush_tlb()
        if self._user_code:
            for pointer, code in self._user_code.values():
                if pointer not in there or ctypes.string_at(pointer, 0x1000) != code:
                    self._forget_code()
                    return

    def close(self) -> None:
        """Forget everything; the instance is about to go."""
        self._paging.ept.clear()
        self._code_pages.clear()
        self._user_code.clear()

    # ---- What the TLB asks ----

    def fill_tlb(self, gla: int, kind: int, entry: int) -> bool:
        """Translate the page of `gla` into the `uc_tlb_entry` at address `entry`; False for a fault.

        Called from inside uc_emu_start.
        """
        try:
            access = FETCH if kind == u.UC_MEM_FETCH else WRITE if kind == u.UC_MEM_WRITE else READ
            paging = self._paging
            instance = self._instance
            quads = instance.quads
            paging.cr3 = quads[_Q_CR3]
            user = instance.hflags.value & 3 == 3
            page = paging.translate(gla, access, user, bool(quads[_Q_EFLAGS] & _RFLAGS_AC))
            hpa = page & ~0xFFF
            if hpa >= self._ram_bytes:
                if not self._window_ready(gla, hpa, access):
                    return False
                if access == READ:
                    page &= ~WRITE  # the first write asks again, whether the user may write
            if access == FETCH:
                self._note_code(gla, hpa)
                permissions = page & (READ | FETCH)
            else:
                permissions = page & (READ | WRITE)
            u.TLB_ENTRY.pack_into(u.TLB_ENTRY_BUFFER.from_address(entry), 0, hpa, permissions)
        except (PageFault, EptViolation) as fault:
            self.fault = fault
            return False
        return True

    def _window_ready(self, gla: int, hpa: int, access: int) -> bool:
        """Tell whether TCG may touch the window page at `hpa`; a page that is gone is an EPT violation."""
        pointer = self._engine.window_pointer(self._instance, hpa)
        if pointer is None:
            self._missing_window = hpa
            return False
        if not page_is_usable(pointer, access == WRITE):
            self._paging.ept.clear()
            gpa = self._paging.walk_linear(gla, READ, False, True) & ~0xFFF
            raise EptViolation(gpa, access, 1 << 63, page_walk=False)
        self._user_pages.add(pointer)
        return True

    def _note_code(self, gla: int, hpa: int) -> None:
        self._fetch_pages[gla] = hpa
        self._code_pages.add(hpa)
        if hpa >= self._ram_bytes and hpa not in self._user_code:
            pointer = self._engine.window_pointer(self._instance, hpa)
            if pointer is not None:
                self._user_code[hpa] = (pointer, ctypes.string_at(pointer, 0x1000))

    def map_missing_window(self) -> bool:
        """Map the window that the last `fill_tlb` missed. Tell whether it missed one."""
        hpa = self._missing_window
        if hpa == _NO_WINDOW:
            return False
        self._missing_window = _NO_WINDOW
        self._engine.map_backing(self._instance, hpa)
        return True

    def forget_fault(self) -> None:
        """Forget what was in the way: the run that met it is over."""
        self.fault = None
        self._missing_window = _NO_WINDOW

    # ---- The CPU's own accesses ----

    def read_linear(self, gla: int, length: int) -> bytes:
        """Read guest memory through both levels of paging, for diagnostics; raise ``LookupError``."""
        quads = self._instance.quads
        cr2 = quads[_Q_CR2]
        try:
            return self.read_supervisor(gla, length)
        except (PageFault, EptViolation, OSError, IndexError) as error:
            quads[_Q_CR2] = cr2
            raise LookupError(f"linear address {gla:#x}: {error}") from error

    def read_supervisor(self, gla: int, length: int) -> bytes:
        """Read as the CPU itself does; raise `PageFault` or `EptViolation`."""
        parts = []
        while length:
            part = min(length, 0x1000 - (gla & 0xFFF))
            parts.append(self._memory.read(self._translate(gla, READ), part))
            gla += part
            length -= part
        return b"".join(parts)

    def write_supervisor(self, gla: int, data: bytes) -> None:
        """Write as the CPU itself does, all or nothing; raise `PageFault` or `EptViolation`."""
        first = 0x1000 - (gla & 0xFFF)
        pieces = [(gla, data[:first])] + ([(gla + first, data[first:])] if len(data) > first else [])
        targets = [(self._translate(address, WRITE), piece) for address, piece in pieces]
        for hpa, piece in targets:
            self._memory.write(hpa, piece)
            self.invalidate_code(hpa, len(piece))

    def _translate(self, gla: int, access: int) -> int:
        """Translate a supervisor access; a #PF leaves its address in CR2."""
        paging = self._paging
        quads = self._instance.quads
        paging.cr3 = quads[_Q_CR3]
        try:
            hpa = paging.translate(gla, access, False, True) & ~0xFFF
        except PageFault:
            quads[_Q_CR2] = gla
            raise
        except EptViolation as violation:
            if violation.qualification & 0x100:
                violation.gpa = violation.gpa & ~0xFFF | gla & 0xFFF
            raise
        return hpa | (gla & 0xFFF)

    def code(self, linear: int, length: int) -> bytes:
        """Return `length` bytes of code that was fetched at `linear`: fewer where the next page was not."""
        offset = linear & 0xFFF
        hpa = self._fetch_pages.get(linear - offset)
        if hpa is None:
            return b""
        if offset + length <= 0x1000:
            if hpa < self._ram_bytes:
                return bytes(self._memory.b[hpa + offset : hpa + offset + length])
            return self._memory.read(hpa + offset, length)
        start = self._memory.read(hpa + offset, 0x1000 - offset)
        following = self._fetch_pages.get(linear - offset + 0x1000)
        if following is None:
            return start
        return start + self._memory.read(following, length - len(start))
