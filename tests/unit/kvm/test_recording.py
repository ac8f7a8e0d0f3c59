"""Recordings of ioctls: what is wrong with a bad one, and the host that a good one describes."""

import gzip
import json
from pathlib import Path

import pytest

from sim_backend.kvm.recorded_host import profile_of_host, profile_of_recording
from sim_backend.kvm_player import Player
from sim_backend.kvm_recording import Layout, layout, read_records
from sim_backend.kvm_replay import compare, replay
from sim_backend.vector_file import ReplayFormatError
from uapi_ctypes.linux import LinuxKernel

RECORDINGS = Path(__file__).parents[2] / "golden" / "kvm"
OPEN = {"i": 0, "scenario": "s", "fd": "host", "req": "open", "arg": {"path": "/dev/kvm"}, "ret": "kvm0", "errno": None}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line) if isinstance(line, dict) else line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ("{not json", "not a JSON object"),
        ('{"op": "seamcall"}', 'not an object with "scenario"'),
        ({**OPEN, "i": 1, "req": "juggle"}, "no step is called 'juggle'"),
        ({**OPEN, "i": 1, "fd": "vm", "obj": "vm7", "req": "close"}, "malformed record"),
        ({**OPEN, "i": 1, "nr": "0xae00", "obj": "kvm0", "arg": {"struct": "no_such"}}, "malformed record"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, second: object, why: str) -> None:
    with pytest.raises(ReplayFormatError, match=why) as refused:
        list(replay(written(tmp_path / "bad.jsonl", OPEN, second)))
    assert refused.value.line == 2


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = (RECORDINGS / "kvm-6.18-pvm" / "system.jsonl.gz").read_bytes()
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReplayFormatError, match="damaged or truncated"):
        list(read_records(path))


def test_what_a_host_says_of_itself_becomes_its_profile() -> None:
    host = json.loads((RECORDINGS / "kvm-7.2.13-svm-nested" / "host.json").read_text())
    host["caps_system"]["9"], host["kernel"] = 48, "7.2.99-other"
    host["vm_types"] = {"0": host["vm_types"]["0"]}
    profile = profile_of_host(host)
    assert (profile.n_cpus, profile.kernel_release) == (48, "7.2.99-other")
    assert dict(profile.vm_types) == {0: "default"}
    assert profile.behaves("shutdown_resets_vcpu")


@pytest.mark.parametrize("name", ["kvm-6.18-pvm", "kvm-7.2.13-svm-nested"])
def test_without_host_json_the_built_in_profile_says_the_same(tmp_path: Path, name: str) -> None:
    alone = tmp_path / name / "system.jsonl.gz"
    alone.parent.mkdir()
    told, guessed = profile_of_recording(RECORDINGS / name / "system.jsonl.gz"), profile_of_recording(alone)
    assert {cap: value for cap, value in told.capabilities.items() if value} == dict(guessed.capabilities)
    assert (told.supported_cpuid, told.msr_index_list) == (guessed.supported_cpuid, guessed.msr_index_list)


def test_every_request_with_a_structure_can_be_packed_and_read_back() -> None:
    regs = layout("regs")
    values = {name: index + 1 for index, (name, _, _) in enumerate(regs.fields)}
    assert regs.unpack(bytes(regs.pack(values, lambda _: 0))) == values


def test_a_layout_refuses_a_field_that_it_has_not() -> None:
    with pytest.raises(KeyError):
        Layout(8, (("a", "Q", 0),)).pack({"b": 1}, lambda _: 0)


def test_unstable_and_unchecked_values_are_not_compared() -> None:
    record = {**OPEN, "ret": 0, "out": {"clock": 5, "flags": 1}, "unstable": ["out.clock"]}
    assert compare(record, {"ret": 0, "out": {"clock": 9, "flags": 1}}) is None
    found = compare(record, {"ret": 0, "out": {"clock": 9, "flags": 2}})
    assert found is not None
    assert (found.expected, found.got) == ("out.flags=1", "out.flags=2")
    assert compare({**record, "check": False}, {"ret": -1}) is None


def test_a_recording_may_be_compressed_or_plain(tmp_path: Path) -> None:
    source = RECORDINGS / "kvm-6.18-pvm" / "memory_encrypt.jsonl.gz"
    plain = tmp_path / "memory_encrypt.jsonl"
    plain.write_bytes(gzip.decompress(source.read_bytes()))
    assert list(read_records(plain)) == list(read_records(source))


def test_a_closed_object_is_gone_even_where_the_simulator_takes_its_number_over(tmp_path: Path) -> None:
    create = {"nr": "0xae01", "req": "KVM_CREATE_VM", "fd": "kvm", "obj": "kvm0", "arg": {"int": 0}}
    close = {"fd": "vm", "obj": "vm0", "req": "close", "arg": {}}
    gone = {"ret": -1, "errno": "EBADF"}
    steps = [
        OPEN,
        {**OPEN, **create, "ret": "vm0"},
        {**OPEN, **close, "ret": 0},
        {**OPEN, "req": "buf", "arg": {"id": "buf0", "size": 4096, "fill": 0, "prot": "rw"}, "ret": 0},
        {**OPEN, **close, **gone},
        {**OPEN, "fd": "vm", "obj": "vm0", "req": "fstat", "arg": {}, **gone},
    ]
    path = written(tmp_path / "closed.jsonl", *({**step, "i": index} for index, step in enumerate(steps)))
    assert [divergence for _, divergence in replay(path) if divergence is not None] == []


def test_a_guest_is_interrupted_early_only_where_the_recording_says_that_it_never_exits() -> None:
    player = Player(LinuxKernel(), watchdog_s=0.25)
    run = {"nr": "0xae80", "req": "KVM_RUN", "fd": "vcpu", "obj": "vcpu0", "arg": {}}
    assert player.patience_s(run) > 1
    assert player.patience_s({**run, "watchdog": True}) == 0.25
