"""What has to happen: an independent, small model of the ioctls on TDs, in both dialects.

Written from the semantics of Linux 7.3, 7.2, 6.18, 6.16 and of the v17 series, knows nothing of `sim_backend`. Each
method says how the call ends (`attempt` in ioctl_vocabulary.py has the words) and takes note of what it changes.
``?`` is used where nobody knows.
"""

from dataclasses import dataclass, field

PAGE = 4096
IMAGE_GFN = 0xFFFF0
IMAGE_PAGES = 16
RESET_GFN = 0xFFFFF
GUEST_MEMFD, PRIVATE = 4, 8
LOG_DIRTY, READONLY = 1, 2
PROGRAM_PAGES = 4
MAP_GPA_STEP = PROGRAM_PAGES
"""After its pages the program calls MapGPA, to make one page private."""
MAPPED_GPA = 0x6000
MOST_VCPUS = 4
OLD_TDX_SIDE = frozenset({"6.16", "6.18"})
"""Releases before the TDX side was reworked (6.19)."""


@dataclass(eq=False)
class Gmem:
    name: str
    vm: "Vm"
    pages: int
    is_open: bool = True
    filled: set[int] = field(default_factory=set)  # by KVM_TDX_INIT_MEM_REGION, and no hole since


@dataclass(eq=False)
class Slot:
    gfn: int
    npages: int
    flags: int
    gmem: Gmem | None = None
    pgoff: int = 0

    def overlaps(self, gfn: int, npages: int) -> bool:
        return self.gfn < gfn + npages and gfn < self.gfn + self.npages


@dataclass(eq=False)
class Vcpu:
    name: str
    vm: "Vm"
    id: int
    is_open: bool = True
    has_x2apic: bool = False
    initialized: bool = False
    has_run: bool = False
    at_page: int = 0  # which page the guest program accepts next, or MAP_GPA_STEP
    in_map_gpa: bool = False  # KVM_EXIT_HYPERCALL was the last exit
    in_loop: bool = False  # the program has set itself up, and takes NMIs
    faults: int = 0  # how often in a row it could not

    @property
    def would_block(self) -> bool:
        """Whether KVM_RUN waits for an INIT that never comes: an AP before KVM_TDX_INIT_VCPU."""
        return self.id != 0 and not self.initialized


@dataclass(eq=False)
class Vm:
    name: str
    v17: bool
    is_open: bool = True
    dead: bool = False
    state: str = "uninitialized"  # initialized, runnable
    has_key: bool = False
    released: bool = False
    irqchip: bool = False
    exit_hypercall: bool = False
    gpaw52: bool = False
    image: bool = False  # the program is in place, and stays there
    vcpus: list[Vcpu] = field(default_factory=list)
    gmems: list[Gmem] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    private: set[int] = field(default_factory=set)
    mapped: set[int] = field(default_factory=set)

    @property
    def shared_gfn(self) -> int:
        """The GFN of the S-bit."""
        return 1 << (39 if self.gpaw52 else 35)

    @property
    def is_alive(self) -> bool:
        return self.is_open or any(one.is_open for one in self.vcpus) or any(one.is_open for one in self.gmems)

    def slot_at(self, gfn: int) -> Slot | None:
        return next((slot for slot in self.slots.values() if slot.overlaps(gfn, 1)), None)

    def unmap(self, gfn: int, npages: int) -> None:
        self.mapped = {one for one in self.mapped if not gfn <= one < gfn + npages}

    def gate(self, handle: "Vm | Vcpu") -> str:
        """Return what comes before everything else, or nothing."""
        if not handle.is_open:
            return "EBADF"
        return "EIO" if self.dead else ""

    def can_be_private(self, gfn: int) -> bool:
        """Tell whether a private fault on `gfn` succeeds."""
        slot = self.slot_at(gfn)
        return gfn in self.private and slot is not None and slot.gmem is not None and slot.gmem.is_open


class Model:
    """One host with `hkids` key ids for TDs; `release` is a Linux release or ``v17``."""

    def __init__(self, *, release: str, hkids: int) -> None:
        self.release = release
        self.v17 = release == "v17"
        self.old_tdx_side = release in OLD_TDX_SIDE
        self.hkids = hkids

    # ---- the VM -----------------------------------------------------------------------------------------

    def enable_cap(self, vm: Vm, cap: str, value: int, flags: int) -> str:
        if refused := vm.gate(vm):
            return refused
        if flags:
            return "EINVAL"
        if cap == "SPLIT_IRQCHIP":
            if value > 4096:
                return "EINVAL"
            if vm.irqchip or vm.vcpus:
                return "EEXIST"
            vm.irqchip = True
        elif cap == "X2APIC_API":
            known = 3 if self.release in ("v17", "6.16") else 15
            if value & ~known or value & 12 == 12 or (value & 4 and not vm.irqchip):
                return "EINVAL"
        elif cap == "EXIT_HYPERCALL":
            if value & ~(1 << 12):
                return "EINVAL"
            vm.exit_hypercall = bool(value)
        return "OK"

    def init_vm(self, vm: Vm, spoiled: str, gpaw: int = 48) -> str:
        """`spoiled` says what is wrong with the call, if anything."""
        if refused := vm.gate(vm):
            return refused
        if spoiled == "hw_error" or (vm.has_key if self.v17 else vm.state != "uninitialized") or spoiled == "flags":
            return "EINVAL"
        if spoiled == "unreadable":
            return "EFAULT"
        if spoiled == "too many":
            return "E2BIG"
        if spoiled == "padding":
            return "EINVAL"
        if vm.vcpus:
            return "EBUSY"
        if spoiled and not self.v17:
            return "EINVAL"
        if not self.hkids:
            return "ENOSPC"
        if spoiled == "attributes":
            return "EINVAL"  # from the module: the HKID comes back
        self.hkids -= 1
        vm.has_key, vm.state = True, "initialized"
        vm.gpaw52 = gpaw == 52
        return "OK"

    def finalize(self, vm: Vm) -> str:
        if refused := vm.gate(vm):
            return refused
        if not vm.has_key or vm.state == "runnable":
            return "EINVAL"
        if not any(vcpu.initialized for vcpu in vm.vcpus):
            vm.dead = not self.v17
            return "EIO"
        vm.state = "runnable"
        return "OK"

    def release_vm(self, vm: Vm) -> str:
        if refused := vm.gate(vm):
            return refused
        if vm.has_key:
            self.hkids += 1
            vm.has_key, vm.released = False, True
            vm.mapped.clear()
        return "OK"

    def capabilities(self, vm: Vm, spoiled: str) -> str:
        errors = {"flags": "EINVAL", "unreadable": "EFAULT", "too few": "E2BIG"}
        return vm.gate(vm) or errors.get(spoiled, "OK")

    # ---- memory -----------------------------------------------------------------------------------------

    def create_guest_memfd(self, vm: Vm, size: int, flags: int) -> str:
        return vm.gate(vm) or ("EINVAL" if flags or size <= 0 or size % PAGE else "OK")

    def set_region(self, vm: Vm, slot: int, flags: int, gpa: int, size: int, gmem: Gmem | None, offset: int) -> str:
        if refused := vm.gate(vm):
            return refused
        with_gmem = bool(flags & GUEST_MEMFD)
        if slot >= 32764 or flags & ~(LOG_DIRTY | GUEST_MEMFD) or (with_gmem and flags & LOG_DIRTY):
            return "EINVAL"
        if (gpa | size) % PAGE or (with_gmem and offset % PAGE):
            return "EINVAL"
        old = vm.slots.get(slot)
        gfn, npages = gpa // PAGE, size // PAGE
        if not size:
            if old is None:
                return "EINVAL"
            del vm.slots[slot]
            vm.unmap(old.gfn, old.npages)
            return "OK"
        if old is not None:
            if with_gmem or old.flags & GUEST_MEMFD or npages != old.npages:
                return "EINVAL"
            if (gfn, flags) == (old.gfn, old.flags):
                return "OK"
        if (old is None or old.gfn != gfn) and any(
            one.overlaps(gfn, npages) for number, one in vm.slots.items() if number != slot
        ):
            return "EEXIST"
        if with_gmem:
            assert gmem is not None
            if not gmem.is_open:
                return "EBADF"
            if gmem.vm is not vm or offset // PAGE + npages > gmem.pages:
                return "EINVAL"
        pgoff = offset // PAGE
        bound = with_gmem and any(
            one.gmem is gmem and one.pgoff < pgoff + npages and pgoff < one.pgoff + one.npages
            for one in vm.slots.values()
        )
        if bound and self.release in ("6.16", "6.18", "7.2"):
            return "EEXIST" if self.release == "7.2" else "EINVAL"
        if vm.state != "uninitialized" and gfn + npages - 1 >= vm.shared_gfn:
            return "EINVAL"
        if bound:
            return "EINVAL" if self.v17 else "EEXIST"
        if old is not None and old.gfn != gfn:
            vm.unmap(old.gfn, old.npages)
        vm.slots[slot] = Slot(gfn, npages, flags, gmem if with_gmem else None, pgoff)
        return "OK"

    def set_attributes(self, vm: Vm, gpa: int, size: int, attributes: int, flags: int) -> str:
        if refused := vm.gate(vm):
            return refused
        if flags or attributes & ~PRIVATE or not size or (gpa | size) % PAGE:
            return "EINVAL"
        gfns = range(gpa // PAGE, (gpa + size) // PAGE)
        if attributes:
            vm.private.update(gfns)
        else:
            vm.private.difference_update(gfns)
            vm.unmap(gfns.start, len(gfns))
        return "OK"

    def fallocate(self, gmem: Gmem, mode: int, offset: int, length: int) -> str:
        if not gmem.is_open:
            return "EBADF"
        if length <= 0:
            return "EINVAL"
        if not mode & 1 or mode & ~3:
            return "EOPNOTSUPP"
        if (offset | length) % PAGE:
            return "EINVAL"
        if mode & 2:
            self._zap_file(gmem, offset // PAGE, length // PAGE)
            return "OK"
        return "EINVAL" if offset + length > gmem.pages * PAGE else "OK"

    @staticmethod
    def _zap_file(gmem: Gmem, start: int, npages: int) -> None:
        gmem.filled.difference_update(range(start, start + npages))
        for slot in gmem.vm.slots.values():
            if slot.gmem is gmem:
                low, high = max(start, slot.pgoff), min(start + npages, slot.pgoff + slot.npages)
                if low < high:
                    gmem.vm.unmap(slot.gfn + low - slot.pgoff, high - low)

    # ---- vCPUs ------------------------------------------------------------------------------------------

    def create_vcpu(self, vm: Vm, vcpu_id: int) -> str:
        if refused := vm.gate(vm):
            return refused
        if vcpu_id >= 4096 or (not self.v17 and len(vm.vcpus) >= MOST_VCPUS):
            return "EINVAL"
        if self.release == "7.3" and any(vcpu.id == vcpu_id for vcpu in vm.vcpus):
            return "EEXIST"
        if not self.v17 and vm.state != "initialized":
            return "EIO"
        if not vm.irqchip:
            return "EINVAL"
        return "EEXIST" if any(vcpu.id == vcpu_id for vcpu in vm.vcpus) else "OK"

    def set_cpuid(self, vcpu: Vcpu, spoiled: str) -> str:
        vm = vcpu.vm
        if refused := vm.gate(vcpu):
            return refused
        if spoiled == "unreadable":
            return "EFAULT"
        if spoiled == "too many":
            return "E2BIG"
        if vcpu.has_run:
            return "OK" if spoiled == ("" if vcpu.has_x2apic else "x2apic") else "EINVAL"
        if spoiled == "virt_bits":
            return "EINVAL"
        if self.v17 and vm.state == "uninitialized":
            return "EINVAL"  # another table than KVM_TDX_INIT_VM's; X2APIC is no bit that can be configured
        vcpu.has_x2apic = spoiled != "x2apic"
        return "OK"

    def init_vcpu(self, vcpu: Vcpu, spoiled: str) -> str:
        vm = vcpu.vm
        if refused := vm.gate(vcpu):
            return refused
        if spoiled == "unreadable" and not self.v17 and not self.old_tdx_side:
            return "EFAULT"
        if not vm.has_key or vm.state == "runnable" or (vcpu.initialized and self.v17):
            return "EINVAL"
        if spoiled == "unreadable":
            return "EFAULT"
        if vcpu.initialized or spoiled or not vcpu.has_x2apic:
            return "EINVAL"
        vcpu.initialized = True
        return "OK"

    def vcpu_command(self, vcpu: Vcpu) -> str:
        """Say what a command that is no vCPU's gets."""
        return vcpu.vm.gate(vcpu) or "EINVAL"

    def get_cpuid(self, vcpu: Vcpu, nent: int) -> str:
        vm = vcpu.vm
        if refused := vm.gate(vcpu):
            return refused
        if vm.state != "initialized":
            return "EINVAL"
        return "OK" if nent >= 256 else "E2BIG"

    def init_mem_region(self, vcpu: Vcpu, gpa: int, pages: int, source: str, flags: int) -> str:
        """`source`: what user space passes: good, unaligned, zero or unmapped memory."""
        result, done = self._init_mem_region(vcpu, gpa, pages, source, flags)
        return f"{result} left {pages - done:#x}"

    def _init_mem_region(self, vcpu: Vcpu, gpa: int, pages: int, source: str, flags: int) -> tuple[str, int]:
        vm = vcpu.vm
        if refused := vm.gate(vm if self.v17 else vcpu):
            return refused, 0
        first = vm.vcpus[0]
        if vm.state != "initialized" or (not self.v17 and not vcpu.initialized) or flags & ~1:
            return "EINVAL", 0
        last = gpa // PAGE + pages - (0 if self.v17 else 1)
        if source == "unaligned" or (source == "zero" and self.release == "7.3") or gpa % PAGE or not pages:
            return "EINVAL", 0
        if (gpa // PAGE) & vm.shared_gfn or last & vm.shared_gfn:
            return "EINVAL", 0
        for done in range(pages):
            gfn = gpa // PAGE + done
            if self.v17:
                failure = self._add_page_v17(vm, first, gfn, source)
            else:
                failure = self._add_page_6_16(vm, gfn, source) if self.old_tdx_side else self._add_page(vm, gfn, source)
            if failure:
                return ("EAGAIN" if self.v17 and done else failure), done
            vm.mapped.add(gfn)
        return "OK", pages

    @staticmethod
    def _add_page(vm: Vm, gfn: int, source: str) -> str:
        slot = vm.slot_at(gfn)
        if slot is None or slot.gmem is None:
            return "EINVAL"
        if not slot.gmem.is_open or source == "unmapped":
            return "EFAULT"
        if gfn not in vm.private:
            return "EINVAL"
        if source == "zero":  # 7.3 has refused it long ago
            return "EOPNOTSUPP"
        return "EIO" if gfn in vm.mapped else ""

    @staticmethod
    def _add_page_6_16(vm: Vm, gfn: int, source: str) -> str:
        slot = vm.slot_at(gfn)
        if slot is None or slot.gmem is None:
            return "EINVAL"
        if not slot.gmem.is_open:
            return "EFAULT"
        index = gfn - slot.gfn + slot.pgoff
        if index in slot.gmem.filled:
            return "EEXIST"
        if gfn not in vm.private:
            return "EINVAL"
        if source != "good":
            return "EFAULT"
        slot.gmem.filled.add(index)
        return ""

    @staticmethod
    def _add_page_v17(vm: Vm, first: Vcpu, gfn: int, source: str) -> str:
        if source != "good":
            return "EFAULT"
        if not first.initialized:
            vm.dead = True
            return "EFAULT"
        return "" if vm.can_be_private(gfn) else "EIO"

    def pre_fault(self, vcpu: Vcpu, gpa: int, size: int, flags: int) -> str:
        result, done = self._pre_fault(vcpu, gpa, size, flags)
        return f"{result} left {size - done * PAGE:#x}"

    def _pre_fault(self, vcpu: Vcpu, gpa: int, size: int, flags: int) -> tuple[str, int]:
        vm = vcpu.vm
        if refused := vm.gate(vcpu):
            return refused, 0
        if self.v17 or flags or (gpa | size) % PAGE or not size:
            return "EINVAL", 0
        if vm.state != "runnable":
            return "EOPNOTSUPP", 0
        for done in range(size // PAGE):
            gfn = gpa // PAGE + done
            failure = ""
            if gfn & vm.shared_gfn:
                failure = "EINVAL"
            elif not vcpu.initialized:
                vm.dead = True
                failure = "EIO"
            elif gfn in vm.private:
                if vm.can_be_private(gfn):
                    vm.mapped.add(gfn)
                else:
                    failure = "EFAULT"
            elif vm.slot_at(gfn) is None:
                failure = "ENOENT"
            if failure:
                return ("OK" if done else failure), done
        return "OK", size // PAGE

    def run(self, vcpu: Vcpu, immediate: int, ret: int = 0) -> str:
        """`ret` is user space's answer to MapGPA, where that was the last exit."""
        vm = vcpu.vm
        if refused := vm.gate(vcpu):
            return refused
        if vcpu.in_map_gpa:
            vcpu.in_map_gpa = False
            if ret and not self.map_gpa_takes(ret):
                return "EINVAL"
        if immediate:
            return "EINTR"
        if not vcpu.initialized:
            vm.dead = self.v17
            return "EIO" if self.v17 else "EINVAL"
        if vm.state != "runnable":
            if self.v17:
                vcpu.has_run = True
                return "KVM_EXIT_INTERNAL_ERROR"
            return "EINVAL"
        vcpu.has_run = True
        if not vm.image:
            vcpu.faults += 1
            return "?" if RESET_GFN in vm.private else "EFAULT"
        if vcpu.at_page == MAP_GPA_STEP:
            vcpu.at_page = 0
            if self.v17:
                return "KVM_EXIT_TDX"
            if vm.exit_hypercall:
                vcpu.in_map_gpa = True
                return f"KVM_EXIT_HYPERCALL {MAPPED_GPA:#x} 1 16"
        gfn = vcpu.at_page
        if gfn not in vm.mapped:
            if not vm.can_be_private(gfn):
                vcpu.faults += 1
                return "EFAULT"
            vm.mapped.add(gfn)
        vcpu.faults = 0
        vcpu.in_loop = True
        vcpu.at_page = gfn + 1
        return f"KVM_EXIT_IO {0x40 + gfn:#x}"

    def map_gpa_takes(self, ret: int) -> bool:
        """Tell whether KVM passes `ret` on to the guest: before 7.0 any error, later EAGAIN and EINVAL only."""
        return self.old_tdx_side or ret in (11, 22)

    def nmi(self, vcpu: Vcpu) -> str:
        return vcpu.vm.gate(vcpu) or "OK"

    # ---- the end ----------------------------------------------------------------------------------------

    def close(self, handle: "Vm | Vcpu | Gmem") -> None:
        """Close it: idempotent. The last handle of a VM takes the VM along, and its key id comes back."""
        vm = handle if isinstance(handle, Vm) else handle.vm
        was_alive = vm.is_alive
        if isinstance(handle, Gmem) and handle.is_open:
            self._zap_file(handle, 0, handle.pages)
        handle.is_open = False
        if was_alive and not vm.is_alive and vm.has_key:
            self.hkids += 1
            vm.has_key = False
