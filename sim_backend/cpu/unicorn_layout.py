"""Finding Unicorn's CPU state in memory without trusting that it is where we think.

A wrong offset must be a clear error, not a crash: memory is read by system call until it has proved to be
what Unicorn itself says it is.
"""

import ctypes
import functools
import os
import struct
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from unicorn.unicorn_py3.unicorn import uclib

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.errors import EngineSelfTestError

_CONTEXT_DATA: Final = 0x28  # of uc_context: where the copy of CPUX86State begins
_COMPARED: Final = u.ENV_SIZE


def locate_cpu(handle: int) -> tuple[int, int]:
    """Return the addresses of the CPUState and CPUX86State of engine `handle`.

    The first call in a process verifies the layout; raise `EngineSelfTestError` when it is not ours.
    """
    _verify_once(handle)
    cpu = ctypes.c_uint64.from_address(handle + u.UC_CPU).value
    return cpu, ctypes.c_uint64.from_address(cpu + u.CPU_ENV).value


def check_version() -> None:
    """Raise `EngineSelfTestError` unless the installed Unicorn is the pinned one."""
    try:
        installed = version("unicorn")
    except PackageNotFoundError:
        installed = "none"
    major, minor = ctypes.c_int(), ctypes.c_int()
    packed = uclib.uc_version(ctypes.byref(major), ctypes.byref(minor))
    wanted = tuple(int(part) for part in u.UNICORN_VERSION.split("."))
    if installed != u.UNICORN_VERSION or (packed >> 24 & 0xFF, packed >> 16 & 0xFF, packed >> 8 & 0xFF) != wanted:
        raise EngineSelfTestError(
            f"the CPU engine needs Unicorn {u.UNICORN_VERSION}, but {installed} is installed: "
            f"pip install unicorn=={u.UNICORN_VERSION}"
        )


@functools.cache
def _layout_is_verified() -> list[bool]:
    return []


def _verify_once(handle: int) -> None:
    done = _layout_is_verified()
    if done:
        return
    check_version()
    try:
        (cpu,) = struct.unpack("<Q", _read_own_memory(handle + u.UC_CPU, 8))
        (env,) = struct.unpack("<Q", _read_own_memory(cpu + u.CPU_ENV, 8))
        state = _read_own_memory(env, _COMPARED)
        (context_size,) = struct.unpack("<I", _read_own_memory(handle + u.UC_CONTEXT_SIZE, 4))
        flags = _read_own_memory(handle + u.UC_NO_EXIT_REQUEST - 2, 4)
    except OSError as error:
        raise EngineSelfTestError(f"Unicorn's CPU state is not where version {u.UNICORN_VERSION} has it") from error
    context = ctypes.c_void_p()
    if uclib.uc_context_alloc(ctypes.c_void_p(handle), ctypes.byref(context)):
        raise EngineSelfTestError("Unicorn cannot allocate a context")
    try:
        size = uclib.uc_context_size(ctypes.c_void_p(handle))
        uclib.uc_context_save(ctypes.c_void_p(handle), context)
        saved = ctypes.string_at((context.value or 0) + _CONTEXT_DATA, size - _CONTEXT_DATA)
    finally:
        uclib.uc_context_free(context)
    common = min(len(saved), len(state))
    if common < u.ENV_INTERCEPT_EXCEPTIONS + 4 or saved[:common] != state[:common]:
        raise EngineSelfTestError(f"Unicorn's CPU state is not laid out as in version {u.UNICORN_VERSION}")
    if context_size != u.ENV_SIZE or max(flags) > 1 or flags[2:] != b"\0\1":
        raise EngineSelfTestError(f"Unicorn's engine state is not laid out as in version {u.UNICORN_VERSION}")
    done.append(True)


def _read_own_memory(address: int, length: int) -> bytes:
    """Read by system call: a bad address is an error, not a crash."""
    buffer = ctypes.create_string_buffer(length)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), length)
    remote = (ctypes.c_size_t * 2)(address, length)
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.process_vm_readv(os.getpid(), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
    if got != length:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return buffer.raw
