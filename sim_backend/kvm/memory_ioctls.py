"""Memory ioctls of a VM fd: slots, guest_memfd, attributes, dirty log (`virt/kvm/kvm_main.c`)."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.files import Files
from sim_backend.kvm.guest_memfd import GuestMemfd
from sim_backend.kvm.memslots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    Memslot,
)
from uapi_ctypes.caps import KvmCap

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_REGION: Final = struct.Struct("<IIQQQ")
_REGION2: Final = struct.Struct("<IIQQQQI116x")
_GUEST_MEMFD: Final = struct.Struct("<QQ48x")
_ATTRIBUTES: Final = struct.Struct("<4Q")
_DIRTY_LOG: Final = struct.Struct("<IIQ")
_CLEAR_DIRTY_LOG: Final = struct.Struct("<IIQQ")  # slot num_pages first_page bitmap
USER_MEM_SLOTS: Final = 32764
MAX_NR_PAGES: Final = (1 << 31) - 1
_U64: Final = (1 << 64) - 1
_TASK_SIZE: Final = (1 << 47) - 4096


class MemoryIoctls:
    """The memory ioctls of one VM."""

    def __init__(self, vm: "Vm", files: Files) -> None:
        self._vm: Final = vm
        self._files: Final = files
        profile = vm.host.profile
        answers = {**profile.capabilities, **profile.vm_capabilities.get(vm.type, {})}
        self._gmem_flags: Final = answers.get(KvmCap.KVM_CAP_GUEST_MEMFD_FLAGS, 0)
        self._has_gmem: Final = bool(answers.get(KvmCap.KVM_CAP_GUEST_MEMFD, 0))
        self._has_readonly: Final = bool(answers.get(KvmCap.KVM_CAP_READONLY_MEM, 0))
        self._bound_errno: Final = errno.EINVAL if profile.behaves("gmem_bound_is_einval") else errno.EEXIST
        self._bound_before_limit: Final = profile.behaves("gmem_bound_before_limit")

    # ---- slots ------------------------------------------------------------------------------------------

    def set_user_memory_region(self, argp: int) -> int:
        """KVM_SET_USER_MEMORY_REGION: the older structure, without guest_memfd."""
        slot, flags, gpa, size, hva = _REGION.unpack(self._vm.mm.read(argp, 32))
        if flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise Errno(errno.EINVAL)
        self._set_region(slot, flags, gpa, size, hva, 0, 0)
        return 0

    def set_user_memory_region2(self, argp: int) -> int:
        """KVM_SET_USER_MEMORY_REGION2."""
        self._set_region(*_REGION2.unpack(self._vm.mm.read(argp, 160)))
        return 0

    def _set_region(self, slot: int, flags: int, gpa: int, size: int, hva: int, gmem_offset: int, gmem_fd: int) -> None:
        vm = self._vm
        slot_id, as_id = slot & 0xFFFF, slot >> 16
        if slot_id >= USER_MEM_SLOTS:
            raise Errno(errno.EINVAL)
        with vm.slots_lock:
            self._check_flags(flags)
            if (size | gpa | hva) & 0xFFF or hva + size > _TASK_SIZE or hva > _TASK_SIZE:
                raise Errno(errno.EINVAL)
            if flags & KVM_MEM_GUEST_MEMFD and (gmem_offset & 0xFFF or gmem_offset + size > _U64):
                raise Errno(errno.EINVAL)
            if as_id >= len(vm.memslots) or gpa + size > _U64 or size >> 12 > MAX_NR_PAGES:
                raise Errno(errno.EINVAL)
            slots = vm.memslots[as_id]
            old = slots.by_id.get(slot_id)
            if not size:
                if old is None:
                    raise Errno(errno.EINVAL)
                self._delete(as_id, old)
                return
            base_gfn, npages = gpa >> 12, size >> 12
            if old is not None:
                if flags & KVM_MEM_GUEST_MEMFD or old.flags & KVM_MEM_GUEST_MEMFD:
                    raise Errno(errno.EINVAL)
                if hva != old.userspace_addr or npages != old.npages:
                    raise Errno(errno.EINVAL)
                if (flags ^ old.flags) & KVM_MEM_READONLY:
                    raise Errno(errno.EINVAL)
                if base_gfn == old.base_gfn and flags == old.flags:
                    return
            if (old is None or base_gfn != old.base_gfn) and slots.overlaps(base_gfn, npages, slot_id):
                raise Errno(errno.EEXIST)
            new = Memslot(as_id, slot_id, base_gfn, npages, hva, flags, vm.mm)
            gmem = self._find_gmem(gmem_fd, gmem_offset, size) if flags & KVM_MEM_GUEST_MEMFD else None
            bound = gmem is not None and self._is_bound(gmem, gmem_offset >> 12, npages)
            if bound and self._bound_before_limit:
                raise Errno(self._bound_errno)
            vm.check_gfn_limit(base_gfn, npages)
            vm.ops.check_memslot(base_gfn, npages)
            if bound:
                raise Errno(self._bound_errno)

            # ---- Every check passed: from here on the call cannot fail. ----

            if gmem is not None:
                new.bind(gmem, gmem_offset >> 12)
            if flags & KVM_MEM_LOG_DIRTY_PAGES and not vm.dirty_ring_bytes:
                if old is not None and old.dirty_bitmap is not None:
                    new.dirty_bitmap = old.dirty_bitmap
                else:
                    new.dirty_bitmap = bytearray((npages + 63) // 64 * 8)
                    if vm.manual_dirty_log_protect & 2:
                        _fill(new.dirty_bitmap, npages)
            if old is None:
                vm.has_mmu_pages = True
                slots.insert(new)
                self._drop_mmio_markers(new)
            elif base_gfn != old.base_gfn:
                slots.remove(slot_id)
                vm.ops.memslot_removed(old)
                self._forget_window(old)
                slots.insert(new)
                self._drop_mmio_markers(new)
            else:
                new.window = old.window
                slots.insert(new)
                vm.ops.memslot_changed(new)

    def _check_flags(self, flags: int) -> None:
        valid = KVM_MEM_LOG_DIRTY_PAGES
        if self._has_gmem:
            valid |= KVM_MEM_GUEST_MEMFD
        if flags & KVM_MEM_GUEST_MEMFD:
            valid &= ~KVM_MEM_LOG_DIRTY_PAGES
        elif self._has_readonly:
            valid |= KVM_MEM_READONLY
        if flags & ~valid:
            raise Errno(errno.EINVAL)

    def _find_gmem(self, fd: int, offset: int, size: int) -> GuestMemfd:
        gmem = self._files.object_of(fd - (1 << 32) if fd >> 31 else fd)
        if not isinstance(gmem, GuestMemfd) or gmem.vm is not self._vm:
            raise Errno(errno.EINVAL)
        if offset + size > gmem.size:
            raise Errno(errno.EINVAL)
        return gmem

    @staticmethod
    def _is_bound(gmem: GuestMemfd, start: int, npages: int) -> bool:
        return any(slot.gmem_pgoff < start + npages and start < slot.gmem_pgoff + slot.npages for slot in gmem.bindings)

    def _delete(self, as_id: int, old: Memslot) -> None:
        vm = self._vm
        vm.has_mmu_pages = True
        vm.memslots[as_id].remove(old.id)
        vm.ops.memslot_removed(old)
        if old.gmem is not None:
            old.gmem.bindings.remove(old)
            old.gmem = None
        self._forget_window(old)

    def _drop_mmio_markers(self, slot: Memslot) -> None:
        """Forget that the frames of a new slot were MMIO."""
        self._vm.ops.zap_gfn_range(slot.base_gfn, slot.base_gfn + slot.npages, private=False, shared=True)

    def _forget_window(self, slot: Memslot) -> None:
        if slot.window is not None:
            self._vm.host.memory.remove_window(slot.window)
            slot.window = None

    # ---- guest_memfd ------------------------------------------------------------------------------------

    def create_guest_memfd(self, argp: int) -> int:
        """KVM_CREATE_GUEST_MEMFD: the fd has no close-on-exec flag."""
        vm = self._vm
        if not self._has_gmem:
            raise Errno(errno.EINVAL)
        size, flags = _GUEST_MEMFD.unpack(vm.mm.read(argp, 64))
        if flags & ~self._gmem_flags:
            raise Errno(errno.EINVAL)
        if size == 0 or size >> 63 or size & 0xFFF:
            raise Errno(errno.EINVAL)
        gmem = GuestMemfd(vm, size, flags)
        vm.get()
        return self._files.add_file(gmem.fd, "kvm-gmem", CallTable({}, errno.ENOTTY), gmem, gmem.release)

    # ---- attributes -------------------------------------------------------------------------------------

    def set_memory_attributes(self, argp: int) -> int:
        """KVM_SET_MEMORY_ATTRIBUTES: shared or private, with or without a slot there."""
        vm = self._vm
        address, size, attributes, flags = _ATTRIBUTES.unpack(vm.mm.read(argp, 32))
        supported = KVM_MEMORY_ATTRIBUTE_PRIVATE if vm.ops.has_private_mem else 0
        if flags or attributes & ~supported:
            raise Errno(errno.EINVAL)
        if not size or address + size > _U64 or (address | size) & 0xFFF:
            raise Errno(errno.EINVAL)
        start, end = address >> 12, (address + size) >> 12
        private = bool(attributes)
        with vm.slots_lock:
            if vm.attributes.range_is(start, end, private):
                return 0
            vm.ops.zap_gfn_range(start, end, private=not private, shared=private)
            vm.attributes.set_range(start, end, private)
            # A fault may have mapped the old kind between the two.
            vm.ops.zap_gfn_range(start, end, private=not private, shared=private)
        return 0

    # ---- dirty log --------------------------------------------------------------------------------------

    def get_dirty_log(self, argp: int) -> int:
        """KVM_GET_DIRTY_LOG."""
        vm = self._vm
        slot, _pad, pointer = _DIRTY_LOG.unpack(vm.mm.read(argp, 16))
        with vm.slots_lock:
            memslot, bitmap = self._dirty_slot(slot)
            snapshot = bytes(bitmap)
            if not vm.manual_dirty_log_protect:
                bitmap[:] = bytes(len(bitmap))
                vm.ops.memslot_changed(memslot)
            vm.mm.write(pointer, snapshot)
        return 0

    def clear_dirty_log(self, argp: int) -> int:
        """KVM_CLEAR_DIRTY_LOG."""
        vm = self._vm
        slot, num_pages, first_page, pointer = _CLEAR_DIRTY_LOG.unpack(vm.mm.read(argp, 24))
        with vm.slots_lock:
            slot_id, as_id = slot & 0xFFFF, slot >> 16
            if as_id >= len(vm.memslots) or slot_id >= USER_MEM_SLOTS or first_page & 63:
                raise Errno(errno.EINVAL)
            memslot, bitmap = self._dirty_slot(slot)
            if first_page > memslot.npages or num_pages > memslot.npages - first_page:
                raise Errno(errno.EINVAL)
            if num_pages < memslot.npages - first_page and num_pages & 63:
                raise Errno(errno.EINVAL)
            data = vm.mm.read(pointer, (num_pages + 63) // 64 * 8)
            start = first_page >> 3
            for index, byte in enumerate(data):
                bitmap[start + index] &= ~byte & 0xFF
            vm.ops.memslot_changed(memslot)
        return 0

    def _dirty_slot(self, slot: int) -> tuple[Memslot, bytearray]:
        vm = self._vm
        if vm.dirty_ring_bytes:
            raise Errno(errno.ENXIO)
        slot_id, as_id = slot & 0xFFFF, slot >> 16
        if as_id >= len(vm.memslots) or slot_id >= USER_MEM_SLOTS:
            raise Errno(errno.EINVAL)
        memslot = vm.memslots[as_id].by_id.get(slot_id)
        if memslot is None or memslot.dirty_bitmap is None:
            raise Errno(errno.ENOENT)
        return memslot, memslot.dirty_bitmap

    def reset_dirty_rings(self, _arg: int) -> int:
        """KVM_RESET_DIRTY_RINGS: nothing was harvested, so nothing is reset."""
        if not self._vm.dirty_ring_bytes:
            raise Errno(errno.EINVAL)
        return 0


def _fill(bitmap: bytearray, npages: int) -> None:
    bitmap[: npages >> 3] = b"\xff" * (npages >> 3)
    if npages & 7:
        bitmap[npages >> 3] = (1 << (npages & 7)) - 1
