"""Replay: what it compares, and how it speaks about files that are damaged."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.gprs import R10, R11, R12, R13, RCX
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.replay import Replayer, ReplayFormatError, read_records, replay
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.metadata import Context
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile
from sim_backend.vector_comparison import is_not_compared
from sim_backend.vector_state import adopt_uuids

GOLDEN = Path(__file__).parents[1] / "golden" / "tdx_module"
RESET = {"i": 0, "op": "reset", "lps": 4, "pkgs": 2, "cmrs": [["0x100000", "0xbff00000"]]}
SYS_INIT = {"i": 1, "op": "seamcall", "lp": 0, "leaf": 33, "ver": 0, "in": {"rax": "0x21"}, "res": "ret",
            "rax": "0x0", "out": {}}  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_plain_file_is_read_like_a_compressed_one(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", RESET, SYS_INIT)
    compressed = tmp_path / "a.jsonl.gz"
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_records(plain)) == list(read_records(compressed)) == [RESET, SYS_INIT]


def test_agreement_is_silent(tmp_path: Path) -> None:
    assert [divergence for _, divergence in replay(write(tmp_path / "a.jsonl", RESET, SYS_INIT))] == [None, None]


@pytest.mark.parametrize(
    "change",
    [{"rax": "0xc000050000000000"}, {"out": {"rcx": "0x1"}}, {"res": "td_entry", "guest": {}}],
    ids=["status", "output", "entry"],
)
def test_a_different_answer_is_a_divergence(tmp_path: Path, change: dict[str, Any]) -> None:
    changed = SYS_INIT | change | {"note": "on purpose"}
    (_, first), (record, divergence) = replay(write(tmp_path / "a.jsonl", RESET, changed))
    assert first is None
    assert divergence is not None
    assert divergence.record is record
    assert divergence.note == "on purpose"
    assert divergence.expected != divergence.got


def test_memory_that_a_record_dumps_is_compared(tmp_path: Path) -> None:
    dump = SYS_INIT | {"mem": [["0x1000", "00ff"]]}
    _, (_, divergence) = replay(write(tmp_path / "a.jsonl", RESET, dump))
    assert divergence is not None
    assert divergence.expected == "memory at 0x1000: 00ff"
    assert divergence.got == "memory at 0x1000: 0000"


def test_an_output_that_a_record_leaves_out_must_be_zero(tmp_path: Path) -> None:
    read = {"i": 2, "op": "seamcall", "lp": 0, "in": {"rax": "0x2c", "r15": "0x5"}, "res": "ret", "rax": "0x0",
            "out": {}}  # fmt: skip
    *_, (_, divergence) = replay(write(tmp_path / "a.jsonl", RESET, read))
    assert divergence is not None
    assert "r15=0x5" in divergence.got


def test_a_truncated_compressed_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes((GOLDEN / "mem_mgmt.jsonl.gz").read_bytes()[:1500])
    with pytest.raises(ReplayFormatError, match=r"line \d+: .*truncated"):
        list(replay(path))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a JSON object"),
        ("[1]", 'not an object with an "op"'),
        ('{"op": 5}', 'not an object with an "op"'),
        ('{"op": "reset"}', "malformed 'reset' record"),
        ('{"op": "fly"}', "malformed 'fly' record"),
        ('{"op": "seamcall", "lp": 9, "in": {"rax": "0x21"}, "res": "ret", "rax": "0x0", "out": {}}', "malformed"),
        ('{"op": "seamcall", "lp": 0, "in": {"rax": "zz"}, "res": "ret", "rax": "0x0", "out": {}}', "malformed"),
        ('{"op": "unhold"}', "malformed"),
        ('{"op": "tdcall", "lp": 0, "in": {}, "res": "guest", "guest": {}}', "malformed"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RESET) + "\n" + line + "\n")
    with pytest.raises(ReplayFormatError) as error:
        list(replay(path))
    assert error.value.line == 2
    assert why in error.value.why


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(RESET).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ReplayFormatError, match="UTF-8"):
        list(replay(path))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(replay(tmp_path / "none.jsonl"))


def test_a_file_must_begin_with_a_reset(tmp_path: Path) -> None:
    with pytest.raises(ReplayFormatError, match=r'line 1: .*does not begin with a "reset"'):
        list(replay(write(tmp_path / "a.jsonl", SYS_INIT)))


def test_a_held_lock_makes_leaves_fail_and_remembers_them() -> None:
    replayer = Replayer()
    replayer.apply(RESET)
    assert replayer.apply({"op": "hold", "what": "global", "arg": "0x0", "mode": "ex", "size": 0}) is None
    busy = SYS_INIT | {"rax": "0x8000020200000000"}
    assert replayer.apply(busy) is None
    assert replayer.apply({"op": "unhold", "residual": "0x0"}) is None
    assert replayer.apply(SYS_INIT) is None
    replayer.close()


def seamcall(lp: int, rax: str, leaf: int, out: dict[str, str] | None = None, **operands: int) -> dict[str, Any]:
    given = {"rax": hex(leaf)} | {name: hex(value) for name, value in operands.items()}
    return {"op": "seamcall", "lp": lp, "in": given, "res": "ret", "rax": rax, "out": out or {}}


def test_what_the_model_does_not_know_is_a_divergence_and_the_rest_is_replayed(tmp_path: Path) -> None:
    lp_inits = [seamcall(lp, "0x0", 35) for lp in range(4)]
    nowhere = seamcall(0, "0x0", 32, rcx=5 << 32, rdx=1024, r8=1 << 20, r9=32)
    records = [RESET, SYS_INIT, *lp_inits, nowhere, seamcall(0, "0xc000050b00000000", 44), RESET, SYS_INIT]
    found = [divergence for _, divergence in replay(write(tmp_path / "a.jsonl", *records))]
    assert [divergence is not None for divergence in found] == [False] * 6 + [True, True, False, False]
    assert "not modelled: no memory at HPA 0x500000000" in found[6].got  # type: ignore[union-attr]


def test_a_record_that_lacks_what_a_divergence_left_undone_is_no_malformed_one(tmp_path: Path) -> None:
    guest = {"op": "tdcall", "lp": 0, "in": {}, "res": "guest", "guest": {}}
    wrong = SYS_INIT | {"rax": "0x1"}
    *_, (_, divergence) = replay(write(tmp_path / "a.jsonl", RESET, wrong, guest))
    assert divergence is not None
    assert divergence.got == "after an earlier divergence: LP 0 runs no TD"
    with pytest.raises(ReplayFormatError, match="LP 0 runs no TD"):
        list(replay(write(tmp_path / "b.jsonl", RESET, wrong, RESET, guest)))


@pytest.mark.parametrize(
    ("field_id", "context", "expected"),
    [
        (0x8010000300000020, Context.TD, True),  # TD_UUID
        (0x0000000000000020, Context.TD, True),  # the same by other bits of its id
        (0x8010000300000024, Context.TD, False),
        (0x1110000300000000 | 0xA, Context.TD, True),  # TSC_OFFSET
        (0x111000010000000C, Context.TD, False),  # TSC_FREQUENCY: TD_PARAMS tells it
        (0x111000030000000C, Context.TD, False),
        (0x0024000300002010, Context.VP, True),  # TSC offset of the VMCS
        (0x0024000300002010, Context.TD, False),
        (0xA02000030000000A, Context.VP, True),  # LAST_EXIT_TSC
        (0xA020000300000020, Context.VP, False),
    ],
)
def test_only_random_numbers_and_tsc_values_are_not_compared(field_id: int, context: Context, expected: bool) -> None:
    assert is_not_compared(field_id, context) is expected


def test_a_recorded_binding_brings_the_recorders_uuids() -> None:
    platform = load_platform("golden")
    host = SeamcallHost(TdxModule(platform, PhysicalMemory(platform.ram_bytes), load_profile("1.5.01"), StaticCpus()))
    host.bring_up()
    target, service = host.create_td(init=False), host.create_td()
    host.create_vcpu(service)
    host.finalize(service)
    uuid = [3, 5, 7, 1 << 63]
    handle = (target.tdr + 0x1234) % (1 << 64)
    recorded = {name: hex(value) for name, value in zip(("r10", "r11", "r12", "r13"), uuid, strict=True)}
    bind = seamcall(0, "0x0", 48, {"rcx": hex(handle), **recorded}, rcx=target.tdr, rdx=service.tdr)
    adopt_uuids(host.module, bind)
    regs = host.call(48, rcx=target.tdr, rdx=service.tdr)
    assert regs[RCX] == handle
    assert [regs[register] for register in (R10, R11, R12, R13)] == uuid
