"""Fault injection: what goes wrong on a real host now and then, by name, with parameters, repeatable by seed.

``boot(profile, faults=["out-of-hkids", "lose-lock-race:leaf=TDH_MEM_PAGE_AUG,times=3"])`` arms them from the start;
``machine.faults.inject(…)`` later, and undoes one when the returned function is called. Where hardware is the
cause, the simulated hardware misbehaves and the module finds out (entropy, PCONFIG, a pending interrupt, CPUs that
are off). Statuses that come from races are answered by `FaultySeam` in the module's place: the leaf has not run.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias

from sim_backend.hw.gprs import RAX, Gprs
from sim_backend.hw.keys import PconfigResult
from sim_backend.hw.platform import MSR_INTR_PENDING
from sim_backend.seam_port import SeamPort
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

if TYPE_CHECKING:
    from sim_backend.machine import Machine

FOREVER: Final = 1 << 62
_LEAF_NUMBER: Final = 0xFFFF

Undo: TypeAlias = Callable[[], None]
Answer: TypeAlias = Callable[[int, Gprs], bool]
"""Gets the LP and the registers of a SEAMCALL; True when it has answered in the module's place."""


class FaultError(ValueError):
    """A fault is not known, or not one that this machine can have; the message says what there is instead."""


class Fault(Protocol):
    """One kind of fault; the dataclass fields are its parameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def inject(self, machine: "Machine", seam: "FaultySeam") -> Undo:
        """Arm the fault and return what takes it back. Raise `FaultError`."""


class FaultySeam:
    """A `SeamPort` where SEAMCALLs can fail as they do when another LP is faster.

    A leaf that fails here has not run, so its operands and the module are as they were.
    """

    def __init__(self, port: SeamPort) -> None:
        self.port: Final = port
        self.kick: Final = port.kick
        self.interrupt: Final = port.interrupt
        self.invept: Final = port.invept
        self.answered: Final = Counter[str]()  # leaf name -> SEAMCALLs that were answered here
        self._answers: Final[dict[int, list[Answer]]] = {}

    def seamcall(self, lp: int, regs: Gprs) -> None:
        """Execute SEAMCALL on `lp`, or fail it."""
        answers = self._answers.get(regs[RAX] & _LEAF_NUMBER)
        if answers:
            leaf = regs[RAX] & _LEAF_NUMBER
            for answer in answers:
                if answer(lp, regs):
                    self.answered[SeamcallLeaf(leaf).name] += 1
                    return
        self.port.seamcall(lp, regs)

    def intercept(self, leaf: SeamcallLeaf, answer: Answer) -> Undo:
        """Show every SEAMCALL of `leaf` to `answer`, after those that came before it."""
        self._answers.setdefault(int(leaf), []).append(answer)
        return lambda: self._answers[int(leaf)].remove(answer)

    def fail(self, leaf: SeamcallLeaf, status: Rax, chance: "Chance") -> Undo:
        """Answer SEAMCALLs of `leaf` with `status` whenever `chance` says so."""
        value = int(status)

        def answer(lp: int, regs: Gprs) -> bool:
            del lp
            if not chance.happens():
                return False
            regs[RAX] = value
            return True

        return self.intercept(leaf, answer)


class Chance:
    """Says when: the first `times` times it is asked, each of them with `probability`, the same for the same `seed`."""

    def __init__(self, times: int, probability: float = 1.0, seed: int = 0) -> None:
        if times < 1 or not 0 < probability <= 1:
            raise FaultError(f"times={times} must be at least 1, and probability={probability} in 0 (excluded) to 1")
        self._left = times
        self._probability: Final = probability
        self._random: Final = random.Random(seed)

    def happens(self) -> bool:
        """Decide once."""
        if not self._left or (self._probability < 1 and self._random.random() >= self._probability):
            return False
        self._left -= 1
        return True


@dataclass(frozen=True, slots=True)
class LoseLockRace:
    """`leaf` answers OPERAND_BUSY naming `operand`: another LP holds a lock that it wants."""

    leaf: str
    operand: str = "SEPT_TREE"
    times: int = 1
    probability: float = 1.0
    seed: int = 0

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Answer in the module's place."""
        del machine
        status = Rax(Status.OPERAND_BUSY, _member(Operand, self.operand, "operand"))
        return seam.fail(leaf_named(self.leaf), status, Chance(self.times, self.probability, self.seed))


@dataclass(frozen=True, slots=True)
class NoEntropy:
    """RDSEED fails the next `reads` times. With `leaf`, that leaf answers RND_NO_ENTROPY `reads` times instead."""

    reads: int = FOREVER
    leaf: str = ""

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Empty the entropy pool of the CPU."""
        if self.leaf:
            return seam.fail(leaf_named(self.leaf), Rax(Status.RND_NO_ENTROPY), Chance(self.reads))
        platform = machine.platform
        platform.rand_fail = self.reads

        def undo() -> None:
            platform.rand_fail = 0

        return undo


@dataclass(frozen=True, slots=True)
class KeyGenerationFailed:
    """PCONFIG has no entropy for a key, the next `times` times: TDH.MNG.KEY.CONFIG fails."""

    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Make PCONFIG answer ENTROPY_ERROR."""
        return _pconfig_answers(machine, seam, PconfigResult.ENTROPY_ERROR, self.times)


@dataclass(frozen=True, slots=True)
class PconfigBusy:
    """Somebody else uses the key table, the next `times` times: TDH.MNG.KEY.CONFIG is OPERAND_BUSY."""

    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Make PCONFIG answer DEVICE_BUSY."""
        return _pconfig_answers(machine, seam, PconfigResult.DEVICE_BUSY, self.times)


@dataclass(frozen=True, slots=True)
class OutOfHkids:
    """Only `left` more TDs get a key: others on the host have the rest."""

    left: int = 0

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Lower the limit of KVM's pool."""
        del seam
        if machine.tdx is None:
            raise FaultError(f"profile {machine.profile.name} has no TDX, so no HKIDs to run out of")
        hkids = machine.tdx.hkids
        hkids.limit = hkids.count - hkids.available + self.left

        def undo() -> None:
            hkids.limit = hkids.count

        return undo


@dataclass(frozen=True, slots=True)
class MiscCgroupLimit:
    """User space's misc control group may have `left` more TDs, whatever the host has."""

    left: int = 0

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Write the group's ``misc.max``."""
        del seam
        host = machine.tdx
        if host is None:
            raise FaultError(f"profile {machine.profile.name} has no TDX, so no TDs to limit")
        host.misc_cg_max = self.left + sum(1 for ops in host.tds if ops.td.hkid)

        def undo() -> None:
            host.misc_cg_max = None

        return undo


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Only `left` more pages can be allocated."""

    left: int = 0

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Lower the limit of the page allocator."""
        del seam
        pages = machine.pages
        pages.limit_pages = pages.in_use + self.left

        def undo() -> None:
            pages.limit_pages = pages.total_pages

        return undo


@dataclass(frozen=True, slots=True)
class InterruptedWbinvd:
    """An interrupt arrives during TDH.PHYMEM.CACHE.WB, the next `times` times: INTERRUPTED_RESUMABLE."""

    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Raise an interrupt on the LP for the time of the call; the module notices by itself."""
        chance, platform, port = Chance(self.times), machine.platform, seam.port

        def interrupt(lp: int, regs: Gprs) -> bool:
            if not chance.happens():
                return False
            platform.wrmsr(MSR_INTR_PENDING, 1, lp)
            try:
                port.seamcall(lp, regs)
            finally:
                platform.wrmsr(MSR_INTR_PENDING, 0, lp)
            return True

        return seam.intercept(SeamcallLeaf.TDH_PHYMEM_CACHE_WB, interrupt)


@dataclass(frozen=True, slots=True)
class DeadCpu:
    """Every CPU of `package` is off."""

    package: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Take the package's LPs away from the host's scheduler."""
        del seam
        mine = [lp.index for lp in machine.platform.lps if lp.package == self.package]
        if not mine or len(mine) == len(machine.platform.lps):
            raise FaultError(
                f"package {self.package} cannot be off: the host has {machine.platform.packages} package(s),"
                " and one must stay on"
            )
        if machine.tdx is not None and machine.tdx.hkids.available != machine.tdx.hkids.count:
            raise FaultError(f"the last CPU of package {self.package} cannot be switched off while a TD has a key")
        switched_off = [lp for lp in mine if machine.lps.online[lp]]
        for lp in switched_off:
            machine.lps.set_online(lp, False)

        def undo() -> None:
            for lp in switched_off:
                machine.lps.set_online(lp, True)

        return undo


@dataclass(frozen=True, slots=True)
class PreviousTlbEpochBusy:
    """TDH.MEM.TRACK finds a vCPU that entered before the last TRACK and has not left, the next `times` times."""

    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Answer in the module's place."""
        del machine
        return seam.fail(SeamcallLeaf.TDH_MEM_TRACK, Rax(Status.PREVIOUS_TLB_EPOCH_BUSY), Chance(self.times))


@dataclass(frozen=True, slots=True)
class VpEnterBusy:
    """TDH.VP.ENTER cannot lock the vCPU's `operand`, the next `times` times (zero-step mitigation, for one)."""

    operand: str = "SEPT_TREE"
    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Answer in the module's place."""
        del machine
        status = Rax(Status.OPERAND_BUSY, _member(Operand, self.operand, "operand"))
        return seam.fail(SeamcallLeaf.TDH_VP_ENTER, status, Chance(self.times))


@dataclass(frozen=True, slots=True)
class FlushvpNotDone:
    """TDH.MNG.VPFLUSHDONE finds a vCPU still associated with an LP, the next `times` times."""

    times: int = 1

    def inject(self, machine: "Machine", seam: FaultySeam) -> Undo:
        """Answer in the module's place."""
        del machine
        return seam.fail(SeamcallLeaf.TDH_MNG_VPFLUSHDONE, Rax(Status.FLUSHVP_NOT_DONE), Chance(self.times))


FAULTS: Final[Mapping[str, type[Fault]]] = MappingProxyType(
    {
        "lose-lock-race": LoseLockRace,
        "no-entropy": NoEntropy,
        "key-generation-failed": KeyGenerationFailed,
        "pconfig-busy": PconfigBusy,
        "out-of-hkids": OutOfHkids,
        "misc-cgroup-limit": MiscCgroupLimit,
        "out-of-memory": OutOfMemory,
        "interrupted-wbinvd": InterruptedWbinvd,
        "dead-cpu": DeadCpu,
        "previous-tlb-epoch-busy": PreviousTlbEpochBusy,
        "vp-enter-busy": VpEnterBusy,
        "flushvp-not-done": FlushvpNotDone,
    }
)
"""Every fault by its name."""


class Faults:
    """The faults of one machine."""

    def __init__(self, machine: "Machine", seam: FaultySeam) -> None:
        self._machine: Final = machine
        self.seam: Final = seam

    def inject(self, fault: "Fault | str") -> Undo:
        """Arm `fault`, an object or its text (see `parse`); return what takes it back. Raise `FaultError`."""
        return (parse(fault) if isinstance(fault, str) else fault).inject(self._machine, self.seam)

    def inject_all(self, wanted: "Iterable[Fault | str]") -> None:
        """Arm several for good."""
        for fault in wanted:
            self.inject(fault)


def parse(text: str) -> Fault:
    """Return the fault that ``NAME`` or ``NAME:parameter=value,…`` describes. Raise `FaultError`."""
    name, _, rest = text.partition(":")
    kind = FAULTS.get(name)
    if kind is None:
        raise FaultError(f"no fault is called {name!r}; there are: {', '.join(FAULTS)}")
    parameters = {field.name: field for field in fields(kind)}
    values: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in parameters:
            raise FaultError(f"{name} has no parameter {key!r}; it has: {', '.join(parameters)}")
        values[key] = _converted(name, parameters[key], value)
    missing = [key for key, field in parameters.items() if field.default is MISSING and key not in values]
    if missing:
        raise FaultError(f"{name} needs {', '.join(missing)}: {name}:{missing[0]}=…")
    return kind(**values)


def leaf_named(name: str) -> SeamcallLeaf:
    """Return the leaf called `name` (``TDH_MEM_TRACK``, ``TDH.MEM.TRACK``). Raise `FaultError`."""
    return SeamcallLeaf(_member(SeamcallLeaf, name.replace(".", "_"), "SEAMCALL leaf"))


def _member(names: "type[Operand | SeamcallLeaf]", name: str, what: str) -> Any:
    try:
        return names[name]
    except KeyError:
        raise FaultError(f"no {what} is called {name!r}") from None


def _converted(fault: str, parameter: "Field[Any]", text: str) -> object:
    convert: Callable[[str], object] = str
    if parameter.type is int:
        convert = _integer
    elif parameter.type is float:
        convert = float
    try:
        return convert(text)
    except ValueError:
        raise FaultError(f"{fault}: {parameter.name}={text!r} is no number") from None


def _integer(text: str) -> int:
    return int(text, 0)


def _pconfig_answers(machine: "Machine", seam: FaultySeam, result: PconfigResult, times: int) -> Undo:
    """Make PCONFIG answer `result` in the next `times` TDH.MNG.KEY.CONFIGs."""
    chance, platform, port = Chance(times), machine.platform, seam.port

    def configure(lp: int, regs: Gprs) -> bool:
        if not chance.happens():
            return False
        platform.pconfig_result = result
        try:
            port.seamcall(lp, regs)
        finally:
            platform.pconfig_result = PconfigResult.SUCCESS
        return True

    return seam.intercept(SeamcallLeaf.TDH_MNG_KEY_CONFIG, configure)
