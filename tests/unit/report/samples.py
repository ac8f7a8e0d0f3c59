"""Results to make reports from: simulator and two lab hosts, every status, and text that wants to break formats."""

from tdxhw.report.results import Result, Results, Status

SIM = {
    "backend": "sim", "profile": "mainline", "dialect": "mainline", "kernel": "7.3.0", "tdx_module": "mainline-host",
    "cpu": "simulated", "microcode": "0x0", "tdxhw": "0.1.0",
}  # fmt: skip
SPR = {
    "backend": "local", "dialect": "mainline", "kernel": "6.19.0-3-generic", "tdx_module": "1.5.24",
    "cpu": "INTEL(R) XEON(R) PLATINUM 8480+", "microcode": "0x2b000639", "tdxhw": "0.1.0",
}  # fmt: skip
GNR = SPR | {"cpu": "INTEL(R) XEON(R) 6972P", "tdx_module": "2.0.08", "microcode": "0x10003c2"}

NASTY = "a#b <script>alert(1)</script> `x` ]]> & \x1b[31mred\x00 \"quoted\" 'é' | # SKIP ```\n```"
TRACEBACK = """\
    def test_finalize_twice_is_einval(td):
>       assert error.value.errno == errno.EINVAL
E       AssertionError: assert 5 == 22

tdxhw/suites/lifecycle.py:42: AssertionError"""


def result(
    suite: str = "lifecycle",
    test: str = "test_td_is_created",
    host: str = "spr-01",
    status: Status = Status.PASS,
    provenance: dict[str, str] | None = None,
    **fields: object,
) -> Result:
    given = SPR if provenance is None else provenance
    return Result(suite, test, host, status, provenance=given, **{"duration_s": 0.25, "started": 1.7e9} | fields)  # type: ignore[arg-type]


def every_kind() -> Results:
    return Results(
        (
            result(host="mainline", provenance=SIM, duration_s=0.004),
            result(),
            result(test="test_finalize_twice_is_einval", status=Status.FAIL, duration_s=1.5,
                   message="KVM_TDX_FINALIZE_VM: EIO; TDX module: OP_STATE_INCORRECT", details=TRACEBACK),
            result(test="test_nasty[1]", status=Status.FAIL, message=NASTY.splitlines()[0], details=NASTY),
            result(suite="mmu", test="test_broken", status=Status.ERROR, message="NameError: name 'x'", details="E"),
            result(suite="mmu", host="gnr-01", provenance=GNR, status=Status.MISS, message="connection lost"),
            result(suite="mmu", test="test_pre_fault", host="gnr-01", provenance=GNR, status=Status.SKIP,
                   message="needs td-pre-fault: KVM_CAP_PRE_FAULT_MEMORY is 0"),
            result(suite="mmu", test="test_known", host="gnr-01", provenance=GNR, status=Status.XFAIL, message="a bug"),
        ),
        sources=("spr-01.jsonl", "gnr-01.jsonl"),
        notes=("gnr-01.jsonl has no end: the run was cut off",),
    )  # fmt: skip
