"""MRTD: the recorded values, an independent SHA-384, and the batch path against the leaf-by-leaf one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim_backend.hw.gprs import R8, R9, RAX, RCX, RDX, new_gprs
from sim_backend.seamcall_host import SeamcallHost, Td
from sim_backend.tdx_module import page_build
from sim_backend.tdx_module.mrtd import PageExtender, add_block
from uapi_ctypes.tdx_leaves import SeamcallLeaf

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "tdx_module" / "mrtd.json").read_text()
)
SOURCE = 0x100000


def page_contents(first: int) -> bytes:
    return bytes((7 * j + first) & 0xFF for j in range(256)) * 16


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_page_operations_lead_to_the_recorded_mrtd(host: SeamcallHost, case: dict[str, Any]) -> None:
    td = host.create_td()
    host.create_vcpu(td)
    for leaf, gpa, *contents in case["ops"]:
        if leaf == "PAGE.ADD":
            host.module.memory.write(SOURCE, page_contents(*contents))
            host.add_page(td, int(gpa, 16), SOURCE)
        else:
            host.call(SeamcallLeaf.TDH_MR_EXTEND, rcx=int(gpa, 16), rdx=td.tdr)
    assert host.finalize(td).hex() == case["mrtd"]


def test_mrtd_is_the_sha384_of_what_the_spec_says(host: SeamcallHost) -> None:
    td = host.create_td()
    host.create_vcpu(td)
    expected = hashlib.sha384()
    for gpa in (0x3000, 0x1000):
        contents = page_contents(gpa >> 12)
        host.module.memory.write(SOURCE, contents)
        host.add_page(td, gpa, SOURCE)
        expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104))
        host.extend_page(td, gpa)
        for at in range(0, 4096, 256):
            expected.update(b"MR.EXTEND".ljust(16, b"\0") + (gpa + at).to_bytes(8, "little") + bytes(104))
            expected.update(contents[at : at + 256])
    assert host.finalize(td) == expected.digest()


def test_the_batch_path_equals_the_leaf_by_leaf_path(host: SeamcallHost) -> None:
    slow, fast = host.create_td(), host.create_td()
    for td in (slow, fast):
        host.create_vcpu(td)
        host.add_tables(td, 0)
    for number in range(5):
        gpa = number << 12
        host.module.memory.write(SOURCE, page_contents(number))
        host.add_page(slow, gpa, SOURCE)
        host.extend_page(slow, gpa)
        regs = new_gprs()
        page = host.page()
        regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = 2, gpa, fast.tdr, page, SOURCE
        host.module.mem_page_add_extend(0, regs)
        assert regs[RAX] == 0
        assert host.module.memory.read(page, 4096) == page_contents(number)
    slow_mrtd = host.finalize(slow)
    assert slow_mrtd == host.finalize(fast)


def test_a_source_in_user_memory_is_the_usual_case_too(host: SeamcallHost) -> None:
    """The user's pages have HPAs above the RAM: what KVM hands over, always."""
    contents = page_contents(7)
    window = host.module.memory.add_window(
        4096, 0, lambda start, size: contents[start : start + size], lambda *_: pytest.fail("written to")
    )
    tds = [host.create_td(), host.create_td()]
    for td in tds:
        host.create_vcpu(td)
        host.add_tables(td, 0)
    host.add_page(tds[0], 0, window.base)
    host.extend_page(tds[0], 0)
    regs = new_gprs()
    regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = 2, 0, tds[1].tdr, host.page(), window.base

    assert page_build._source_if_usual(host.module, regs) == window.base
    host.module.mem_page_add_extend(0, regs)

    assert (regs[RAX], host.module.memory.read(regs[R8], 4096)) == (0, contents)
    assert host.finalize(tds[0]) == host.finalize(tds[1])
    host.module.memory.remove_window(window)


def test_a_failed_add_measures_nothing(host: SeamcallHost) -> None:
    td = host.create_td()
    host.create_vcpu(td)
    regs = new_gprs()
    regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = 2, 0, td.tdr, host.page(), SOURCE
    host.module.mem_page_add_extend(0, regs)
    assert regs[RAX] != 0, "there is no Secure EPT page for GPA 0"
    assert host.finalize(td) == hashlib.sha384().digest()


def test_a_page_extender_can_be_reused() -> None:
    extender = PageExtender()
    first = bytes(extender.blocks(0x1000, memoryview(page_contents(1))))
    assert first != bytes(extender.blocks(0x2000, memoryview(page_contents(2))))
    assert first == bytes(extender.blocks(0x1000, memoryview(page_contents(1))))


def test_the_page_extender_knows_both_ways() -> None:
    contents = memoryview(page_contents(3))
    assert PageExtender().added_page(0x5000, contents) == add_block(0x5000) + PageExtender().blocks(0x5000, contents)


def break_nothing(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    pass


def shared_gpa(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[RCX] |= 1 << 47


def level_in_gpa(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[RCX] |= 1


def no_table(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[RCX] |= 1 << 39


def mapped_gpa(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    host.add_page(td, regs[RCX], SOURCE)


def page_taken(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R8] = td.tdr


def page_elsewhere(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R8] = 0x1000


def page_with_hkid(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R8] |= 1 << 47


def source_unaligned(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] += 64


def source_with_shared_hkid(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] |= 5 << 46


def source_with_private_hkid(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] |= 40 << 46


def source_in_seamrr(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] = 0xF000_0000 + 0x1FF_F000


def source_after_seamrr(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] = 0xF200_0000


def source_before_seamrr(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[R9] = 0xF000_0000 - 4096


def tdr_held(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    pamt = host.module.pamt
    pamt.q[pamt.entry_4k(td.tdr)] |= 4


def page_priority(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    pamt = host.module.pamt
    pamt.q[pamt.entry_4k(regs[R8])] |= 2


def finalized(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    host.finalize(td)


def versioned(host: SeamcallHost, td: Td, regs: list[int]) -> None:
    regs[RAX] |= 1 << 16


@pytest.mark.parametrize(
    "change",
    [
        break_nothing, shared_gpa, level_in_gpa, no_table, mapped_gpa, page_taken, page_elsewhere, page_with_hkid,
        source_unaligned, source_with_shared_hkid, source_with_private_hkid, source_in_seamrr, source_after_seamrr,
        source_before_seamrr, tdr_held, page_priority, finalized, versioned,
    ],
)  # fmt: skip
def test_whatever_is_unusual_the_batch_path_answers_as_the_leaf(
    host: SeamcallHost, change: Callable[[SeamcallHost, Td, list[int]], None]
) -> None:
    answers = []
    for batch in (False, True):
        td = host.create_td()
        host.create_vcpu(td)
        host.add_tables(td, 0)
        regs = new_gprs()
        regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = 2, 0x3000, td.tdr, host.page(), SOURCE
        change(host, td, regs)
        if batch:
            host.module.mem_page_add_extend(0, regs)
        else:
            host.module.seamcall(0, regs)
            if regs[RAX] == 0:
                host.extend_page(td, 0x3000)
        tdr = host.module.tdrs[td.tdr]
        pamt = host.module.pamt
        words = [word & 0xFF_FFFF for word in pamt.q[pamt.entry_4k(td.tdr) : pamt.entry_4k(td.tdr) + 64 : 2]]
        answers.append(
            (regs[RAX], regs[RCX] if regs[RAX] == 0 else None, tdr.chldcnt, tdr.tdcs.measurement.digest(), words)
        )
    assert answers[0] == answers[1]
    if change is break_nothing:
        assert answers[0][0] == 0
