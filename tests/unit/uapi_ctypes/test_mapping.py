"""Mappings: typed views in place, and nothing dangles after close."""

import ctypes
import gc
import os
from pathlib import Path

import pytest

from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmRun
from uapi_ctypes.linux import LinuxKernel
from uapi_ctypes.mapping import Mapping, anonymous


def mapped(address: int) -> str:
    """Return the line of /proc/self/maps that holds `address`, empty when nothing does."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return line
    return ""


def test_views_and_bytes_are_the_same_memory() -> None:
    with anonymous(8192) as mapping:
        view = mapping.view(KvmRun, 4096)
        view.exit_reason = 0x0102_0304
        assert bytes(mapping.memory[4096 + 8 : 4096 + 12]) == b"\x04\x03\x02\x01"
        mapping.memory[4096 + 8] = 0xFF
        assert view.exit_reason == 0x0102_03FF
        assert mapping.address % 4096 == 0


def test_a_file_sees_what_is_written() -> None:
    fd = os.memfd_create("run")
    os.ftruncate(fd, 4096)
    kernel = LinuxKernel()
    mapping = kernel.mmap(fd, 4096)
    mapping.memory[:3] = b"kvm"
    assert os.pread(fd, 3, 0) == b"kvm"
    mapping.close()
    kernel.close(fd)


def test_close_unpins_the_file_at_once_while_views_stay_safe() -> None:
    fd = os.memfd_create("pinned")
    os.ftruncate(fd, 4096)
    mapping = Mapping(4096, fd=fd)
    os.close(fd)
    memory, view, address = mapping.memory, mapping.view(KvmRun), mapping.address
    view.exit_reason = 7
    assert "pinned" in mapped(address)

    mapping.close()
    mapping.close()

    assert "pinned" not in mapped(address)
    assert view.exit_reason == 0
    view.io.port = 5
    assert memory[34] == 5


def test_the_addresses_are_given_back_with_the_last_view() -> None:
    mapping = anonymous(1 << 20)
    address = mapping.address
    inner = mapping.view(KvmRun).io
    mapping.close()
    del mapping
    gc.collect()
    assert mapped(address), "the view of a member keeps the range"
    del inner
    gc.collect()
    assert not mapped(address)


@pytest.mark.parametrize("offset", [-1, 4095, 4096])
def test_a_view_past_the_end_is_refused(offset: int) -> None:
    with anonymous(4096) as mapping, pytest.raises(ValueError, match="does not fit"):
        mapping.view(ctypes.c_uint16 * 1, offset)


def test_a_closed_mapping_gives_no_views() -> None:
    mapping = anonymous(4096)
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.view(KvmRun)


def test_a_descriptor_that_cannot_be_mapped_is_a_kvm_error() -> None:
    with pytest.raises(KvmError, match="mmap: EBADF"):
        Mapping(4096, fd=1 << 20)


def test_fallocate_reports_its_errno() -> None:
    kernel = LinuxKernel()
    fd = os.memfd_create("gmem")
    os.ftruncate(fd, 8192)
    kernel.fallocate(fd, 1, 0, 8192)
    with pytest.raises(KvmError, match="fallocate: EINVAL"):
        kernel.fallocate(fd, 0, 0, 0)
    with pytest.raises(KvmError, match="fallocate: EOPNOTSUPP"):
        kernel.fallocate(fd, 2, 0, 4096)
    kernel.close(fd)
