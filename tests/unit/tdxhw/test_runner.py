"""The runner and the pytest plugin, on hosts whose kernel is a table: skips, promises, leftovers, exit codes."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tdxhw.console import SilentDisplay
from tdxhw.errors import HarnessError
from tdxhw.results import RunRecord
from tdxhw.runner import RunOptions, run_on
from tests.unit.tdxhw.fake_host import MAINLINE_CAPS, PLAIN_CAPS, V17_CAPS, FakeHost, fake_backend

HEADER = "import errno, time, pytest\nfrom uapi_ctypes.errors import KvmError\n"


@pytest.fixture
def mainline() -> FakeHost:
    return FakeHost("mainline", MAINLINE_CAPS)


@pytest.fixture
def v17() -> FakeHost:
    return FakeHost("v17", V17_CAPS)


@pytest.fixture
def plain() -> FakeHost:
    return FakeHost("plain", PLAIN_CAPS)


class Run:
    """Runs a suite given as source text."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, source: str, *hosts: FakeHost, promises: tuple[str, ...] = (), **options: object) -> RunRecord:
        path = self._directory / "test_own.py"
        path.write_text(HEADER + source)
        sys.modules.pop("test_own", None)  # pytest would take the previous test's
        backend = fake_backend(*hosts, promises=promises)
        return run_on(backend, [path], RunOptions(**options), SilentDisplay())  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def outcomes(record: RunRecord) -> list[tuple[str, str, str]]:
    return [(result.test, result.host, result.outcome) for result in record.results]


def test_every_test_runs_once_on_each_host(run: Run, mainline: FakeHost, v17: FakeHost) -> None:
    record = run("def test_it(kvm): assert kvm.get_api_version() == 12\n", mainline, v17)

    assert record.exit_code == 0
    assert outcomes(record) == [("test_it", "mainline", "passed"), ("test_it", "v17", "passed")]
    assert [result.provenance["dialect"] for result in record.results] == ["mainline", "v17"]


def test_a_dialect_s_test_runs_on_that_dialect_only(run: Run, mainline: FakeHost, v17: FakeHost) -> None:
    record = run("@pytest.mark.dialects('v17')\ndef test_it(dialect): assert dialect.name == 'v17'\n", mainline, v17)

    assert outcomes(record) == [("test_it", "v17", "passed")]


def test_a_dialect_s_test_without_such_a_host_is_visible_as_a_skip(run: Run, mainline: FakeHost) -> None:
    record = run("@pytest.mark.dialects('v17')\ndef test_it(host): pass\n", mainline)

    assert outcomes(record) == [("test_it", "mainline", "skipped")]
    assert record.results[0].reason == "needs dialect v17: this kernel speaks mainline"


def test_an_unmet_capability_skips_and_says_why(run: Run, plain: FakeHost) -> None:
    record = run("@pytest.mark.requires('kvm', 'tdx')\ndef test_it(host): assert False\n", plain)

    assert record.exit_code == 0
    assert outcomes(record) == [("test_it", "plain", "skipped")]
    assert record.results[0].reason == "needs tdx: this kernel has no TDX (KVM_CAP_VM_TYPES shows no TD type)"


def test_a_capability_is_probed_once_a_session(run: Run, plain: FakeHost) -> None:
    source = "".join(f"@pytest.mark.requires('two-vcpus')\ndef test_{n}(host): pass\n" for n in range(5))

    record = run(source, plain)

    assert record.count("skipped") == 5
    assert plain.fake.asked.count("KVM_CHECK_EXTENSION") == 1


def test_a_promised_capability_that_is_missing_ends_the_session(run: Run, plain: FakeHost) -> None:
    with pytest.raises(HarnessError, match="host plain was promised to offer 'tdx', but this kernel has no TDX"):
        run("def test_it(host): pass\n", plain, promises=("tdx",))


def test_a_promise_that_is_kept_changes_nothing(run: Run, mainline: FakeHost) -> None:
    assert run("def test_it(host): pass\n", mainline, promises=("tdx", "two-vcpus")).exit_code == 0


def test_an_unknown_capability_in_a_marker_is_an_error(run: Run, mainline: FakeHost) -> None:
    with pytest.raises(HarnessError, match=r"test_it.*no capability 'tdy'; did you mean 'tdx'\?"):
        run("@pytest.mark.requires('tdy')\ndef test_it(host): pass\n", mainline)


def test_an_unknown_promise_is_an_error(run: Run, mainline: FakeHost) -> None:
    with pytest.raises(HarnessError, match="no capability 'hkids>=0'"):
        run("def test_it(host): pass\n", mainline, promises=("hkids>=0",))


def test_a_suite_asked_for_by_name_that_cannot_run_is_an_error(run: Run, plain: FakeHost) -> None:
    source = "pytestmark = pytest.mark.requires('tdx')\ndef test_it(host): pass\n"

    with pytest.raises(HarnessError, match=r"suite 'own' needs 'tdx', but this kernel has no TDX.*--on sim"):
        run(source, plain, suites=("own",))


def test_a_failed_call_is_told_in_one_line_first(run: Run, mainline: FakeHost) -> None:
    source = "def test_it(host): raise KvmError('KVM_TDX_INIT_VM', errno.EINVAL, hw_error=0xc000010000000045)\n"

    record = run(source, mainline)

    (result,) = record.results
    assert (record.exit_code, result.outcome) == (1, "failed")
    assert result.reason == "KVM_TDX_INIT_VM: EINVAL; TDX module: OPERAND_INVALID(CPUID_CONFIG)"
    assert "Traceback" in result.details or "def test_it" in result.details


def test_a_limit_of_the_simulator_is_one_line_and_the_test_s_own(run: Run, mainline: FakeHost) -> None:
    source = (
        "from uapi_ctypes.errors import BackendLimit\n"
        "def deep():\n"
        "    limit = BackendLimit('cannot execute a VEX-encoded instruction at RIP 0x10: bytes c5 f1')\n"
        "    limit.registers = {'rip': 16, 'rax': 255}\n"
        "    raise limit\n"
        "def test_it(host):\n    deep()\n"
    )

    record = run(source, mainline)

    (result,) = record.results
    assert (record.exit_code, result.outcome) == (1, "failed")
    assert result.reason == (
        "the simulator cannot go on: cannot execute a VEX-encoded instruction at RIP 0x10: bytes c5 f1; "
        "rip=0x10 rax=0xff"
    )
    assert result.details.splitlines() == ["test_own.py:7: raise limit", result.reason]


def test_what_a_test_leaves_over_is_an_error_and_not_the_next_one_s(run: Run, mainline: FakeHost) -> None:
    source = "def test_a(kernel): kernel.open('/dev/kvm')\ndef test_b(kernel): pass\n"

    record = run(source, mainline)

    assert outcomes(record) == [("test_a", "mainline", "error"), ("test_b", "mainline", "passed")]
    assert "left over on the simulated host: fd " in record.results[0].reason
    assert mainline.restarts == 1


def test_fixtures_leave_nothing_over_when_a_test_fails(run: Run, mainline: FakeHost) -> None:
    record = run(
        "def test_it(kvm, ordinary_vm, trust_domain):\n    ordinary_vm()\n    trust_domain().create()\n", mainline
    )

    assert outcomes(record) == [("test_it", "mainline", "failed")]
    assert not mainline.fake.open_fds


def test_a_test_that_never_ends_fails_at_its_limit(run: Run, mainline: FakeHost) -> None:
    source = "@pytest.mark.time_limit(0.1)\ndef test_a(host): time.sleep(60)\ndef test_b(host): pass\n"

    record = run(source, mainline)

    assert outcomes(record) == [("test_a", "mainline", "failed"), ("test_b", "mainline", "passed")]
    assert record.results[0].reason == "the test was still running after its time limit of 0.1 s"


def test_the_time_limit_of_the_command_line_holds_for_every_test(run: Run, mainline: FakeHost) -> None:
    record = run("def test_a(host): time.sleep(60)\n", mainline, time_limit_s=0.1)

    assert outcomes(record) == [("test_a", "mainline", "failed")]


def test_a_keyword_selects_tests(run: Run, mainline: FakeHost) -> None:
    record = run("def test_a(host): pass\ndef test_b(host): assert False\n", mainline, keyword="not test_b")

    assert outcomes(record) == [("test_a", "mainline", "passed")]


def test_selecting_nothing_is_an_error(run: Run, mainline: FakeHost) -> None:
    with pytest.raises(HarnessError, match="no test matches"):
        run("def test_a(host): pass\n", mainline, keyword="zzz")


def test_a_suite_that_cannot_be_imported_is_an_error_in_one_line(run: Run, mainline: FakeHost) -> None:
    with pytest.raises(HarnessError, match=r"test_own.py: .*No module named 'no_such_module'"):
        run("import no_such_module\n", mainline)


def test_ctrl_c_is_130_and_keeps_the_results_so_far(run: Run, mainline: FakeHost, tmp_path: Path) -> None:
    source = "def test_a(host): pass\ndef test_b(host): raise KeyboardInterrupt\ndef test_c(host): pass\n"

    record = run(source, mainline, junit=tmp_path / "j.xml", report_log=tmp_path / "log.jsonl")

    assert (record.exit_code, record.interrupted, record.planned) == (130, True, 3)
    assert outcomes(record) == [("test_a", "mainline", "passed")]
    names = [case.get("name") for case in ET.parse(tmp_path / "j.xml").iter("testcase")]
    assert names[0] == "test_a[mainline]"
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["$report_type"] == "SessionFinish"


def test_junit_says_where_each_result_comes_from(run: Run, mainline: FakeHost, tmp_path: Path) -> None:
    run("def test_a(host): pass\n", mainline, junit=tmp_path / "j.xml")

    (suite,) = ET.parse(tmp_path / "j.xml").iter("testsuite")
    properties = {p.get("name"): p.get("value") for p in suite.findall("properties/property")}
    assert suite.get("name") == "tdxhw"
    assert properties["tdxhw.mainline.kernel"] == "0.0"
    case = {p.get("name"): p.get("value") for p in suite.findall("testcase/properties/property")}
    assert case["tdxhw.backend"] == "fake"


def test_the_report_log_begins_with_provenance(run: Run, mainline: FakeHost, tmp_path: Path) -> None:
    run("def test_a(host): pass\n", mainline, report_log=tmp_path / "log.jsonl")

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["hosts"]["mainline"]["backend"] == "fake"
    happened = [line.get("when", line["$report_type"]) for line in lines[1:-1]]
    assert happened == ["TestStart", "setup", "call", "teardown"]


def test_a_host_s_name_and_further_parameters_are_told_apart(run: Run, mainline: FakeHost) -> None:
    record = run("@pytest.mark.parametrize('n', [1, 2])\ndef test_a(host, n): pass\n", mainline)

    assert outcomes(record) == [("test_a[1]", "mainline", "passed"), ("test_a[2]", "mainline", "passed")]
