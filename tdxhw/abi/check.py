"""What is said of one kernel: its configuration, the parameter tdx, the layout of its structures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from tdxhw.abi import btf, dwarf, kconfig
from tdxhw.abi.btf import Types
from tdxhw.abi.compare import Agreement, Compared, compare, dialect_of
from tdxhw.abi.elf import has_section
from tdxhw.abi.kernel_files import MODULES, KernelFiles
from tdxhw.abi.modinfo import built_in


class Status(Enum):
    """What came of one check."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing, decides nothing."""
    OFF = "off"
    """The kernel was built without it."""
    DIFFERS = "differs"
    UNKNOWN = "unknown"
    """Could not be checked: never a pass."""


class Verdict(Enum):
    """What came of all of them; the value is the exit code."""

    FITS = 0
    DOES_NOT = 1
    CANNOT_TELL = 2


@dataclass(frozen=True, slots=True)
class Check:
    """One line."""

    status: Status
    what: str
    detail: str
    remedy: str = ""


@dataclass(slots=True)
class Report:
    """All that was found out about one kernel."""

    release: str
    given: list[str]
    build_id: str
    dialect: str | None = None
    config_from: str = ""
    types_from: str = ""
    configuration: list[Check] = field(default_factory=list)
    parameter: list[Check] = field(default_factory=list)
    layout: list[Check] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)

    def checks(self) -> Iterator[Check]:
        """Yield every line, in order."""
        yield from (*self.configuration, *self.parameter, *self.layout)

    @property
    def verdict(self) -> Verdict:
        """One thing that is wrong decides; then one that could not be checked."""
        found = {check.status for check in self.checks()}
        if found & {Status.OFF, Status.DIFFERS}:
            return Verdict.DOES_NOT
        return Verdict.CANNOT_TELL if Status.UNKNOWN in found else Verdict.FITS


def check(kernel: KernelFiles, source: str = "auto") -> Report:
    """Check one kernel. `source` of types: "btf", "dwarf", or "auto" for BTF and DWARF where there is none.

    Raise `AbiError` when a tool is missing or a file broken.
    """
    report = Report(kernel.release, kernel.given, kernel.image.build_id if kernel.image else "")
    types, report.types_from, problem = _types(kernel, source)
    report.dialect = dialect_of(types)
    report.config_from = kernel.config_from
    config = kconfig.parse(kernel.config) if kernel.config else None
    report.configuration = list(_configuration(config, report.dialect, kernel.release))
    report.parameter = [_parameter(kernel, config, report.dialect)]
    if problem:
        report.layout = [Check(Status.UNKNOWN, "structures", problem)]
    else:
        report.compared = compare(types, report.dialect)
        is_off = any(one.status is Status.OFF for one in report.configuration)
        report.layout = list(_layout(report.compared, is_off))
    return report


# ---- configuration ----


def _configuration(config: dict[str, str] | None, dialect: str | None, release: str) -> Iterator[Check]:
    for option in kconfig.OPTIONS:
        if config is None:
            yield Check(Status.UNKNOWN, option.names[0], "no configuration among what was given, nor in the image")
            continue
        name, value = kconfig.value_of(option, config)
        if kconfig.is_on(option, config):
            yield Check(Status.OK, name, value)
        elif option.selected and kconfig.has_tdx(config, dialect):
            names = " or ".join(option.names)
            yield Check(Status.UNKNOWN, name, f"CONFIG_KVM_INTEL_TDX is set, but it did not select {names}")
        elif name == "CONFIG_KVM_INTEL_TDX" and kconfig.has_tdx(config, dialect):
            yield Check(Status.OK, name, "not an option of v17, which has TDX with CONFIG_INTEL_TDX_HOST")
        else:
            yield Check(Status.OFF, name, "not set", kconfig.remedy(option, config, release))


# ---- the parameter ----


def _parameter(kernel: KernelFiles, config: dict[str, str] | None, dialect: str | None) -> Check:
    name = "kvm_intel.tdx"
    if kernel.parameter == "N":
        return Check(Status.NOTE, name, "N now: this kernel could, but does not", "`tdxhw doctor` says why")
    if kernel.parameter:
        return Check(Status.OK, name, f"{kernel.parameter} now")
    info = kernel.module_info.get("kvm-intel")
    where = "kvm-intel.ko"
    if info is None and kernel.built_in is not None:
        info, where = built_in(kernel.built_in, "kvm-intel"), "modules.builtin.modinfo"
    if info is None:
        if config is not None and config.get("CONFIG_KVM_INTEL", "n") == "n":
            return Check(Status.OFF, name, "there is no kvm_intel")
        if config is not None and config.get("CONFIG_KVM_INTEL") == "y":
            detail = "kvm_intel is built in, and no modules.builtin.modinfo is among what was given"
            return Check(Status.UNKNOWN, name, detail, "give the package or the build tree")
        return Check(
            Status.UNKNOWN, name, "no kvm-intel.ko among what was given", "give the package of modules as well"
        )
    kind = info.parameters.get("tdx")
    if kind is None:
        built_with = config is not None and kconfig.has_tdx(config, dialect)
        remedy = f"{where} is of another build than this configuration: give both of one" if built_with else ""
        return Check(Status.OFF, name, f"{where} has no parameter tdx", remedy)
    return Check(Status.OK, name, f"{kind} ({where})")


# ---- structures ----

_NO_TYPES: Final = "no type information: neither BTF (CONFIG_DEBUG_INFO_BTF=y) nor DWARF (the package with -dbg)"


def _types(kernel: KernelFiles, source: str) -> tuple[list[Types], str, str]:
    """Return the kernel's types, KVM's modules first, where they are from, and why there are none."""
    types: list[Types] = []
    described: dict[str, str] = {}
    if source != "dwarf":
        types, described = _from_btf(kernel)
    if source != "btf":
        # A kernel may have BTF without its modules having any (CONFIG_DEBUG_INFO_BTF_MODULES).
        further, names = _from_dwarf(kernel, [part for part in _PARTS if part not in described])
        types, described = further + types, described | names
    if types:
        told = [
            f"{kind} of {', '.join(_file_name(part) for part, by in described.items() if by == kind)}"
            for kind in dict.fromkeys(described.values())
        ]
        return types, ", ".join(told), ""
    if kernel.base is None and kernel.modules:
        return [], "", f"no kernel image of {kernel.release}: a module's BTF refers to the vmlinux it was built with"
    return [], "", {"btf": "no BTF (CONFIG_DEBUG_INFO_BTF)", "dwarf": "no DWARF"}.get(source, _NO_TYPES)


_PARTS: Final = ("vmlinux", *MODULES)


def _file_name(part: str) -> str:
    return part if part == "vmlinux" else f"{part}.ko"


def _from_btf(kernel: KernelFiles) -> tuple[list[Types], dict[str, str]]:
    if kernel.base is None or not _has(kernel.base, ".BTF"):
        return [], {}
    base = btf.read(kernel.base)
    types, described = [base], {"vmlinux": "BTF"}
    for module in MODULES:
        path = kernel.modules.get(module)
        if path is not None and _has(path, ".BTF"):
            types.insert(0, btf.read(path, kernel.base, base))
            described[module] = "BTF"
    return types, described


def _from_dwarf(kernel: KernelFiles, parts: Sequence[str]) -> tuple[list[Types], dict[str, str]]:
    types, described = [], {}
    for part in parts:
        for path in (kernel.debug.get(part), kernel.base if part == "vmlinux" else kernel.modules.get(part)):
            if path is not None and _has(path, ".debug_info"):
                types.append(dwarf.read(path))
                described[part] = "DWARF"
                break
    return types, described


def _has(path: Path, section: str) -> bool:
    with path.open("rb") as stream:
        is_bare_btf = stream.read(2) in (b"\x9f\xeb", b"\xeb\x9f")
    return section == ".BTF" if is_bare_btf else has_section(path, section)


def _layout(compared: Sequence[Compared], is_off: bool) -> Iterator[Check]:
    """Yield a line for each structure of TDX and each that differs, one for the others that agree or are not there."""
    agreeing: list[str] = []
    missing: list[str] = []
    for one in compared:
        match one.agreement:
            case Agreement.AGREES if one.values:
                yield Check(Status.OK, one.name, f"{one.values} numbers")
            case Agreement.AGREES if one.name.startswith("kvm_tdx_"):
                yield Check(Status.OK, one.name, f"{one.size} bytes")
            case Agreement.AGREES:
                agreeing.append(one.name)
            case Agreement.DIFFERS:
                for difference in one.differences:
                    yield Check(Status.DIFFERS, difference.path, difference.words())
            case Agreement.NOT_DESCRIBED if one.may_lack:
                yield Check(Status.NOTE, one.name, f"not described: {one.may_lack}")
            case Agreement.NOT_DESCRIBED if is_off and one.of_tdx:
                yield Check(Status.NOTE, one.name, "not described: the kernel was built without TDX")
            case Agreement.NOT_DESCRIBED if one.of_tdx:
                yield Check(Status.UNKNOWN, one.name, "not described by the kernel's type information")
            case Agreement.NOT_DESCRIBED:
                missing.append(one.name)
        for newer in one.newer:
            yield Check(Status.NOTE, newer.path, f"newer than this tdxhw: {newer.words()}")
    if agreeing:
        yield Check(Status.OK, "other structures", f"{len(agreeing)} agree")
    if missing:
        remedy = "" if agreeing else "are kvm.ko and kvm-intel.ko among what was given?"
        yield Check(Status.UNKNOWN, "other structures", f"not described: {', '.join(missing)}", remedy)
