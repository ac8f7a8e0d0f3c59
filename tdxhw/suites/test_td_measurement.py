"""MRTD, RTMRs and TDREPORT, each against an independent SHA-384."""

import hashlib
from collections.abc import Callable

import pytest

from tdxhw.exits import PortIo
from tdxhw.guest.layout import PORT_SUCCESS, PORT_TEST
from tdxhw.guest.payload import Payload
from tdxhw.measure import mrtd
from tdxhw.td import SEPT_VE_DISABLE, TEST_PAGE_GPA, XFAM_X87_SSE, TrustDomain
from tdxhw.tdreport import TdReport
from tdxhw.tdvf import Section, SectionAttribute, SectionType
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.units import PAGE_SIZE

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))
ZERO = bytes(48)


def report_of(td: TrustDomain, serve: Vmm) -> TdReport:
    """Run `td` until its payload announces a TDREPORT in shared memory, and return it."""
    announced = serve.expect(td.vcpus[0], PortIo)
    assert (announced.port, announced.value) == (PORT_TEST, TEST_PAGE_GPA)
    return TdReport.parse(td.memory.read(TEST_PAGE_GPA, TdReport.SIZE))


def measured(image: Payload, *, measure: bool = True) -> bytes:
    """Return MRTD of a TD to which only `image` was added."""
    attributes = SectionAttribute.MR_EXTEND if measure else SectionAttribute(0)
    return mrtd([Section(SectionType.BFV, attributes, image.gpa, len(image.image), image.image)])


def test_mrtd_is_the_sha384_of_what_was_added(launch: LAUNCH, payload: Callable[[str], Payload], vmm: MAKE_VMM) -> None:
    td = launch("mr_report")

    assert report_of(td, vmm(td)).mrtd == measured(payload("mr_report"))


def test_memory_that_is_not_measured_counts_with_its_address_only(
    trust_domain: Callable[..., TrustDomain], payload: Callable[[str], Payload], vmm: MAKE_VMM
) -> None:
    image = payload("mr_report")
    td = trust_domain().build()
    td.add_slot(image.gpa, len(image.image))
    td.add_memory(image.gpa, image.image, measure=False)
    td.add_slot(TEST_PAGE_GPA, PAGE_SIZE)
    td.finalize()

    assert report_of(td, vmm(td)).mrtd == measured(image, measure=False)


def test_one_bit_more_in_the_image_changes_mrtd(
    trust_domain: Callable[..., TrustDomain], payload: Callable[[str], Payload], vmm: MAKE_VMM
) -> None:
    image = payload("mr_report")
    other = image.with_parameters(bytes(8) + b"\1")
    td = trust_domain().launch(other)

    found = report_of(td, vmm(td)).mrtd

    assert found == measured(other) != measured(image)


def test_the_report_carries_what_the_guest_asked_it_to(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("mr_report")

    assert report_of(td, vmm(td)).report_data == bytes(range(64))


@pytest.mark.parametrize("attributes", [0, SEPT_VE_DISABLE], ids=["no attribute", "SEPT_VE_DISABLE"])
def test_the_report_carries_the_td_s_configuration(launch: LAUNCH, vmm: MAKE_VMM, attributes: int) -> None:
    names = {name: bytes([value]) * 48 for value, name in enumerate(("mrconfigid", "mrowner", "mrownerconfig"), 1)}
    td = launch("mr_report", attributes=attributes, **names)

    report = report_of(td, vmm(td))

    assert report.attributes == attributes
    assert report.xfam & XFAM_X87_SSE == XFAM_X87_SSE
    assert {name: getattr(report, name) for name in names} == names


def test_the_report_s_hash_covers_the_td_s_measurements(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("mr_report")

    report = report_of(td, vmm(td))

    assert report.type == TdReport.TYPE_TDX
    assert report.tee_info_hash == hashlib.sha384(report.tee_info).digest()


def test_rtmrs_are_zero_at_first(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("mr_report")

    assert report_of(td, vmm(td)).rtmrs == (ZERO,) * 4


def test_extending_an_rtmr_hashes_old_value_and_digest(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("rtmr_extend")
    serve = vmm(td)

    report = report_of(td, serve)

    assert report.rtmrs == (ZERO, ZERO, hashlib.sha384(ZERO + b"\xa5" * 48).digest(), ZERO)
    assert serve.run(td.vcpus[0]) == SUCCESS, "the payload also checks that RTMR 4 does not exist"
