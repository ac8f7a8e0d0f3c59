"""Guest memory as user space sees it: slots, their host mapping, and who may read them."""

from dataclasses import dataclass

from uapi_ctypes.guest_memfd import GuestMemfd
from uapi_ctypes.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE, KvmMemFlag
from uapi_ctypes.mapping import Mapping, anonymous
from uapi_ctypes.units import PAGE_SIZE
from uapi_ctypes.vm import Vm


@dataclass(frozen=True, slots=True)
class Slot:
    """One memslot: shared memory of this process, and where it has any, the private half."""

    number: int
    gpa: int
    """[bytes, 4 KiB-aligned]."""
    size: int
    """[bytes, 4 KiB-aligned]."""
    shared: Mapping
    """What the guest sees at a shared GPA. Private contents are never here."""
    guest_memfd: GuestMemfd | None

    def __contains__(self, gpa: int) -> bool:
        return self.gpa <= gpa < self.gpa + self.size


class GuestMemory:
    """The memslots of one VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.slots: list[Slot] = []

    def add(self, gpa: int, size: int, *, private: bool) -> Slot:
        """Add a slot; with `private` one backed by a guest_memfd beside the shared memory.

        The attribute of a new slot is shared: convert with `set_private`. Raise `KvmError`.
        """
        number = len(self.slots)
        shared = anonymous(size)
        try:
            guest_memfd = self._vm.create_guest_memfd(size) if private else None
            if guest_memfd is not None:
                self._vm.set_user_memory_region2(
                    number, gpa, size, shared.address, KvmMemFlag.KVM_MEM_GUEST_MEMFD, guest_memfd=guest_memfd.fd
                )
            else:
                self._vm.set_user_memory_region(number, gpa, size, shared.address)
        except BaseException:
            shared.close()
            raise
        slot = Slot(number, gpa, size, shared, guest_memfd)
        self.slots.append(slot)
        return slot

    def find(self, gpa: int) -> Slot:
        """Return the slot that holds `gpa`. Raise ``LookupError`` when none does."""
        for slot in self.slots:
            if gpa in slot:
                return slot
        raise LookupError(f"no memslot holds GPA {gpa:#x}")

    def set_private(self, gpa: int, size: int, *, private: bool) -> None:
        """Set the memory attribute. What the pages held is lost in both directions."""
        self._vm.set_memory_attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)

    def read(self, gpa: int, size: int) -> bytes:
        """Return shared memory, as the host sees it."""
        slot = self.find(gpa)
        start = gpa - slot.gpa
        return bytes(slot.shared.memory[start : start + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write shared memory, as the host does it."""
        slot = self.find(gpa)
        start = gpa - slot.gpa
        slot.shared.memory[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap the shared halves. The VM must be closed before."""
        for slot in self.slots:
            slot.shared.close()
        self.slots.clear()


def pages(data: bytes) -> bytes:
    """Return `data` padded with zeros to whole pages."""
    return data + bytes(-len(data) % PAGE_SIZE)
