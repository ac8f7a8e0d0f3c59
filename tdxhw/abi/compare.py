"""The kernel's layout of a structure against the binding's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tdxhw.abi.binding import KVM, TDX, WITHOUT_TDX, Bound, free_space
from tdxhw.abi.btf import Types
from tdxhw.abi.layout import Field, Layout


class Agreement(Enum):
    """What came of comparing one structure."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_DESCRIBED = "not described"


@dataclass(frozen=True, slots=True)
class Difference:
    """One field, or the size, that is not the same on both sides: None is where it does not exist."""

    path: str  # "kvm_tdx_init_vm.cpuid", or the structure itself
    kernel: Field | None
    binding: Field | None

    def __str__(self) -> str:
        """``kvm_tdx_init_vm.cpuid: offset 264 in the kernel, 256 here``."""
        return f"{self.path}: {self.words()}"

    def words(self) -> str:
        """``offset 264 in the kernel, 256 here``."""
        if self.kernel is None:
            assert self.binding is not None
            return f"not in the kernel; offset {self.binding.offset}, {self.binding.size} bytes here"
        if self.binding is None:
            return f"offset {self.kernel.offset}, {self.kernel.size} bytes in the kernel; not here"
        parts = []
        if self.kernel.offset != self.binding.offset:
            parts.append(f"offset {self.kernel.offset} in the kernel, {self.binding.offset} here")
        if self.kernel.size != self.binding.size:
            parts.append(f"{self.kernel.size} bytes in the kernel, {self.binding.size} here")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Compared:
    """One structure, compared."""

    name: str
    agreement: Agreement
    size: int  # [bytes] in the kernel, 0 where it is not described
    differences: tuple[Difference, ...] = ()
    newer: tuple[Difference, ...] = ()
    """Fields that the kernel has where the binding has padding: a program that sets padding to zero need not care."""
    of_tdx: bool = False
    """Whether only a kernel with TDX has it."""
    may_lack: str = ""
    """Why it does not matter when the kernel does not describe it."""


DIALECT_MARKS: Final = {
    # `struct kvm_tdx_capabilities` and `struct kvm_tdx_init_vm` have these in one dialect only.
    "mainline": {("kvm_tdx_capabilities", "supported_attrs"), ("kvm_tdx_init_vm", "xfam")},
    "v17": {("kvm_tdx_capabilities", "attrs_fixed0"), ("kvm_tdx_capabilities", "nr_cpuid_configs")},
}


def dialect_of(types: Sequence[Types]) -> str | None:
    """Return the dialect whose marks the kernel's structures have; None where it describes none of them."""
    found = {
        dialect: sum(any(field in layout.fields for layout in _layouts(types, name)) for name, field in marks)
        for dialect, marks in DIALECT_MARKS.items()
    }
    best = max(found, key=lambda dialect: found[dialect])
    return best if found[best] else None


def compare(types: Sequence[Types], dialect: str | None) -> list[Compared]:
    """Compare every structure of `dialect`, those of TDX first; None: of a KVM without TDX."""
    of_tdx = TDX[dialect or "mainline"]
    others = WITHOUT_TDX if dialect is None else KVM[dialect]
    return [
        *(_compare(bound, _layouts(types, bound.name), of_tdx=True) for bound in of_tdx),
        *(_compare(bound, _layouts(types, bound.name)) for bound in others),
    ]


def _layouts(types: Sequence[Types], name: str) -> list[Layout]:
    """Return every different layout that the parts of the kernel give the structure."""
    found: list[Layout] = []
    for part in types:
        found.extend(layout for layout in part.layouts(name) if layout not in found)
    return found


def _compare(bound: Bound, kernel: Sequence[Layout], *, of_tdx: bool = False) -> Compared:
    if not kernel:
        return Compared(bound.name, Agreement.NOT_DESCRIBED, 0, of_tdx=of_tdx, may_lack=bound.may_lack)
    differences: list[Difference] = []
    newer: list[Difference] = []
    for layout in kernel:
        differences.extend(one for one in _differences(bound, layout) if one not in differences)
        newer.extend(one for one in _newer(bound, layout) if one not in newer)
    agreement = Agreement.DIFFERS if differences else Agreement.AGREES
    return Compared(bound.name, agreement, kernel[0].size, tuple(differences), tuple(newer), of_tdx)


def _differences(bound: Bound, kernel: Layout) -> Iterator[Difference]:
    binding = bound.layout()
    if kernel.size != binding.size and not (bound.open_ended and kernel.size > binding.size):
        yield Difference(bound.name, Field(0, kernel.size), Field(0, binding.size))
    moved: dict[str, int] = {}  # by how much what contains a field has moved: said once, for the outermost
    for path, here in binding.fields.items():
        there = kernel.fields.get(path) or kernel.fields.get(bound.also.get(path, path))
        outer = path.rpartition(".")[0]
        if there is None:
            if outer in kernel.fields or not outer:
                yield Difference(f"{bound.name}.{path}", there, here)
            continue
        moved[path] = there.offset - here.offset
        if there.size != here.size or moved[path] != moved.get(outer, 0):
            yield Difference(f"{bound.name}.{path}", there, here)
    entries = bound.entries_offset()
    if entries is not None:
        # A flexible array has no size. One at the end of a nested structure (kvm_tdx_init_vm.cpuid) is compared there.
        # Before it the kernel's macro for flexible arrays puts an empty structure.
        arrays = {path: where for path, where in kernel.fields.items() if where.size == 0 and "." not in path}
        for path, there in arrays.items():
            if there.offset != entries and not path.startswith("__empty_"):
                yield Difference(f"{bound.name}.{path}", there, Field(entries, 0))


def _newer(bound: Bound, kernel: Layout) -> Iterator[Difference]:
    binding = bound.layout()
    free = free_space(binding)
    for path, there in kernel.fields.items():
        if path in binding.fields or path in bound.also.values() or not there.size:
            continue
        if any(gap.offset <= there.offset < gap.offset + gap.size for gap in free):
            yield Difference(f"{bound.name}.{path}", there, None)
