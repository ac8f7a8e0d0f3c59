"""The kernel's layout of a structure, and the numbers of an enumeration, against the binding's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tdxhw.abi.binding import COMMANDS, KVM, TDX, WITHOUT_TDX, Bound, BoundEnumeration, free_space, is_padding
from tdxhw.abi.btf import Types
from tdxhw.abi.layout import Enumeration, Field, Layout


class Agreement(Enum):
    """What came of comparing one structure."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_DESCRIBED = "not described"


@dataclass(frozen=True, slots=True)
class Difference:
    """One field, size or number that is not the same on both sides: None is where it does not exist."""

    path: str  # "kvm_tdx_init_vm.cpuid", the structure itself, "kvm_tdx_cmd_id.KVM_TDX_GET_CPUID"
    kernel: Field | int | None  # a number of an enumeration is an int
    binding: Field | int | None

    def __str__(self) -> str:
        """``kvm_tdx_init_vm.cpuid: offset 264 in the kernel, 256 here``."""
        return f"{self.path}: {self.words()}"

    def words(self) -> str:
        """``offset 264 in the kernel, 256 here``."""
        if self.kernel is None:
            assert self.binding is not None
            return f"not in the kernel; {_words(self.binding)} here"
        if self.binding is None:
            return f"{_words(self.kernel)} in the kernel; not here"
        if isinstance(self.kernel, int) or isinstance(self.binding, int):
            return f"{_words(self.kernel)} in the kernel, {_words(self.binding)} here"
        parts = []
        if self.kernel.offset != self.binding.offset:
            parts.append(f"offset {self.kernel.offset} in the kernel, {self.binding.offset} here")
        if self.kernel.size != self.binding.size:
            parts.append(f"{self.kernel.size} bytes in the kernel, {self.binding.size} here")
        return "; ".join(parts)


def _words(where: Field | int) -> str:
    return str(where) if isinstance(where, int) else f"offset {where.offset}, {where.size} bytes"


@dataclass(frozen=True, slots=True)
class Compared:
    """One structure or enumeration, compared."""

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
    values: int = 0
    """How many numbers were compared; none of a structure."""


_END_OF_ENUMERATION: Final = "_NR_MAX"
"""``KVM_TDX_CMD_NR_MAX`` is one more than the last of the kernel's numbers."""

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
    """Compare everything of `dialect`, what is of TDX first; None: of a KVM without TDX."""
    of_tdx = TDX[dialect or "mainline"]
    others = WITHOUT_TDX if dialect is None else KVM[dialect]
    commands = COMMANDS[dialect or "mainline"]
    return [
        _compare_values(commands, [one for part in types for one in part.enumerations(commands.name)]),
        *(_compare(bound, _layouts(types, bound.name), of_tdx=True) for bound in of_tdx),
        *(_compare(bound, _layouts(types, bound.name)) for bound in others),
    ]


def _compare_values(bound: BoundEnumeration, kernel: Sequence[Enumeration]) -> Compared:
    here = {one.name: int(one) for one in bound.values}
    if not kernel:
        return Compared(bound.name, Agreement.NOT_DESCRIBED, 0, of_tdx=True)
    differences: tuple[Difference, ...] = ()
    newer: tuple[Difference, ...] = ()
    for there in kernel:
        differences += tuple(
            Difference(f"{bound.name}.{name}", there.values.get(name), number)
            for name, number in here.items()
            if there.values.get(name) != number
        )
        newer += tuple(
            Difference(f"{bound.name}.{name}", number, None)
            for name, number in there.values.items()
            if name not in here and not name.endswith(_END_OF_ENUMERATION)
        )
    agreement = Agreement.DIFFERS if differences else Agreement.AGREES
    return Compared(
        bound.name, agreement, kernel[0].size, tuple(dict.fromkeys(differences)), tuple(dict.fromkeys(newer)),
        of_tdx=True, values=len(here),
    )  # fmt: skip


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
        if is_padding(path) and (there is None or _is_within(there, here)):
            continue  # the kernel has put something there, which `_newer` names
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


def _is_within(inner: Field, outer: Field) -> bool:
    return outer.offset <= inner.offset and inner.offset + inner.size <= outer.offset + outer.size


def _newer(bound: Bound, kernel: Layout) -> Iterator[Difference]:
    binding = bound.layout()
    free = free_space(binding)
    for path, there in kernel.fields.items():
        if path in binding.fields or path in bound.also.values() or not there.size or is_padding(path):
            continue
        if any(gap.offset <= there.offset < gap.offset + gap.size for gap in free):
            yield Difference(f"{bound.name}.{path}", there, None)
