"""vCPUs that fault in memory while user space takes it away again, on real threads."""

import errno
import random
import struct
import threading
import time

from tests.unit.kvm.tdx.guest_code import R8, R9, RAX, RBX, RCX, RSI, TDCALL, TDG_MEM_PAGE_ACCEPT, Program
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.vcpu import Vcpu

N_VCPUS = 3
PAGES_EACH = 32
PAGE = 4096


def accept_for_ever() -> Program:
    """Accept 32 pages from ESI * 128 KiB on, say so on a port, and begin again."""
    program = Program().copy(R8, RSI).raw(bytes.fromhex("49c1e011"))  # shl r8, 17
    outer = len(program.code)
    program.copy(RBX, R8).mov(R9, PAGES_EACH)
    inner = len(program.code)
    program.copy(RCX, RBX).mov(RAX, TDG_MEM_PAGE_ACCEPT).raw(TDCALL)
    program.raw(bytes.fromhex("4881c30010000049ffc9"))  # add rbx, 4096; dec r9
    program.raw(b"\x0f\x85" + struct.pack("<i", inner - (len(program.code) + 6)))  # jnz
    program.out(0x50, 1)
    return program.raw(b"\xe9" + struct.pack("<i", outer - (len(program.code) + 5)))


def test_faults_race_with_holes_and_conversions_and_nothing_is_lost(td: TestTd) -> None:
    td.build(accept_for_ever(), n_vcpus=N_VCPUS)
    rounds = [0] * N_VCPUS
    failures: list[str] = []
    stop = threading.Event()

    def run(number: int, vcpu: Vcpu) -> None:
        while not stop.is_set():
            try:
                if vcpu.run() != KvmExit.KVM_EXIT_IO:
                    failures.append(KvmExit.name_of(vcpu.exit_reason))
                    return
                rounds[number] += 1
            except KvmError as error:
                fault = error.errno == errno.EFAULT and vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT
                if not fault and error.errno != errno.EINTR:
                    failures.append(str(error))
                    return

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(td.vcpus)]
    for thread in threads:
        thread.start()
    choose = random.Random(1)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and not failures:
        gpa = choose.randrange(N_VCPUS * PAGES_EACH) * PAGE
        if choose.random() < 0.5:
            td.gmem1.punch_hole(gpa, PAGE)
        else:
            td.vm.set_memory_attributes(gpa, 4 * PAGE, 0)
            td.vm.set_memory_attributes(gpa, 4 * PAGE, PRIVATE)
    stop.set()
    td.end_runs(threads)
    assert failures == []
    assert all(rounds), rounds
