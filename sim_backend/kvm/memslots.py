"""Memory slots: which guest frames are backed by what (``struct kvm_memory_slot``)."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.hw.memory import PhysicalMemory, Window
    from sim_backend.kvm.address_space import AddressSpace
    from sim_backend.kvm.guest_memfd import GuestMemfd

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
_GUEST_MEMFD_FLAG_MMAP: Final = 1


class Memslot:
    """One slot of one address space. Replaced, not changed, when it is moved or its flags change."""

    __slots__ = (
        "_gmem_only",
        "as_id",
        "base_gfn",
        "dirty_bitmap",
        "flags",
        "gmem",
        "gmem_pgoff",
        "id",
        "mm",
        "npages",
        "userspace_addr",
        "window",
    )

    def __init__(
        self,
        as_id: int,
        slot_id: int,
        base_gfn: int,
        npages: int,
        userspace_addr: int,
        flags: int,
        mm: "AddressSpace",
    ) -> None:
        self.as_id = as_id
        self.id = slot_id
        self.base_gfn = base_gfn
        self.npages = npages  # [4 KiB pages]
        self.userspace_addr = userspace_addr  # HVA [bytes, 4 KiB-aligned]
        self.flags = flags
        self.mm = mm
        self.gmem: GuestMemfd | None = None  # no reference: cleared when the file goes away
        self.gmem_pgoff = 0  # [4 KiB pages] file offset of the slot's first page
        self._gmem_only = False
        self.dirty_bitmap: bytearray | None = None
        self.window: Window | None = None  # HPAs that stand for the slot's user memory

    def hva(self, gfn: int) -> int:
        """Return the HVA of `gfn`."""
        return self.userspace_addr + ((gfn - self.base_gfn) << 12)

    def gmem_index(self, gfn: int) -> int:
        """Return the page index of `gfn` in the slot's guest_memfd."""
        return gfn - self.base_gfn + self.gmem_pgoff

    def is_gmem_only(self) -> bool:
        """Tell whether shared faults come from the guest_memfd too, as it can be mapped (KVM_MEMSLOT_GMEM_ONLY)."""
        return self._gmem_only

    def bind(self, gmem: "GuestMemfd", pgoff: int) -> None:
        """Take private memory from `gmem`, from page `pgoff` on (`kvm_gmem_bind`)."""
        self.gmem, self.gmem_pgoff = gmem, pgoff
        self._gmem_only = bool(gmem.flags & _GUEST_MEMFD_FLAG_MMAP)
        gmem.bindings.append(self)

    def user_hpa(self, memory: "PhysicalMemory", gfn: int) -> int:
        """Return the HPA that stands for the user page behind `gfn`; the caller has faulted it in."""
        window = self.window
        if window is None:
            base, length = self.userspace_addr, self.npages << 12
            read, write = self.mm.read, self.mm.write

            def read_window(offset: int, size: int) -> bytes:
                return read(base + offset, size)

            def write_window(offset: int, data: bytes) -> None:
                write(base + offset, data)

            window = memory.add_window(length, self.mm.pointer(base, length), read_window, write_window)
            self.window = window
        return window.base + ((gfn - self.base_gfn) << 12)

    def mark_dirty(self, gfn: int) -> None:
        """Record a write to `gfn` when the slot logs them."""
        bitmap = self.dirty_bitmap
        if bitmap is not None:
            offset = gfn - self.base_gfn
            bitmap[offset >> 3] |= 1 << (offset & 7)


class Memslots:
    """The slots of one address space of a VM, by id and by frame. Changed under slots_lock only."""

    __slots__ = ("_index", "by_id", "generation")

    def __init__(self) -> None:
        self.by_id: dict[int, Memslot] = {}
        self.generation = 0  # rises with every change
        self._index: tuple[list[int], list[Memslot]] = ([], [])

    def find(self, gfn: int) -> Memslot | None:
        """Return the slot that holds `gfn`, or None."""
        bases, ordered = self._index
        index = bisect_right(bases, gfn) - 1
        if index < 0:
            return None
        slot = ordered[index]
        return slot if gfn < slot.base_gfn + slot.npages else None

    def overlaps(self, base_gfn: int, npages: int, except_id: int) -> bool:
        """Tell whether another slot shares a frame with the range."""
        end = base_gfn + npages
        return any(
            slot.base_gfn < end and base_gfn < slot.base_gfn + slot.npages
            for slot in self._index[1]
            if slot.id != except_id
        )

    def insert(self, slot: Memslot) -> None:
        """Add `slot`, replacing the one of the same id."""
        self.by_id[slot.id] = slot
        self._rebuild()

    def remove(self, slot_id: int) -> Memslot:
        """Take the slot out and return it."""
        slot = self.by_id.pop(slot_id)
        self._rebuild()
        return slot

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._index[1])

    def _rebuild(self) -> None:
        ordered = sorted(self.by_id.values(), key=lambda slot: slot.base_gfn)
        self.generation += 1
        # One assignment: a fault in another thread sees the old pair or the new one.
        self._index = ([slot.base_gfn for slot in ordered], ordered)
