"""Random sequences of ioctls in both dialects: each ends as the model says, the oracle agrees, nothing is left over.

A failure prints a Python script that makes the same calls on any backend. TDXHW_IOCTLS=100000 makes a long run.
"""

import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sim_backend.machine import Machine, boot
from tests.properties import ioctl_vocabulary
from tests.properties.ioctl_model import IMAGE_GFN, IMAGE_PAGES, MAPPED_GPA, PROGRAM_PAGES, Gmem, Model, Vcpu, Vm
from tests.properties.ioctl_script import Script
from tests.unit.kvm.tdx.guest_code import IMAGE_GPA, TDG_MEM_PAGE_ACCEPT, Program, image
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import IoctlArg, Kernel

TDX_HKIDS = 2
MAP_GPA = 0x10001
STEPS = 40
WANTED_IOCTLS = int(os.environ.get("TDXHW_IOCTLS", "0"))
IMAGE_SLOT = 9
MOST_VMS, MOST_GMEMS = 3, 4
RETRIES = 5
"""One more fault at one instruction, and the module suspects zero-stepping."""

RELEASES = ["7.3", "7.3", "7.2", "6.18", "6.16", "v17", "v17"]
CHOICE = st.integers(0, 99)
GPAS = st.sampled_from([0, 0, 0, 0x1000, 0x2000, 0x2000, 0x4000, 0x800, 1 << 47, (1 << 47) - 0x1000])
SIZES = st.sampled_from([0x1000, 0x1000, 0x4000, 0x4000, 0x4000, 0x8000, 0, 0x1001])
COUNTS: Counter[str] = Counter()


@lru_cache
def host(profile: str) -> Machine:
    """Return the host that all examples use, as each must leave it as it was."""
    return boot(profile, oracle=True, private_hkids=1 + TDX_HKIDS)


class IoctlSequences(RuleBasedStateMachine):
    """A VMM that does anything, to up to three VMs."""

    def __init__(self) -> None:
        super().__init__()
        self.vms: list[Vm] = []
        self.made = 0

    @initialize(
        release=st.sampled_from(RELEASES),
        gpaw=st.sampled_from([48, 48, 52]),
        stage=st.sampled_from([0, 1, 2, 3, 3, 4, 4, 4]),
        vcpus=st.integers(1, 2),
    )
    def begin(self, release: str, gpaw: int, stage: int, vcpus: int) -> None:
        """Begin with nothing, or a TD that is created, has its key, its program, or may run."""
        self.machine = host(release)
        self.model = Model(release=release, hkids=TDX_HKIDS)
        v17 = self.model.v17
        self.gpaw = 48 if v17 else gpaw
        self.dialect = "v17" if v17 else "mainline"
        self.script = Script(self.machine.kernel())
        if stage:
            self.create_vm()
        if stage > 1:
            self.enable_cap(0, "SPLIT_IRQCHIP", 24, 0)
            self.enable_cap(0, "EXIT_HYPERCALL", 4096, 0)
            self.init_vm(0, "")
        if stage > 2:
            for number in range(vcpus):
                self.create_vcpu(0, number)
                self.set_cpuid(number, "")
                self.init_vcpu(number, "")
            self.put_the_program_in_place(0)
        if stage > 3:
            self.add_private_memory(0, 0)
            self.finalize(0)

    # ---- picking things ---------------------------------------------------------------------------------

    def vm(self, choice: int) -> Vm:
        return self.vms[0] if choice % 3 else self.vms[choice // 3 % len(self.vms)]

    @property
    def wide(self) -> str:
        """The argument by which a table asks for five levels, if it does."""
        return ", gpaw=52" if self.gpaw == 52 else ""

    @property
    def vcpus(self) -> list[Vcpu]:
        return [vcpu for vm in self.vms for vcpu in vm.vcpus]

    @property
    def gmems(self) -> list[Gmem]:
        return [gmem for vm in self.vms for gmem in vm.gmems if not gmem.name.startswith("program")]

    def vcpu(self, choice: int) -> Vcpu:
        return self.vcpus[choice % len(self.vcpus)]

    def name(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def do(self, expected: str, source: str, *, name: str = "", kind: str = "") -> bool:
        what = kind or source.partition("(")[0].rpartition(".")[2]
        COUNTS[f"{what}: {expected.partition(' ')[0]}" if what == "run" else what] += 1
        self.script.expect(expected, source, name=name)
        return expected == "OK"

    # ---- the VM -----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.vms) < MOST_VMS)
    @rule()
    def create_vm(self) -> None:
        name = self.name("vm")
        arguments = "2, dialect=V17" if self.model.v17 else "5, dialect=MAINLINE"
        self.do("OK", f"kvm.create_vm({arguments})", name=name)
        self.vms.append(Vm(name, self.model.v17))

    @rule(vm_type=st.sampled_from([6, 77, 0xFFFF_FFFF]))
    def create_vm_of_no_type(self, vm_type: int) -> None:
        self.do("EINVAL", f"kvm.create_vm({vm_type:#x})")

    @precondition(lambda self: self.vms)
    @rule(
        vm=CHOICE,
        cap=st.sampled_from(["SPLIT_IRQCHIP", "SPLIT_IRQCHIP", "X2APIC_API", "EXIT_HYPERCALL"]),
        value=st.sampled_from([24, 24, 3, 4, 12, 16, 4096, 4096, 5000]),
        flags=st.sampled_from([0, 0, 0, 1]),
    )
    def enable_cap(self, vm: int, cap: str, value: int, flags: int) -> None:
        target = self.vm(vm)
        self.do(
            self.model.enable_cap(target, cap, value, flags), f"{target.name}.enable_cap({cap}, {value}, flags={flags})"
        )

    @precondition(lambda self: any(not vm.released for vm in self.vms))
    @rule(
        vm=CHOICE,
        spoiled=st.sampled_from(["", "", "", "hw_error", "flags", "unreadable", "too many", "padding", "attributes"]),
    )
    def init_vm(self, vm: int, spoiled: str) -> None:
        target = self.vm(vm)
        if target.released:
            return  # v17 forgets the old TDR there, which leaks by design
        argument = f"init_vm({self.dialect!r}{self.wide})"
        call = f"tdx_init_vm({argument})"
        if spoiled == "hw_error":
            call = f"memory_encrypt_op(command({target.name}, 1, hw_error=1))"
        elif spoiled == "flags":
            call = f"tdx_init_vm({argument}, flags=1)"
        elif spoiled == "unreadable":
            call = f"tdx_command({target.name}.dialect.init_vm_command, BAD)"
        elif spoiled == "too many":
            call = f"tdx_init_vm(init_vm({self.dialect!r}, repeat=257))"
        elif spoiled == "padding":
            call = f"tdx_init_vm(init_vm({self.dialect!r}, padding=1))"
        elif spoiled == "attributes":
            call = f"tdx_init_vm(init_vm({self.dialect!r}, attributes=1 << 40))"
        self.do(self.model.init_vm(target, spoiled, self.gpaw), f"{target.name}.{call}", kind="tdx_init_vm")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE)
    def finalize(self, vm: int) -> None:
        target = self.vm(vm)
        self.do(self.model.finalize(target), f"{target.name}.tdx_finalize_vm()")

    @precondition(lambda self: self.vms and self.model.v17)
    @rule(vm=CHOICE)
    def release_vm(self, vm: int) -> None:
        target = self.vm(vm)
        self.do(self.model.release_vm(target), f"{target.name}.tdx_release_vm()")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, spoiled=st.sampled_from(["", "flags", "unreadable", "too few"]))
    def capabilities(self, vm: int, spoiled: str) -> None:
        target = self.vm(vm)
        command = f"{target.name}.dialect.capabilities_command"
        call = {
            "flags": f"tdx_command({command}, BAD, flags=1)",
            "unreadable": f"tdx_command({command}, BAD)",
            "too few": "tdx_capabilities(1)",
        }.get(spoiled, "tdx_capabilities(256)")
        self.do(self.model.capabilities(target, spoiled), f"{target.name}.{call}", kind="tdx_capabilities")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, cmd=st.sampled_from(["77", "77, hw_error=1", "0xFFFF_FFFF"]))
    def unknown_vm_command(self, vm: int, cmd: str) -> None:
        target = self.vm(vm)
        self.do(target.gate(target) or "EINVAL", f"{target.name}.memory_encrypt_op(command({target.name}, {cmd}))")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE)
    def unreadable_vm_command(self, vm: int) -> None:
        target = self.vm(vm)
        self.do(target.gate(target) or "EFAULT", f"{target.name}.memory_encrypt_op(BAD)")

    # ---- memory -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms and len(self.gmems) < MOST_GMEMS)
    @rule(vm=CHOICE, size=st.sampled_from([0x8000, 0x8000, 0x4000, 0, 0x1001]), flags=st.sampled_from([0, 0, 0, 32]))
    def create_guest_memfd(self, vm: int, size: int, flags: int) -> None:
        target, name = self.vm(vm), self.name("gmem")
        expected = self.model.create_guest_memfd(target, size, flags)
        if self.do(expected, f"{target.name}.create_guest_memfd({size:#x}, {flags})", name=name):
            target.gmems.append(Gmem(name, target, size // 4096))

    @precondition(lambda self: self.vms)
    @rule(
        vm=CHOICE,
        slot=st.sampled_from([0, 0, 1, 1, 2, 40000]),
        flags=st.sampled_from([0, 0, 0, 0, 1, 2, 32]),
        gpa=GPAS,
        size=SIZES,
        gmem=CHOICE,
        offset=st.sampled_from([0, 0, 0, 0x1000, 0x4000, 0x10]),
    )
    def set_region(self, vm: int, slot: int, flags: int, gpa: int, size: int, gmem: int, offset: int) -> None:
        target = self.vm(vm)
        file = self.gmems[gmem % len(self.gmems)] if self.gmems and gmem % 4 else None
        extra = ""
        if file is not None:
            flags |= ioctl_vocabulary.GUEST_MEMFD
            extra = f", guest_memfd={file.name}.fd & 0xFFFF_FFFF, guest_memfd_offset={offset:#x}"
        expected = self.model.set_region(target, slot, flags, gpa, size, file, offset)
        self.do(
            expected, f"{target.name}.set_user_memory_region2({slot}, {gpa:#x}, {size:#x}, low.hva, {flags}{extra})"
        )

    @precondition(lambda self: self.vms)
    @rule(
        vm=CHOICE,
        gpa=GPAS,
        size=SIZES,
        attributes=st.sampled_from([8, 8, 8, 0, 0, 1]),
        flags=st.sampled_from([0] * 5 + [1]),
    )
    def set_attributes(self, vm: int, gpa: int, size: int, attributes: int, flags: int) -> None:
        target = self.vm(vm)
        expected = self.model.set_attributes(target, gpa, size, attributes, flags)
        self.do(expected, f"{target.name}.set_memory_attributes({gpa:#x}, {size:#x}, {attributes}, {flags})")

    @precondition(lambda self: self.gmems)
    @rule(
        gmem=CHOICE,
        mode=st.sampled_from([3, 3, 3, 1, 1, 2, 0, 9]),
        offset=st.sampled_from([0, 0, 0x1000, 0x3000, 0x800]),
        length=st.sampled_from([0x1000, 0x1000, 0x4000, 0x10_0000, 0, 0x10]),
    )
    def fallocate(self, gmem: int, mode: int, offset: int, length: int) -> None:
        target = self.gmems[gmem % len(self.gmems)]
        expected = self.model.fallocate(target, mode, offset, length)
        self.do(expected, f"{target.name}.fallocate({mode}, {offset:#x}, {length:#x})")

    @precondition(lambda self: self.vms and len(self.gmems) < MOST_GMEMS)
    @rule(vm=CHOICE, slot=st.integers(0, 2))
    def add_private_memory(self, vm: int, slot: int) -> None:
        """Do what belongs together: the file, the slot and the attribute of eight pages from GPA 0."""
        target, name = self.vm(vm), self.name("gmem")
        if self.do(
            self.model.create_guest_memfd(target, 0x8000, 0), f"{target.name}.create_guest_memfd(0x8000)", name=name
        ):
            gmem = Gmem(name, target, 8)
            target.gmems.append(gmem)
            self.do(
                self.model.set_region(target, slot, ioctl_vocabulary.GUEST_MEMFD, 0, 0x8000, gmem, 0),
                f"{target.name}.set_user_memory_region2({slot}, 0, 0x8000, low.hva, GUEST_MEMFD,"
                f" guest_memfd={name}.fd)",
            )
            self.set_attributes(vm, 0, 0x8000, 8, 0)

    @precondition(lambda self: any(vm.vcpus and not vm.image and not vm.released for vm in self.vms))
    @rule(vm=CHOICE)
    def put_the_program_in_place(self, vm: int) -> None:
        target = self.vm(vm)
        if not target.vcpus or IMAGE_SLOT in target.slots or target.gate(target) or target.released:
            return
        name, size = self.name("program"), IMAGE_PAGES * 4096
        self.do("OK", f"{target.name}.create_guest_memfd({size:#x})", name=name)
        gmem = Gmem(name, target, IMAGE_PAGES)
        target.gmems.append(gmem)
        expected = self.model.set_region(
            target, IMAGE_SLOT, ioctl_vocabulary.GUEST_MEMFD, IMAGE_GFN << 12, size, gmem, 0
        )
        self.do(
            expected,
            f"{target.name}.set_user_memory_region2({IMAGE_SLOT}, IMAGE_GPA, {size:#x}, program.hva, GUEST_MEMFD,"
            f" guest_memfd={name}.fd)",
        )
        self.do(
            self.model.set_attributes(target, IMAGE_GFN << 12, size, 8, 0),
            f"{target.name}.set_memory_attributes(IMAGE_GPA, {size:#x}, PRIVATE)",
        )
        vcpu = target.vcpus[0]
        expected = self.model.init_mem_region(vcpu, IMAGE_GFN << 12, IMAGE_PAGES, "good", 1)
        self._init_mem_region(vcpu, expected, "program.hva", "IMAGE_GPA", IMAGE_PAGES, 1)
        target.image = expected == "OK left 0x0"

    # ---- vCPUs ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, vcpu_id=st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5000]))
    def create_vcpu(self, vm: int, vcpu_id: int) -> None:
        target, name = self.vm(vm), self.name("vcpu")
        if self.do(self.model.create_vcpu(target, vcpu_id), f"{target.name}.create_vcpu({vcpu_id})", name=name):
            target.vcpus.append(Vcpu(name, target, vcpu_id))

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, spoiled=st.sampled_from(["", "", "x2apic", "virt_bits", "too many", "unreadable"]))
    def set_cpuid(self, vcpu: int, spoiled: str) -> None:
        target = self.vcpu(vcpu)
        argument = {"x2apic": ", x2apic=False", "virt_bits": ", virt_bits=33", "too many": ", nent=257"}.get(
            spoiled, ""
        )
        call = f"set_cpuid2(cpuid({self.dialect!r}{self.wide}{argument}))"
        if spoiled == "unreadable":
            call = f"ioctl({int(KvmRequest.KVM_SET_CPUID2):#x}, BAD)"
        self.do(self.model.set_cpuid(target, spoiled), f"{target.name}.{call}", kind="set_cpuid2")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, spoiled=st.sampled_from(["", "", "", "flags", "hw_error", "unreadable"]))
    def init_vcpu(self, vcpu: int, spoiled: str) -> None:
        target = self.vcpu(vcpu)
        call = {
            "flags": f"tdx_command({target.name}.dialect.init_vcpu, 0, flags=1)",
            "hw_error": f"memory_encrypt_op(command({target.name}, 2, hw_error=1))",
            "unreadable": "memory_encrypt_op(BAD)",
        }.get(spoiled, "tdx_init_vcpu(0x1234)")
        self.do(self.model.init_vcpu(target, spoiled), f"{target.name}.{call}", kind="tdx_init_vcpu")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, number=st.sampled_from([0, 1, 4, 77]))
    def unknown_vcpu_command(self, vcpu: int, number: int) -> None:
        target = self.vcpu(vcpu)
        self.do(self.model.vcpu_command(target), f"{target.name}.memory_encrypt_op(command({target.name}, {number}))")

    @precondition(lambda self: self.vcpus and not self.model.v17)
    @rule(vcpu=CHOICE, nent=st.sampled_from([256, 1]))
    def get_cpuid(self, vcpu: int, nent: int) -> None:
        target = self.vcpu(vcpu)
        self.do(self.model.get_cpuid(target, nent), f"{target.name}.tdx_get_cpuid({nent})")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE)
    def get_regs(self, vcpu: int) -> None:
        target = self.vcpu(vcpu)
        self.do(target.vm.gate(target) or "EINVAL", f"{target.name}.get_regs()")

    @precondition(lambda self: self.vcpus)
    @rule(
        vcpu=CHOICE,
        gpa=GPAS,
        pages=st.sampled_from([1, 1, 2, 4, 0]),
        source=st.sampled_from(["good", "good", "good", "unaligned", "zero", "unmapped"]),
        flags=st.sampled_from([0, 1, 1, 2]),
    )
    def init_mem_region(self, vcpu: int, gpa: int, pages: int, source: str, flags: int) -> None:
        target = self.vcpu(vcpu)
        if target.vm.released:
            return  # the module refuses; how KVM words that is not known
        text = {"good": "low.hva", "unaligned": "low.hva + 8", "zero": "0", "unmapped": "0x1000"}[source]
        expected = self.model.init_mem_region(target, gpa, pages, source, flags)
        self._init_mem_region(target, expected, text, f"{gpa:#x}", pages, flags)

    def _init_mem_region(self, vcpu: Vcpu, expected: str, source: str, gpa: str, pages: int, flags: int) -> None:
        call = f"lambda region: {vcpu.name}.tdx_init_mem_region(region, {flags})"
        self.do(
            expected,
            f'left({call}, KvmTdxInitMemRegion({source}, {gpa}, {pages}), "nr_pages")',
            kind="tdx_init_mem_region",
        )

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, gpa=GPAS, size=SIZES, flags=st.sampled_from([0] * 5 + [1]))
    def pre_fault(self, vcpu: int, gpa: int, size: int, flags: int) -> None:
        target = self.vcpu(vcpu)
        expected = self.model.pre_fault(target, gpa, size, flags)
        self.do(
            expected,
            f'left({target.name}.pre_fault_memory, KvmPreFaultMemory({gpa:#x}, {size:#x}, {flags}), "size")',
            kind="pre_fault_memory",
        )

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, immediate=st.sampled_from([0, 0, 0, 1]), ret=st.sampled_from([0, 0, 11, 22, 1]))
    def run(self, vcpu: int, immediate: int, ret: int) -> None:
        target = self.vcpu(vcpu)
        if target.vm.released or target.faults >= RETRIES:
            return
        immediate = int(immediate or (target.would_block and target.is_open and not target.vm.dead))
        answer = f", ret={ret}" if target.in_map_gpa and target.is_open else ""
        self.do(
            self.model.run(target, immediate, ret), f"run({target.name}, immediate={immediate}{answer})", kind="run"
        )

    @precondition(lambda self: any(vcpu.in_loop for vcpu in self.vcpus))
    @rule(vcpu=CHOICE)
    def nmi(self, vcpu: int) -> None:
        """Send an NMI to a vCPU whose program has a handler for it."""
        ready = [one for one in self.vcpus if one.in_loop]
        target = ready[vcpu % len(ready)]
        self.do(self.model.nmi(target), f"{target.name}.nmi()")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, times=st.integers(2, 6))
    def run_on(self, vcpu: int, times: int) -> None:
        """Run further: each time the program accepts another page."""
        for _ in range(times):
            self.run(vcpu, 0, 0)

    # ---- the end ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(what=st.sampled_from(["vm", "vcpu", "vcpu", "gmem", "gmem"]), which=CHOICE)
    def close(self, what: str, which: int) -> None:
        handles: dict[str, Any] = {"vm": self.vms, "vcpu": self.vcpus, "gmem": self.gmems}
        if handles[what]:
            self._close(handles[what][which % len(handles[what])])

    def _close(self, handle: "Vm | Vcpu | Gmem") -> None:
        self.model.close(handle)
        self.do("OK", f"{handle.name}.{'close_fd' if isinstance(handle, Vm) else 'close'}()", kind="close")
        vm = handle if isinstance(handle, Vm) else handle.vm
        if not vm.is_alive:
            self.vms.remove(vm)

    def teardown(self) -> None:
        """Close everything: the host is as good as new."""
        if not hasattr(self, "script"):
            return
        try:
            for vm in list(self.vms):
                handles: list[Vm | Vcpu | Gmem] = [*vm.gmems, *vm.vcpus, vm]
                for handle in handles:
                    if handle.is_open:
                        self._close(handle)
            self.do("OK", "kvm.close()", kind="close")
            assert self.machine.leftovers() == [], self.script.text()
            assert self.machine.free_hkids == self.model.hkids
        except BaseException:
            host.cache_clear()
            raise


def default_settings() -> settings:
    ioctls_an_example = 50
    return settings(
        max_examples=WANTED_IOCTLS // ioctls_an_example or 120,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


IoctlSequences.TestCase.settings = default_settings()


TestIoctlSequences = pytest.mark.timeout(7200 if WANTED_IOCTLS else 120)(IoctlSequences.TestCase)


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Say what a long run did."""
    yield
    if WANTED_IOCTLS:
        sys.stderr.write(f"\n{sum(COUNTS.values())} calls: {dict(COUNTS)}\n")


# ---- the script that a failure prints -----------------------------------------------------------------------


def scripted(profile: str, expected: str) -> tuple[str, Machine]:
    """Return the script of a short sequence that ends with KVM_TDX_FINALIZE_VM, and its host."""
    machine = host(profile)
    script = Script(machine.kernel())
    script.expect("OK", "kvm.create_vm(5, dialect=MAINLINE)", name="vm1")
    script.expect("OK", "vm1.enable_cap(SPLIT_IRQCHIP, 24)")
    script.expect("OK", "vm1.tdx_init_vm(init_vm('mainline'))")
    script.expect("OK", "vm1.create_vcpu(0)", name="vcpu2")
    script.expect("OK", "vcpu2.set_cpuid2(cpuid('mainline'))")
    script.expect("OK", "vcpu2.tdx_init_vcpu(0x1234)")
    script.expect("EINTR", "run(vcpu2, immediate=1)")
    try:
        script.expect(expected, "vm1.tdx_finalize_vm()")
    except ioctl_vocabulary.Disagreement as failure:
        return str(failure).partition("\n")[2], machine
    finally:
        for line in ("vm1.close()", "kvm.close()"):
            script.expect("OK", line)
    return script.text(), machine


def replay(text: str, kernel: Kernel) -> None:
    """Run a script as its own module would, on `kernel`."""
    names: dict[str, Any] = {"__name__": "sequence"}
    exec(compile(text, "sequence.py", "exec"), names)
    try:
        names["replay"](kernel)
    finally:
        names.clear()


def test_the_script_of_a_sequence_makes_the_same_calls_again() -> None:
    text, machine = scripted("7.3", "OK")
    issued: list[str] = []

    class Counting:
        """Counts what the script does."""

        name = "counting"

        def __init__(self, kernel: Kernel) -> None:
            self.open, self.mmap, self.close, self.fallocate = kernel.open, kernel.mmap, kernel.close, kernel.fallocate
            self._ioctl = kernel.ioctl

        def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
            issued.append(KvmRequest(request).name)
            return self._ioctl(fd, request, arg)

    replay(text, Counting(machine.kernel()))
    assert issued == [
        "KVM_CREATE_VM",
        "KVM_GET_VCPU_MMAP_SIZE",
        "KVM_ENABLE_CAP",
        "KVM_MEMORY_ENCRYPT_OP",
        "KVM_CREATE_VCPU",
        "KVM_SET_CPUID2",
        "KVM_MEMORY_ENCRYPT_OP",
        "KVM_RUN",
        "KVM_MEMORY_ENCRYPT_OP",
    ]
    assert machine.leftovers() == []


def test_the_script_of_a_failure_fails_again_in_the_same_way() -> None:
    text, machine = scripted("7.3", "EBUSY")

    with pytest.raises(AssertionError, match="'EBUSY' expected, 'OK' found"):
        replay(text, machine.kernel())
    assert machine.leftovers() == []


def test_a_script_needs_nothing_but_the_binding(tmp_path: Path) -> None:
    text, _ = scripted("7.3", "OK")
    path = tmp_path / "sequence.py"
    path.write_text(text)
    imported = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))}

    assert imported == {"collections", "ctypes", "mmap", "typing", "uapi_ctypes"}
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    # On this machine's own kernel: a real TDX host agrees, any other says what it has instead.
    assert found.returncode == 0 or "Disagreement: 'OK' expected" in found.stderr or "/dev/kvm" in found.stderr


def test_the_program_of_the_vocabulary_is_what_it_says() -> None:
    program = Program()
    for page in range(PROGRAM_PAGES):
        program.tdcall(TDG_MEM_PAGE_ACCEPT, rcx=page << 12).out(0x40 + page, page)
    program.vmcall(MAP_GPA, MAPPED_GPA, 0x1000)
    program.raw(b"\xe9" + struct.pack("<i", -(len(program.code) + 5)))
    expected = bytearray(image(program))
    for start, end in ((0x9000, 0x9020), (0x9030, 0xA000)):
        expected[start:end] = bytes(end - start)  # of all interrupts this program takes NMIs only

    assert ioctl_vocabulary.IMAGE_GPA == IMAGE_GPA
    assert ioctl_vocabulary.image().map[:] == bytes(expected)
