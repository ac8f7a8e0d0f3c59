"""JUnit XML of merged results. A live run writes its own with pytest; this one knows hosts and provenance."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from xml.etree import ElementTree as ET

from tdxhw.report.plain_text import printable
from tdxhw.report.results import Result, Results, Status


def class_name(result: Result) -> str:
    """Return ``tdxhw.sim.SUITE`` or ``tdxhw.hw.SUITE``: a simulator pass never counts as a hardware pass."""
    return f"tdxhw.{'sim' if result.is_simulated else 'hw'}.{result.suite}"


def _add_case(suite: ET.Element, result: Result) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=printable(class_name(result)),
        name=printable(result.test),
        time=f"{result.duration_s:.6f}",
    )
    message, details = printable(result.message), printable(result.details)
    match result.status:
        case Status.FAIL:
            ET.SubElement(case, "failure", message=message, type="failure").text = details
        case Status.ERROR:
            ET.SubElement(case, "error", message=message, type="error").text = details
        case Status.MISS:
            ET.SubElement(case, "error", message=message, type="infrastructure").text = details
        case Status.XFAIL:
            ET.SubElement(case, "skipped", message=message, type="pytest.xfail")
        case Status.SKIP:
            ET.SubElement(case, "skipped", message=message, type="pytest.skip")


def _add_suite(top: ET.Element, name: str, host: str, results: Sequence[Result]) -> None:
    statuses = [result.status for result in results]
    begun = min((result.started for result in results if result.started), default=0.0)
    suite = ET.SubElement(
        top,
        "testsuite",
        name=printable(name),
        hostname=printable(host),
        tests=str(len(results)),
        failures=str(statuses.count(Status.FAIL)),
        errors=str(statuses.count(Status.ERROR) + statuses.count(Status.MISS)),
        skipped=str(statuses.count(Status.SKIP) + statuses.count(Status.XFAIL)),
        time=f"{sum(result.duration_s for result in results):.6f}",
    )
    if begun:
        suite.set("timestamp", datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds"))
    provenance = {key: value for result in results for key, value in result.provenance.items()}
    if provenance:
        properties = ET.SubElement(suite, "properties")
        for key, value in sorted(provenance.items()):
            ET.SubElement(properties, "property", name=printable(key), value=printable(value))
    for result in results:
        _add_case(suite, result)


def render(results: Results) -> str:
    """Return JUnit XML with a test suite per suite, host and backend."""
    top = ET.Element("testsuites", name="tdxhw")

    def key(result: Result) -> tuple[str, str, str]:
        return class_name(result), result.host, result.suite

    for (name, host, _), group in groupby(sorted(results.results, key=key), key=key):
        _add_suite(top, f"{name}[{host}]" if host else name, host, list(group))
    ET.indent(top)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(top, encoding="unicode") + "\n"
