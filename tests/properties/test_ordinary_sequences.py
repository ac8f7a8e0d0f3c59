"""Random sequences of ordinary KVM ioctls, in lockstep on this machine's kernel and on its simulation.

The real kernel is the judge. The simulated host takes its equipment from the real one, so behaviour is compared.
"""

import os
from functools import lru_cache
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sim_backend.kvm.recorded_host import profile_of_host
from sim_backend.machine import Machine
from tdxhw.backends.local import LocalHost
from tdxhw.diff.describe_host import describe_host
from tests.properties.ioctl_script import Script
from uapi_ctypes.linux import LinuxKernel

WANTED_IOCTLS = int(os.environ.get("TDXHW_IOCTLS", "0"))
CHOICE = st.integers(0, 99)
GPAS = st.sampled_from([0, 0, 0x1_0000, 0x1_0000, 0x1_4000, 0x2_0000, 0x800, 1 << 46])
SIZES = st.sampled_from([0x4000, 0x4000, 0x8000, 0x1000, 0, 0x1001])


@lru_cache
def twin() -> Machine:
    """Return the simulated host with this machine's equipment."""
    return Machine(profile_of_host(describe_host(LocalHost(None))), oracle=True)


class OrdinarySequences(RuleBasedStateMachine):
    """A VMM on two kernels at once."""

    @initialize(stage=st.sampled_from([0, 1, 2, 2, 3, 3]))
    def begin(self, stage: int) -> None:
        """Begin with nothing, a VM, memory too, or a vCPU that may run as well."""
        self.real, self.sim = Script(LinuxKernel()), Script(twin().kernel())
        self.vms: list[str] = []
        self.vcpus: list[tuple[str, str]] = []  # and their VMs
        self.ready: set[str] = set()  # vCPUs that have a program, and VMs that hold it
        self.made = 0
        if stage:
            self.create_vm()
        if stage > 1:
            self.program_memory(0)
        if stage > 2:
            self.create_vcpu(0, 0)
            self.prepare(0)

    def do(self, source: str, *, name: str = "") -> str:
        """Make the call on both; they must end the same."""
        real = self.real.call(source, name=name)
        self.real.lines.append(f"{name + ' = ' if name else ''}expect({real!r}, lambda: {source})")
        simulated = self.sim.call(source, name=name)
        assert simulated == real, f"{source}: the real kernel says {real!r}, the simulation {simulated!r}\n" + (
            self.real.text()
        )
        return real

    def name(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def vm(self, choice: int) -> str:
        return self.vms[choice % len(self.vms)]

    # ---- system and VM ----------------------------------------------------------------------------------

    @rule()
    def create_vm(self) -> None:
        if len(self.vms) < 2:
            name = self.name("vm")
            if self.do("kvm.create_vm(0)", name=name) == "OK":
                self.vms.append(name)

    @rule(vm_type=st.sampled_from([7, 77, 0xFFFF_FFFF]))
    def create_vm_of_no_type(self, vm_type: int) -> None:
        self.do(f"kvm.create_vm({vm_type:#x})")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, call=st.sampled_from([
        "create_irqchip()", "enable_cap(SPLIT_IRQCHIP, 24)", "enable_cap(SPLIT_IRQCHIP, 5000)",
        "enable_cap(SPLIT_IRQCHIP, 24, flags=1)", "enable_cap(X2APIC_API, 3)", "enable_cap(X2APIC_API, 64)",
        "enable_cap(9999, 1)", "set_tss_addr(0xFFFB_D000)", "set_tss_addr(0xFFFF_F000)",
        "set_identity_map_addr(0xFFFB_C000)", "set_boot_cpu_id(0)", "set_boot_cpu_id(5000)", "create_pit2()",
        "set_memory_attributes(0, 0x1000, 8)", "set_nr_mmu_pages(64)", "set_nr_mmu_pages(1)",
        "memory_encrypt_op(BAD)", "memory_encrypt_reg_region(0, 0)",
    ]))  # fmt: skip
    def vm_call(self, vm: int, call: str) -> None:
        self.do(f"{self.vm(vm)}.{call}")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, cap=st.integers(0, 255))
    def check_extension(self, vm: int, cap: int) -> None:
        self.do(f"hex({self.vm(vm)}.check_extension({cap}))")

    # ---- memory -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(
        vm=CHOICE,
        slot=st.sampled_from([1, 1, 2, 3, 40000, 1 << 20]),
        flags=st.sampled_from([0, 0, 1, 2, 3, 8]),
        gpa=GPAS,
        size=SIZES,
    )
    def set_region(self, vm: int, slot: int, flags: int, gpa: int, size: int) -> None:
        self.do(f"{self.vm(vm)}.set_user_memory_region({slot}, {gpa:#x}, {size:#x}, low.hva, {flags})")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, slot=st.integers(0, 3))
    def dirty_log(self, vm: int, slot: int) -> None:
        self.do(f"dirty_log({self.vm(vm)}, {slot})")

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE)
    def program_memory(self, vm: int) -> None:
        name = self.vm(vm)
        if self.do(f"{name}.set_user_memory_region(0, 0, 0x1_0000, ports_memory.hva)") == "OK":
            self.ready.add(name)

    # ---- vCPUs ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE, vcpu_id=st.sampled_from([0, 0, 1, 2, 5000]))
    def create_vcpu(self, vm: int, vcpu_id: int) -> None:
        owner, name = self.vm(vm), self.name("vcpu")
        if self.do(f"{owner}.create_vcpu({vcpu_id})", name=name) == "OK":
            self.vcpus.append((name, owner))

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE)
    def prepare(self, vcpu: int) -> None:
        name, _ = self.vcpus[vcpu % len(self.vcpus)]
        if self.do(f"in_real_mode({name}, 0x1000)") == "OK" and self.do(f"str({name}.get_mp_state())") == "0":
            self.ready.add(name)

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, immediate=st.sampled_from([0, 0, 0, 1]), times=st.integers(1, 4))
    def run(self, vcpu: int, immediate: int, times: int) -> None:
        name, owner = self.vcpus[vcpu % len(self.vcpus)]
        immediate = int(immediate or not {name, owner} <= self.ready)  # anything else may run for ever
        for _ in range(times):
            self.do(f"run({name}, immediate={immediate})")
        self.do(f"registers({name})")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE, call=st.sampled_from([
        "str({}.get_mp_state())", "registers({})", "{}.set_cpuid2(cpuid('mainline', virt_bits=33))",
        "{}.set_cpuid2(cpuid('mainline', nent=257))", "{}.interrupt(300)", "{}.smi()",
        "{}.enable_cap(9999)", "str({}.get_tsc_khz())", "{}.memory_encrypt_op(BAD)",
        "{}.set_mp_state(77)", "{}.ioctl(0xAEFF)",
    ]))  # fmt: skip
    def vcpu_call(self, vcpu: int, call: str) -> None:
        self.do(call.format(self.vcpus[vcpu % len(self.vcpus)][0]))

    # ---- the end ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.vms)
    @rule(vm=CHOICE)
    def close_vm_fd(self, vm: int) -> None:
        self.do(f"{self.vm(vm)}.close_fd()")

    @precondition(lambda self: self.vcpus)
    @rule(vcpu=CHOICE)
    def close_vcpu(self, vcpu: int) -> None:
        self.do(f"{self.vcpus[vcpu % len(self.vcpus)][0]}.close()")

    def teardown(self) -> None:
        """Close everything on both."""
        if not hasattr(self, "sim"):
            return
        try:
            for script in (self.real, self.sim):
                names: Any = script.names
                for name, _ in self.vcpus:
                    names[name].close()
                for name in self.vms:
                    names[name].close()
                names["kvm"].close()
            assert twin().leftovers() == []
        except BaseException:
            twin.cache_clear()
            raise


OrdinarySequences.TestCase.settings = settings(
    max_examples=WANTED_IOCTLS // 50 or 60,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestOrdinarySequences = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK),
    reason="no usable /dev/kvm: load kvm_intel or kvm_amd, or join the kvm group",
)(pytest.mark.timeout(7200 if WANTED_IOCTLS else 120)(OrdinarySequences.TestCase))
