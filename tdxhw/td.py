"""`TrustDomain`: the life of a TD, one readable call a step, in both dialects.

==================  =========================================  ==========================================
step                mainline                                   v17
==================  =========================================  ==========================================
`create`            KVM_CREATE_VM(5), split irqchip, MapGPA    KVM_CREATE_VM(2), MAX_VCPUS, split irqchip
`capabilities`      grow until E2BIG ends                      the same
`init_vm`           attributes, XFAM, configurable CPUID       attributes, whole CPUID table
`create_vcpu`       KVM_CREATE_VCPU                            the same
`set_cpuid`         KVM_TDX_GET_CPUID, KVM_SET_CPUID2          KVM_SET_CPUID2 with the table of INIT_VM
`init_vcpu`         KVM_TDX_INIT_VCPU                          the same
`add_memory`        KVM_TDX_INIT_MEM_REGION on the first vCPU  on the VM
`finalize`          KVM_TDX_FINALIZE_VM                        the same
==================  =========================================  ==========================================

`launch` does them all. Whatever raises, `close` (or leaving the ``with`` block) gives everything back.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from tdxhw.guest.payload import Payload
from tdxhw.guest_memory import GuestMemory, Slot, pages
from tdxhw.td_cpuid import mainline_init_vm, mainline_set_cpuid, v17_table
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import V17, Dialect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KVM_HC_MAP_GPA_RANGE, KvmX2apicApi
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2
from uapi_ctypes.mapping import anonymous
from uapi_ctypes.tdx_mainline import KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxInitMemRegion
from uapi_ctypes.units import PAGE_SIZE
from uapi_ctypes.vcpu import Vcpu
from uapi_ctypes.vm import Vm

SEPT_VE_DISABLE: Final = 1 << 28
"""TD attribute: an access to a pending page exits to the host instead of raising #VE."""
XFAM_X87_SSE: Final = 0b11
TEST_PAGE_GPA: Final = 0x10_0000
"""A private page that payloads use: there from the start as a hole to be filled on first access [bytes]."""
_IRQCHIP_PINS: Final = 24
_CPUID_ENTRIES: Final = 256
_FIRST_CAPABILITIES: Final = 8
_MOST_CAPABILITIES: Final = 4096


@dataclass(frozen=True, slots=True)
class TdConfig:
    """What INIT_VM is told."""

    attributes: int = 0
    xfam: int = XFAM_X87_SSE
    gpaw: int = 48
    """Width of a GPA [bits]: 48 or 52. The shared bit is its highest."""
    max_vcpus: int | None = None
    """v17 only; mainline derives it from the host."""
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)


class TrustDomain:
    """A TD under construction, running, or being torn down. Every step raises `KvmError` as the kernel refuses it."""

    def __init__(self, kernel: Kernel, dialect: Dialect, config: TdConfig | None = None) -> None:
        self.kernel = kernel
        self.dialect = dialect
        self.config = config or TdConfig()
        self.shared_bit = 1 << (self.config.gpaw - 1)
        self.vcpus: list[Vcpu] = []
        self.kvm = Kvm(kernel)
        self._vm: Vm | None = None
        self._memory: GuestMemory | None = None
        self._capabilities: Flexible[Any] | None = None
        self._init_vm_table: list[KvmCpuidEntry2] = []

    @property
    def vm(self) -> Vm:
        """The VM, once `create` made it."""
        assert self._vm is not None, "call create() first"
        return self._vm

    @property
    def memory(self) -> GuestMemory:
        """The memslots, once `create` made the VM."""
        assert self._memory is not None, "call create() first"
        return self._memory

    # ---- The steps, in order. ----

    def create(self) -> Self:
        """Create the VM and enable what a TD's guest relies on: x2APIC, a split irqchip, MapGPA."""
        self._vm = self.kvm.create_vm(self.dialect.tdx_vm_type, dialect=self.dialect)
        self._memory = GuestMemory(self._vm)
        if self.dialect.max_vcpus_by_enable_cap and self.config.max_vcpus is not None:
            self._vm.enable_cap(KvmCap.KVM_CAP_MAX_VCPUS, self.config.max_vcpus)
        flags = KvmX2apicApi.KVM_X2APIC_API_USE_32BIT_IDS | KvmX2apicApi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
        self._vm.enable_cap(KvmCap.KVM_CAP_X2APIC_API, flags)
        self._vm.enable_cap(KvmCap.KVM_CAP_SPLIT_IRQCHIP, _IRQCHIP_PINS)
        if self.dialect.typed_tdx_exits:
            self._vm.enable_cap(KvmCap.KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        return self

    def capabilities(self) -> Flexible[Any]:
        """Return KVM_TDX_CAPABILITIES; the kernel does not say how many entries it needs, so the buffer grows."""
        if self._capabilities is None:
            nent = _FIRST_CAPABILITIES
            while True:
                try:
                    self._capabilities = self.vm.tdx_capabilities(nent)
                    break
                except KvmError as error:
                    if error.errno != errno.E2BIG or nent >= _MOST_CAPABILITIES:
                        raise
                nent *= 2
        return self._capabilities

    def add_slot(self, gpa: int, size: int, *, private: bool = True) -> Slot:
        """Add memory that can be private, and make it so; or shared-only memory."""
        slot = self.memory.add(gpa, size, private=private)
        if private:
            self.memory.set_private(gpa, size, private=True)
        return slot

    def set_private(self, gpa: int, size_bytes: int, *, private: bool) -> None:
        """Convert memory between private and shared."""
        self.memory.set_private(gpa, size_bytes, private=private)

    def init_vm_argument(self) -> Flexible[Any]:
        """Return the structure for KVM_TDX_INIT_VM as `config` wants it; a test may spoil it before it is used."""
        capabilities = self.capabilities()
        supported = self.kvm.get_supported_cpuid(_CPUID_ENTRIES).filled()
        config = self.config
        if self.dialect is V17:
            xfam = (config.xfam & capabilities.xfam_fixed0) | capabilities.xfam_fixed1
            table = v17_table(supported, config.gpaw, xfam)
        else:
            table = mainline_init_vm(capabilities.filled(), supported, config.gpaw)
        argument = self.dialect.init_vm.of(table)
        argument.attributes = config.attributes
        if self.dialect is V17:
            argument.attributes |= capabilities.attrs_fixed1
        else:
            argument.xfam = config.xfam
        for name in ("mrconfigid", "mrowner", "mrownerconfig"):
            getattr(argument, name)[:] = getattr(config, name)
        self._init_vm_table = table
        return argument

    def init_vm(self) -> None:
        """Give the TD its key and its configuration: KVM_TDX_INIT_VM."""
        self.vm.tdx_init_vm(self.init_vm_argument())

    def create_vcpu(self, vcpu_id: int | None = None) -> Vcpu:
        """Create the next vCPU."""
        vcpu = self.vm.create_vcpu(len(self.vcpus) if vcpu_id is None else vcpu_id)
        self.vcpus.append(vcpu)
        return vcpu

    def cpuid_table(self, vcpu: Vcpu) -> list[KvmCpuidEntry2]:
        """Return the CPUID table that fits what INIT_VM configured."""
        if self.dialect.get_cpuid is None:
            return self._init_vm_table
        return mainline_set_cpuid(vcpu.tdx_get_cpuid(_CPUID_ENTRIES).filled())

    def set_cpuid(self, vcpu: Vcpu) -> None:
        """Tell KVM what CPUID the module shows to the guest."""
        vcpu.set_cpuid2(KvmCpuid2.of(self.cpuid_table(vcpu)))

    def init_vcpu(self, vcpu: Vcpu, rcx: int = 0) -> None:
        """Initialise a vCPU in the module; the guest finds `rcx` in RCX and R8."""
        vcpu.tdx_init_vcpu(rcx)

    def add_memory(self, gpa: int, data: bytes, *, measure: bool = True) -> None:
        """Copy `data`, zero-padded to whole pages, into private memory at `gpa` and measure it into MRTD."""
        contents = pages(data)
        with anonymous(len(contents)) as source:
            source.memory[:] = contents
            region = KvmTdxInitMemRegion(source.address, gpa, len(contents) // PAGE_SIZE)
            self.init_mem_region(region, measure=measure)

    def init_mem_region(self, region: KvmTdxInitMemRegion, *, measure: bool = True) -> None:
        """Issue KVM_TDX_INIT_MEM_REGION until `region` is done: a signal (and v17's EAGAIN) ends it half-way."""
        flags = KVM_TDX_MEASURE_MEMORY_REGION if measure else 0
        while region.nr_pages:
            left = region.nr_pages
            try:
                self.vcpus[0].tdx_init_mem_region(region, flags)
            except KvmError as error:
                interrupted = error.errno == errno.EINTR
                # v17 says EAGAIN for *any* failure after the first page: without progress it is a failure.
                moved_on = error.errno == errno.EAGAIN and region.nr_pages < left
                if not (interrupted or moved_on):
                    raise

    def finalize(self) -> None:
        """Close the measurement: from now on the TD can run."""
        self.vm.tdx_finalize_vm()

    # ---- All of them at once. ----

    def build(self, vcpus: int = 1) -> Self:
        """Go as far as memory can be added: create, INIT_VM and `vcpus` initialised vCPUs."""
        self.create()
        self.init_vm()
        for _ in range(vcpus):
            vcpu = self.create_vcpu()
            self.set_cpuid(vcpu)
            self.init_vcpu(vcpu)
        return self

    def launch(self, payload: Payload, vcpus: int = 1) -> Self:
        """Do all of it: `build`, add and measure `payload`'s image, one private page at `TEST_PAGE_GPA`, finalize."""
        self.build(vcpus)
        self.add_slot(payload.gpa, len(payload.image))
        self.add_memory(payload.gpa, payload.image)
        self.add_slot(TEST_PAGE_GPA, PAGE_SIZE)
        self.finalize()
        return self

    def debug_registers(self, vcpu: Vcpu) -> Mapping[str, int] | None:
        """Return `vcpu`'s registers where the kernel is a simulated one; hardware protects them."""
        reader = getattr(self.kernel, "debug_registers", None)
        return None if reader is None else reader(vcpu.fd)

    def close(self) -> None:
        """Give everything back: vCPUs, guest_memfds, the VM and with it the HKID, memory. Idempotent."""
        try:
            if self._vm is not None:
                self._vm.close()
        finally:
            self.kvm.close()
            if self._memory is not None:
                self._memory.close()
            self.vcpus.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_hkids(kernel: Kernel, dialect: Dialect, at_most: int) -> int:
    """Return how many TDs can exist at once, up to `at_most`: each holds one private HKID from INIT_VM on."""
    held: list[TrustDomain] = []
    try:
        while len(held) < at_most:
            td = TrustDomain(kernel, dialect)
            held.append(td)
            try:
                td.create().init_vm()
            except KvmError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return len(held) - 1
        return len(held)
    finally:
        close_all(held)


def close_all(domains: Sequence[TrustDomain]) -> None:
    """Close each, also when closing another fails."""
    for td in domains:
        td.close()
