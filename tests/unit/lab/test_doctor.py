"""The doctor: every recorded host gets the verdict, the finding and the remedy that fit it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.lab.doctor import gather as gatherer
from tdxhw.lab.doctor.cli import doctor
from tdxhw.lab.doctor.diagnosis import CHECKS, Diagnosis, Verdict, examine
from tdxhw.lab.doctor.facts import Facts
from tdxhw.lab.doctor.finding import Status
from tdxhw.lab.doctor.kernel_log import REASONS, ModuleVersion, keyid_range, module_version, outcome
from tdxhw.lab.errors import FactsError
from tdxhw.lab.hosts import Expectation
from tests.unit.lab.recorded_hosts import HOSTS, Record, ready

PASS, WARN, FAIL, UNKNOWN = Status.PASS, Status.WARN, Status.FAIL, Status.UNKNOWN
READY, NOT_READY, COULD_NOT_TELL = Verdict.READY, Verdict.NOT_READY, Verdict.COULD_NOT_TELL


def facts_of(record: Record) -> Facts:
    return Facts.from_json(json.dumps(record), "a test")


def diagnose(name: str, expects: Expectation | None = None) -> Diagnosis:
    return examine(facts_of(HOSTS[name]()), expects)


# Host, verdict, and what stands out: check, status, a part of its detail, a part of its remedy.
EXPECTED = {
    "ready": (READY, "tdx-module", PASS, "1.5.24", ""),
    "ready_v17": (READY, "tdx-vm-type", PASS, "dialect v17", ""),
    "ready_7_3": (READY, "tdx-module", PASS, "2.0.08", ""),
    "ready_unprivileged": (READY, "tme", UNKNOWN, "EACCES", "modprobe msr"),
    "bios_without_tme": (NOT_READY, "tme", FAIL, "TME is off", "Memory Encryption"),
    "bios_without_multi_tenancy": (NOT_READY, "tme", FAIL, "TME-MK is off", "Multi-Tenancy"),
    "bios_without_key_split": (NOT_READY, "private-keyids", FAIL, "0 private KeyIDs", "key split"),
    "bios_without_seam_loader": (NOT_READY, "tdx-set-up", FAIL, "module not loaded", "SEAM loader"),
    "sockets_differ": (NOT_READY, "private-keyids", FAIL, "package 1: 0x100000002f", "every socket"),
    "mcheck_failed": (NOT_READY, "mcheck", FAIL, "0x745", "SGX factory reset"),
    "sgx_off": (READY, "mcheck", WARN, "nothing can be attested", "enable SGX"),
    "hibernation_possible": (NOT_READY, "hibernation", FAIL, "possible", "add nohibernate"),
    "parameter_missing": (NOT_READY, "kvm-intel", FAIL, "kvm_intel.tdx=N", "kvm_intel.tdx=1"),
    "old_module": (NOT_READY, "tdx-set-up", FAIL, "SYS_NOT_READY", "update"),
    "rbp_clobber": (NOT_READY, "tdx-set-up", FAIL, "corrupts RBP", "update the TDX module"),
    "wrong_kernel_booted": (NOT_READY, "booted-kernel", FAIL, "able to: 6.19.0-3-generic", "grub-reboot"),
    "debian_kernel": (NOT_READY, "kernel-config", FAIL, "CONFIG_INTEL_TDX_HOST is not set", "boot a kernel"),
    "no_configuration_no_log": (NOT_READY, "dev-kvm", FAIL, "mode 0660", "usermod -aG kvm"),
    "kvm_not_loaded": (NOT_READY, "dev-kvm", FAIL, "no /dev/kvm", "modprobe kvm_intel"),
    "cloud_guest": (NOT_READY, "bare-metal", FAIL, "Google Compute Engine", "--on sim"),
    "amd_with_sev": (NOT_READY, "tdx-vm-type", FAIL, "0x1f", ""),
    "arm_server": (NOT_READY, "cpu", FAIL, "aarch64", "--on sim"),
    "hkids_exhausted": (NOT_READY, "free-hkids", FAIL, "all 31", "end the TDs"),
    "hkids_leaked": (READY, "leftover-tds", WARN, "2 HKIDs are held, but no process", "reboot"),
    "old_python": (NOT_READY, "python", FAIL, "Python 3.9.21", "3.11"),
    "log_rotated": (READY, "tdx-set-up", UNKNOWN, "beginning of the kernel log is gone", "log_buf_len"),
    "after_a_warning": (READY, "taint", WARN, "a warning was hit", "reboot"),
    "little_memory": (NOT_READY, "memory", FAIL, "0.4 GiB", "free memory"),
    "module_reloaded": (READY, "tdx-set-up", PASS, "module initialized", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_a_recorded_host_gets_its_verdict_finding_and_remedy(name: str) -> None:
    verdict, check, status, detail, remedy = EXPECTED[name]
    diagnosis = diagnose(name)
    finding = diagnosis.findings[check]

    assert (diagnosis.verdict, finding.status) == (verdict, status), finding
    assert detail in finding.detail
    assert remedy in finding.remedy


def test_a_ready_host_has_nothing_but_passes() -> None:
    for name in ("ready", "ready_7_3"):
        assert {finding.status for finding in diagnose(name).findings.values()} == {PASS}


@pytest.mark.parametrize("name", HOSTS)
def test_what_failed_or_warned_comes_with_a_remedy(name: str) -> None:
    for check, finding in diagnose(name).findings.items():
        assert finding.remedy or finding.status is PASS or finding.detail.startswith("not looked at"), check
        assert "\n" not in finding.detail + finding.remedy


@pytest.mark.parametrize("msr", HOSTS["ready"]()["msrs"])
def test_an_msr_that_cannot_be_read_is_never_a_pass(msr: str) -> None:
    record = ready()
    record["msrs"] = {name: {"0": {"error": "EIO"}} for name in record["msrs"]}
    record["kernel_log"] = {"error": "EPERM"}
    findings = examine(facts_of(record)).findings

    for check in ("feature-control", "tme", "private-keyids", "seamrr", "mcheck"):
        assert findings[check].status is UNKNOWN, check

    record = ready()
    before = examine(facts_of(record)).findings
    record["msrs"][msr] = {"0": record["msrs"][msr]["0"], "1": {"error": "EIO"}}  # the second socket's
    after = examine(facts_of(record)).findings
    changed = {check for check in before if before[check] != after[check]}
    assert changed or msr == "0x981", "nothing judges 0x981 alone; every other MSR is looked at"
    assert not any(after[check].status is FAIL for check in changed)


def test_not_knowing_leaves_the_verdict_open_unless_kvm_proves_it() -> None:
    record = HOSTS["ready_unprivileged"]()
    assert examine(facts_of(record)).verdict is READY, "KVM offers TDX VMs: what is underneath works"

    record["kvm"]["extensions"]["KVM_CAP_VM_TYPES"] = 0
    assert examine(facts_of(record)).verdict is NOT_READY

    record = HOSTS["no_configuration_no_log"]()
    record["kvm"] = {"api_version": 12, "extensions": {}, "error": "EINTR"}
    findings = examine(facts_of(record)).findings
    assert findings["dev-kvm"].status is FAIL


def test_an_unknown_that_nothing_proves_is_could_not_tell() -> None:
    record = ready()
    record["files"]["/proc/meminfo"] = {"error": "EACCES"}

    diagnosis = examine(facts_of(record))
    assert diagnosis.findings["memory"].status is UNKNOWN
    assert diagnosis.verdict is COULD_NOT_TELL


def test_the_lab_file_can_expect_a_kernel_and_a_module() -> None:
    assert diagnose("ready", Expectation(kernel="6.19.*", module="1.5.16")).verdict is READY

    wrong_kernel = diagnose("ready", Expectation(kernel="*-intel"))
    assert wrong_kernel.findings["booted-kernel"].status is FAIL
    assert "expects *-intel" in wrong_kernel.findings["booted-kernel"].detail

    old_module = diagnose("ready", Expectation(module="1.5.25"))
    assert old_module.findings["tdx-module"].status is FAIL

    too_coarse = diagnose("ready_v17", Expectation(module="1.5.16"))
    assert too_coarse.findings["tdx-module"].status is UNKNOWN, "the log says only 1.5"
    assert too_coarse.verdict is COULD_NOT_TELL, "what was asked for is not answered"


def test_sev_on_amd_is_not_mistaken_for_tdx_of_the_v17_dialect() -> None:
    record = HOSTS["amd_with_sev"]()
    assert facts_of(record).kvm_tdx_dialect is None

    record["cpu"]["vendor_id"] = "GenuineIntel"
    assert facts_of(record).kvm_tdx_dialect == "v17"


VERSIONS = {
    # 6.8-intel
    "virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 5, "
    "build_date 20240129, build_num 698": ModuleVersion("1.5", 698, "20240129"),
    # 6.2
    "tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 0, "
    "build_date 20211209, build_num 160": ModuleVersion("1.0", 160, "20211209"),
    # 6.14-intel prints the date in hexadecimal
    "virt/tdx: TDX module 1.5.06.00, build number 744, build date 0134d817": ModuleVersion(
        "1.5.06.00", 744, "20240407"
    ),
    "virt/tdx: module version: 1.5.00.00.0481 (build_date 20230323).": ModuleVersion(
        "1.5.00.00.0481", None, "20230323"
    ),
    "virt/tdx: Module version: 1.5.00.00.0481, build_date: 20230323": ModuleVersion("1.5.00.00.0481", None, "20230323"),
    # 7.x
    "virt/tdx: TDX-Module version: 1.5.24": ModuleVersion("1.5.24"),
    "[   12.345678] virt/tdx: Module version: 2.0.08": ModuleVersion("2.0.08"),
}


@pytest.mark.parametrize("line", VERSIONS)
def test_the_module_version_is_read_from_every_wording(line: str) -> None:
    assert module_version(("noise", line, "virt/tdx: module initialized")) == VERSIONS[line]


def test_a_line_without_a_version_has_none() -> None:
    assert module_version(("virt/tdx: module initialized", "tdx: Guest detected", "kvm: version 12")) is None


FAILURES = {
    "virt/tdx: initialization failed: Hibernation support is enabled": "hibernation",
    "virt/tdx: initialization failed: too few private KeyIDs available.": "fewer than two",
    "kvm_intel: tdx: no TDX private KeyIDs available": "no private KeyIDs",
    "virt/tdx: TDX not supported by the host platform": "off in the BIOS",
    "kvm_intel: TDX not supported by the host platform": "off in the BIOS",
    "tdx: [Firmware Bug]: TDX is not enabled by BIOS": "off in the BIOS",
    "virt/tdx: module not loaded": "no TDX module",
    "tdx: No TDX module loaded by BIOS": "no TDX module",
    "virt/tdx: frame pointer (RBP) clobber bug present, upgrade TDX module": "RBP",
    "virt/tdx: XSAVE is required for TDX": "CPU feature",
    "kvm_intel: tdx: MOVDIR64B is required for TDX": "CPU feature",
    "virt/tdx: Self-snoop is required for TDX": "CPU feature",
    "kvm_intel: tdx: tdx requires kvm.enable_virt_at_load=1": "too late",
    "kvm_intel: Disable TDX: MAX_VCPU_PER_TD (64) smaller than number of logical CPUs (224).": "fewer vCPUs",
    "virt/tdx: initialization failed: TDMRs exhausted.": "fragmented",
    "virt/tdx: module initialization failed (-5)": "did not initialise",
    "virt/tdx: TDX-Module initialization failed (-5)": "did not initialise",
    "virt/tdx: initialization failed: register_memory_notifier() failed (-12)": "failed",
}


@pytest.mark.parametrize("line", FAILURES)
def test_every_way_to_fail_is_told_in_words(line: str) -> None:
    ended = outcome(("virt/tdx: BIOS enabled: private KeyID range [32, 64)", line))
    assert ended is not None
    assert ended.reason is not None
    assert FAILURES[line] in ended.reason.meaning
    assert ended.reason.remedy


def test_no_reason_is_out_of_reach_of_the_recorded_lines() -> None:
    met = {outcome((line,)) for line in FAILURES}
    reasons = [ended.reason for ended in met if ended is not None]
    assert [reason.meaning for reason in REASONS if reason not in reasons] == []


def test_the_particular_reason_is_kept_when_a_general_one_follows() -> None:
    lines = ("virt/tdx: module not loaded", "virt/tdx: module initialization failed (-19)")
    ended = outcome(lines)
    assert ended is not None
    assert ended.line == lines[0]


@pytest.mark.parametrize(
    ("line", "seamcall"),
    [
        ("virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000", (0x22, 0xC000050500000000)),
        ("tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122.", (33, 0xC000092100000122)),
    ],
)
def test_the_seamcall_that_failed_is_named_in_every_wording(line: str, seamcall: tuple[int, int]) -> None:
    ended = outcome((line, "virt/tdx: module initialization failed (-5)"))
    assert ended is not None
    assert ended.seamcall == seamcall


def test_ordinary_lines_about_tdx_end_nothing() -> None:
    assert outcome(("virt/tdx: BIOS enabled: private KeyID range [32, 64)", "tdx: Guest detected")) is None
    assert keyid_range(("virt/tdx: BIOS enabled: private KeyID range: [16, 64)",)) == (16, 64)
    assert keyid_range(("virt/tdx: BIOS enabled: private KeyID range [64, 128)",)) == (64, 128)


@given(st.lists(st.integers(0, 99), min_size=2, max_size=4), st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_versions_compare_as_numbers(mine: list[int], floor: list[int]) -> None:
    text = [".".join(f"{part:02}" for part in version) for version in (mine, floor)]
    older = ModuleVersion(text[0]).is_older_than(text[1])
    padded = [version + [0] * (4 - len(version)) for version in (mine, floor)]
    if older is None:
        assert mine == floor[: len(mine)], "too coarse means: equal as far as it goes"
        assert len(mine) < len(floor)
    else:
        assert older == (padded[0] < padded[1])


# ---- the gatherer and the command, on the machine the tests run on ----


def test_the_gatherer_runs_on_this_machine_and_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", gatherer.__file__],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=True,
    )
    facts = Facts.from_json(done.stdout, "this machine")

    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert facts.release == os.uname().release
    assert facts.python == sys.version_info[:3]
    assert facts.command_line == tuple(Path("/proc/cmdline").read_text().partition(" -- ")[0].split())
    assert facts.release in facts.kernels


def test_the_gatherer_is_sent_alone_so_it_imports_only_what_every_python_has() -> None:
    tree = ast.parse(Path(gatherer.__file__).read_text(), feature_version=(3, 7))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_the_doctor_agrees_with_kvm_about_this_machine() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    document = json.loads(result.output)
    statuses = {check["name"]: check["status"] for check in document["checks"]}
    facts = Facts.from_json(json.dumps(gatherer.gather()), "this machine")

    assert list(statuses) == [check.name for check in CHECKS]
    assert result.exit_code == ("ready", "not-ready", "could-not-tell").index(document["verdict"])
    assert (statuses["tdx-vm-type"] == "PASS") == (facts.kvm_tdx_dialect is not None)
    assert statuses["dev-kvm"] == ("PASS" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "FAIL")


@pytest.mark.parametrize(("name", "code"), [("ready", 0), ("hibernation_possible", 1)])
def test_the_command_judges_a_recorded_host(tmp_path: Path, name: str, code: int) -> None:
    path = tmp_path / "host.json"
    path.write_text(json.dumps(HOSTS[name]()))
    result = CliRunner().invoke(doctor, ["--facts", str(path)])

    assert result.exit_code == code
    assert "\x1b" not in result.output, "no colour codes where nobody looks at a terminal"
    last = result.output.splitlines()[-1]
    assert last.startswith(f"{path}: {'ready to run TDs' if code == 0 else 'not ready'}")
    assert code == 0 or "first: Hibernation: add nohibernate to the kernel command line" in last


def test_what_record_writes_facts_reads(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.write_text(CliRunner().invoke(doctor, ["--record"]).output)
    again = CliRunner().invoke(doctor, ["--facts", str(path), "--record"])

    assert again.exit_code == 2, "a usage error: --record looks at this host"
    assert json.loads(CliRunner().invoke(doctor, ["--facts", str(path), "--json"]).output)["host"] == str(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}', "null", "\x00"])
def test_a_broken_record_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(FactsError, match=r"host\.json: not what") as error:
        Facts.from_json(text, "host.json")
    assert "\n" not in str(error.value)


def test_a_missing_record_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor, ["--facts", str(tmp_path / "nowhere.json")])
    assert isinstance(result.exception, FactsError)
