"""Replay of recorded SEAMCALL vectors: apply each record to a fresh module and compare what it answers.

The format is that of tests/golden (its README.md): one JSON object a line. LPs are driven one at a time; other LPs
that hold a lock are emulated by writing the lock word, as the recorder did.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sim_backend.cpu.static_cpu import StaticCpu, StaticCpus
from sim_backend.hw.gprs import R8, RAX, RCX, RDX, Gprs, new_gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import Platform, load_platform
from sim_backend.tdx_module.cpuid_virtualization import cpuid_index
from sim_backend.tdx_module.locks import HP_READER, READER, HostPriorityLock, SharexLock
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.profile import load_profile
from sim_backend.tdx_module.tdcs import MSR_BITMAP_PAGE
from sim_backend.tdx_module.tdr import Tdr
from sim_backend.vector_comparison import (
    GUEST_OUTPUTS,
    HOST_OUTPUTS,
    INDEX,
    METADATA_SEAMCALLS,
    METADATA_TDCALLS,
    TD_EXIT_OUTPUTS,
    is_not_compared,
    same_registers,
)
from sim_backend.vector_file import Record, ReplayFormatError, read_records
from sim_backend.vector_state import adopt_uuids, held, native_msrs, released
from uapi_ctypes.tdx_leaves import SeamcallLeaf

__all__ = ["Divergence", "Record", "ReplayFormatError", "Replayer", "read_records", "replay"]

_GUEST_STEP_BYTES: Final = 64  # how far the recorder moved RIP before each guest operation
_GUEST_STEP_TICKS: Final = 100_000_000
_TDCALL: Final = 77
_NOT_IN_64BIT_MODE: Final = "not in 64b mode"  # the recorder's note on the operations of which this is true
_EFER_LMA: Final = 1 << 10
_CS_L: Final = 1 << 13
_DPL: Final = 3 << 5


@dataclass(frozen=True, slots=True)
class Divergence:
    """One record that the model answers differently."""

    record: Record
    expected: str
    got: str

    @property
    def note(self) -> str:
        """What the recorder said the record is about, or nothing."""
        return str(self.record.get("note", ""))


class StateError(LookupError):
    """A record acts on something that the module does not have: a running TD, a TDR, a PAMT block."""


class Replayer:
    """Applies records, in order, to the module they describe."""

    def __init__(self, *, profile: str = "1.5.01", platform: str = "golden") -> None:
        self._profile = load_profile(profile)
        self._platform_name = platform
        self._platform: Platform | None = None
        self._memory: PhysicalMemory | None = None
        self._module: TdxModule | None = None
        self._ticks = 0
        self._regs: Gprs = new_gprs()
        self._host_regs: dict[int, Gprs] = {}  # of each LP, at its last TD entry
        self._last_init: int | None = None  # HPA of the TDR of the last TDH.MNG.INIT
        self._holds: list[Record] = []
        self._operations: dict[str, Callable[[Record], str | None]] = {
            "reset": self._reset,
            "msr": self._msr,
            "pconfig": self._pconfig,
            "rand_fail": self._rand_fail,
            "host_write": self._host_write,
            "host_fill": self._host_fill,
            "seamcall": self._seamcall,
            "tdcall": self._guest_operation,
            "vmexit": self._guest_operation,
            "msr_native": self._msr_native,
            "hold": self._hold,
            "unhold": self._unhold,
            "virt_cpuid": self._virt_cpuid,
            "msr_bitmap_native": self._msr_bitmap_native,
            "tdmr_init_all": self._tdmr_init_all,
            "tdmr_init_repeat": self._tdmr_init_repeat,
            "tdmr_init_until_done": self._tdmr_init_all,
        }

    def close(self) -> None:
        """Give the simulated RAM back."""
        if self._memory is not None:
            self._module = None
            self._memory.close()
            self._memory = None

    @property
    def module(self) -> TdxModule:
        """The module of the last `reset`; raise ``LookupError`` before the first."""
        if self._module is None:
            raise LookupError('the file does not begin with a "reset" record')
        return self._module

    def apply(self, record: Record) -> Divergence | None:
        """Apply one record; return how the answer differs, if it does.

        Raise ``ValueError``, ``TypeError``, ``LookupError`` or ``AttributeError`` on a malformed record, `NotModelled`
        where the model knows too little.
        """
        difference = self._operations[record["op"]](record)
        if difference is None:
            return None
        expected, _, got = difference.partition("\n")
        return Divergence(record, expected, got)

    # The machine

    def _reset(self, record: Record) -> None:
        self.close()
        cmrs = [(_number(base), _number(size)) for base, size in record["cmrs"]]
        platform = load_platform(self._platform_name, lps=record["lps"], packages=record["pkgs"], cmrs=cmrs)
        self._ticks = 1 << 40
        self._last_init = None
        self._holds = []
        self._host_regs = {}
        platform.clock = self._clock
        platform.tsc_hz = 1_000_000_000
        platform.report_key = None  # the recorder's CPU makes no MACs
        self._platform = platform
        self._memory = PhysicalMemory(platform.ram_bytes)
        self._module = TdxModule(platform, self._memory, self._profile, StaticCpus())

    def _clock(self) -> int:
        self._ticks += 1000
        return self._ticks

    def _msr(self, record: Record) -> None:
        self.module.platform.wrmsr(_number(record["a"]), _number(record["v"]), record.get("lp"))

    def _pconfig(self, record: Record) -> None:
        self.module.platform.pconfig_result = record["rc"]

    def _rand_fail(self, record: Record) -> None:
        self.module.platform.rand_fail = record["n"]

    def _host_write(self, record: Record) -> None:
        data = bytes.fromhex(record["hex"])
        self.module.memory.write(_number(record["pa"]), data.ljust(record["len"], b"\0"))

    def _host_fill(self, record: Record) -> None:
        first = record["k"]
        self.module.memory.write(_number(record["pa"]), bytes((7 * j + first) & 0xFF for j in range(256)) * 16)

    # Calls

    def _lp(self, record: Record) -> int:
        lp = record["lp"]
        if not 0 <= lp < len(self.module.platform.lps):
            raise ValueError(f"there is no LP {lp}")
        return int(lp)

    def _pamt_entry(self, hold: Record) -> int:
        page = _number(hold["arg"])
        if page >> 30 not in self.module.pamt.blocks:
            raise StateError(f"no initialised PAMT covers HPA {page:#x}")
        return self.module.pamt.entry(page, _number(hold.get("size", 0)))

    def _seamcall(self, record: Record) -> str | None:
        regs = self._regs
        regs[:] = _ZERO_GPRS
        for name, value in record["in"].items():
            regs[INDEX[name]] = int(value, 16)
        module = self.module
        leaf = regs[RAX] & 0xFFFF
        if leaf == SeamcallLeaf.TDH_MNG_INIT:
            self._last_init = regs[RCX]
        elif leaf in METADATA_SEAMCALLS and is_not_compared(regs[RDX], METADATA_SEAMCALLS[leaf]):
            return self._seamcall_without_value(record)
        elif leaf == SeamcallLeaf.TDH_SERVTD_BIND and record.get("rax") == "0x0":
            adopt_uuids(module, record)
        lp = self._lp(record)
        entered = module.seamcall(lp, regs)
        if entered:
            self._host_regs[lp] = regs[:]
        if record["res"] == "ret":
            if not entered:
                out = record["out"]
                if regs[RAX] == int(record["rax"], 16) and same_registers(out, regs, HOST_OUTPUTS):
                    return self._compare_memory(record) if "mem" in record else None
            return self._describe(record, regs, entered=entered)
        if entered:
            guest = _cpu(module, lp).gprs
            if same_registers(record["guest"], guest, GUEST_OUTPUTS):
                return None
        return self._describe(record, regs, entered=entered)

    def _seamcall_without_value(self, record: Record) -> str | None:
        """Execute a metadata access, and compare everything but the value in R8."""
        regs = self._regs
        self.module.seamcall(self._lp(record), regs)
        out = {name: value for name, value in record["out"].items() if name != "r8"}
        regs[R8] = 0
        if regs[RAX] == int(record["rax"], 16) and same_registers(out, regs, HOST_OUTPUTS):
            return None
        return self._describe(record, regs, entered=False)

    def _compare_memory(self, record: Record) -> str | None:
        for address, expected in record["mem"]:
            got = self.module.memory.read(_number(address), len(expected) // 2).hex()
            if got != expected:
                return f"memory at {address}: {expected}\nmemory at {address}: {got}"
        return None

    def _guest_operation(self, record: Record) -> str | None:
        module = self.module
        lp = self._lp(record)
        cpu = _cpu(module, lp)
        self._ticks += _GUEST_STEP_TICKS
        cpu.rip = (cpu.rip + _GUEST_STEP_BYTES) & 0xFFFF_FFFF_FFFF_FFFF
        cpu.gprs[:] = _ZERO_GPRS
        for name, value in record["in"].items():
            cpu.gprs[INDEX[name]] = int(value, 16)
        if _NOT_IN_64BIT_MODE not in record.get("note", ""):
            cpu.state.efer |= _EFER_LMA
            cpu.state.cs.ar |= _CS_L
            cpu.state.ss.ar &= ~_DPL
        cpu.take_injected()  # what the last entry delivered
        exit_ = cpu.exit
        not_compared = False
        if record["op"] == "tdcall":
            context = METADATA_TDCALLS.get(cpu.gprs[RAX] & 0xFFFF)
            not_compared = context is not None and is_not_compared(cpu.gprs[RDX], context)
            exit_.reason, exit_.instruction_length = _TDCALL, 4
            exit_.qualification = exit_.gpa = exit_.gla = 0
            exit_.interruption_info = exit_.instruction_info = 0
        else:
            exit_.reason = _number(record["reason"])
            exit_.qualification = _number(record.get("qual", 0))
            exit_.gpa = _number(record.get("gpa", 0))
            exit_.gla = _number(record.get("gla", 0))
            exit_.interruption_info = _number(record.get("inter", 0))
            exit_.instruction_length = _number(record.get("ilen", 0))
            exit_.instruction_info = _number(record.get("info", 0))
        regs = self._regs
        regs[:] = self._host_regs.get(lp, _ZERO_GPRS)
        left = module.vmexit(lp, regs)
        if record["res"] == "td_exit":
            if left and regs[RAX] == int(record["rax"], 16) and same_registers(record["out"], regs, TD_EXIT_OUTPUTS):
                return None
            return self._describe(record, regs if left else cpu.gprs, entered=not left)
        injected = cpu.take_injected()
        guest, gprs = record["guest"], cpu.gprs
        if not_compared:
            guest, gprs = {name: value for name, value in guest.items() if name != "r8"}, cpu.gprs[:]
            gprs[R8] = 0
        same = not left and same_registers(guest, gprs, GUEST_OUTPUTS)
        wanted = _number(record.get("inject", 0)), _number(record.get("inject_err", 0))
        if same and (injected, cpu.injected_error if injected else 0) == wanted:
            return self._compare_memory(record) if "mem" in record else None
        return self._describe(record, regs if left else cpu.gprs, entered=not left, injected=injected)

    def _describe(self, record: Record, regs: Gprs, *, entered: bool, injected: int = 0) -> str:
        """Return the expected and the actual answer, a line each."""
        outputs = GUEST_OUTPUTS if entered else TD_EXIT_OUTPUTS
        got = "td_entry or guest" if entered else "ret or td_exit"
        if not entered:
            got += f" rax={regs[RAX]:#x}"
        got += "".join(f" {name}={regs[index]:#x}" for name, index in outputs if regs[index])
        if injected:
            got += f" inject={injected:#x}"
        return f"{_recorded_answer(record)}\n{got}"

    # Looks at state

    def _msr_native(self, record: Record) -> str | None:
        tdvps = next((each for each in self.module.running if each is not None), None)
        if tdvps is None:
            raise StateError("no LP runs a TD")
        exits = tdvps.tdr.tdcs.msr_bitmap.exits(_number(record["msr"]), bool(record["wr"]))
        return "native\nintercepted" if exits else None

    def _configured_tdr(self) -> Tdr:
        if self._last_init is None:
            raise LookupError("no TDH.MNG.INIT before")
        return self._tdr(self._last_init)

    def _tdr(self, hpa: int) -> Tdr:
        tdr = self.module.tdrs.get(hpa)
        if tdr is None:
            raise StateError(f"there is no TDR at HPA {hpa:#x}")
        return tdr

    def _virt_cpuid(self, record: Record) -> str | None:
        tdcs = self._configured_tdr().tdcs
        wrong: list[tuple[str, str, str]] = []
        for key, expected in record["vals"].items():
            leaf, _, subleaf = key.partition(".")
            index = cpuid_index(int(leaf, 16), int(subleaf or "0", 16))
            if index is None:
                raise ValueError(f"CPUID leaf {key} is not virtualised")
            low, high = tdcs.cpuid_values[index]
            got = (low | high << 64).to_bytes(16, "little").hex()
            if got != expected:
                wrong.append((key, expected, got))
        if not wrong:
            return None
        return "\n".join(" ".join(f"{each[0]}={each[column]}" for each in wrong) for column in (1, 2))

    def _msr_bitmap_native(self, record: Record) -> str | None:
        tdr = self._configured_tdr()
        page = self.module.memory.read(tdr.tdcx_pa[MSR_BITMAP_PAGE], 4096)
        expected = [sorted(_number(msr) for msr in record[access]) for access in ("rd", "wr")]
        got = [native_msrs(page[offset : offset + 2048]) for offset in (0, 2048)]
        return None if expected == got else f"{_hex(expected)}\n{_hex(got)}"

    # Locks that another LP holds

    def _lock(self, record: Record) -> SharexLock | HostPriorityLock:
        what = record["what"]
        if what == "global":
            return self.module.global_lock
        if what == "kot":
            return self.module.kot.lock
        tdcs = self._tdr(_number(record["arg"])).tdcs
        lock: SharexLock | HostPriorityLock = getattr(tdcs, what)
        return lock

    def _hold(self, record: Record) -> None:
        self._holds.append(record)
        mode = record["mode"]
        if record["what"] == "pamt":
            index = self._pamt_entry(record)
            q = self.module.q
            q[index] = held(q[index] & 0xFFFF, mode, HP_READER) | q[index] & ~0xFFFF
            return
        lock = self._lock(record)
        lock.raw = held(lock.raw, mode, HP_READER if isinstance(lock, HostPriorityLock) else READER)

    def _unhold(self, record: Record) -> str | None:
        if not self._holds:
            raise LookupError("nothing is held")
        hold = self._holds.pop()
        mode = hold["mode"]
        if hold["what"] == "pamt":
            index = self._pamt_entry(hold)
            q = self.module.q
            word = released(q[index] & 0xFFFF, mode, host_priority=True)
            q[index] = word | q[index] & ~0xFFFF
        else:
            lock = self._lock(hold)
            word = lock.raw = released(lock.raw, mode, host_priority=isinstance(lock, HostPriorityLock))
        expected = _number(record.get("residual", 0))
        return None if word == expected else f"residual {expected:#x}\nresidual {word:#x}"

    # Bulk

    def _tdmr_init_all(self, record: Record) -> str | None:
        try:
            calls, rdx = self.module.tdmr_init_all(_number(record["tdmr"]))
        except LookupError as error:
            raise StateError(*error.args) from None
        expected = record.get("calls", calls), _number(record.get("last_rdx", rdx))
        if (calls, rdx) == expected:
            return None
        return f"{expected[0]} calls, rdx={expected[1]:#x}\n{calls} calls, rdx={rdx:#x}"

    def _tdmr_init_repeat(self, record: Record) -> None:
        for _ in range(record["n"]):
            regs = new_gprs()
            regs[RAX], regs[INDEX["rcx"]] = 36, _number(record["tdmr"])
            self.module.seamcall(record.get("lp", 0), regs)


_ZERO_GPRS: Final = new_gprs()


def _number(value: int | str) -> int:
    return value if isinstance(value, int) else int(value, 0)


def _hex(lists: list[list[int]]) -> str:
    return " | ".join(" ".join(f"{value:#x}" for value in values) for values in lists)


def _cpu(module: TdxModule, lp: int) -> StaticCpu:
    tdvps = module.running[lp]
    if tdvps is None or not isinstance(tdvps.cpu, StaticCpu):
        raise StateError(f"LP {lp} runs no TD")
    return tdvps.cpu


def _recorded_answer(record: Record) -> str:
    wanted = {"rax": record["rax"]} if "rax" in record else {}
    wanted.update(record.get("out") or record.get("guest") or {})
    answer = " ".join([record.get("res", "no answer"), *(f"{name}={value}" for name, value in wanted.items())])
    return f"{answer} inject={record['inject']}" if "inject" in record else answer


def _is_from_the_module(error: BaseException) -> bool:
    """Tell whether the module's model raised `error`: then it is our bug, not the record's."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals["__name__"].startswith("sim_backend.tdx_module."):
            return True
        traceback = traceback.tb_next
    return False


def replay(path: Path, *, profile: str = "1.5.01") -> Iterator[tuple[Record, Divergence | None]]:
    """Replay one file; yield each record with its divergence.

    What the model does not know is a divergence too, and so is a record that acts on what an earlier divergence left
    undone. Raise `ReplayFormatError` on a malformed or truncated file, ``OSError`` when it cannot be read.
    """
    replayer = Replayer(profile=profile)
    derailed = False  # some record since the last reset was answered differently
    try:
        for line, record in enumerate(read_records(path), 1):
            try:
                divergence = replayer.apply(record)
            except NotModelled as error:
                divergence = Divergence(record, _recorded_answer(record), str(error))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                if derailed and isinstance(error, StateError):
                    divergence = Divergence(record, _recorded_answer(record), f"after an earlier divergence: {error}")
                elif _is_from_the_module(error):
                    raise
                else:
                    raise ReplayFormatError(line, f"malformed {record['op']!r} record: {error!r}") from error
            derailed = (derailed and record["op"] != "reset") or divergence is not None
            yield record, divergence
    finally:
        replayer.close()
