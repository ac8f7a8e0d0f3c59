"""One Unicorn engine: its handle, its CPU state in place, its memory map and its hooks."""

import ctypes
from typing import Final, Protocol

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.errors import EngineError, EngineSelfTestError
from sim_backend.cpu.unicorn_layout import locate_cpu

_VMCB: Final = 1 << 47  # engine-private guest-physical page: above every RAM and window
_VMCB_MSRPM: Final = 0x48
_WARM_UP_CODE: Final = 0xFF0  # in the same page, behind everything that TCG reads as a VMCB
_private = ctypes.create_string_buffer(5 * 4096)
_PRIVATE: Final = (ctypes.addressof(_private) + 4095) & ~4095  # VMCB, then an MSR bitmap that intercepts all
ctypes.memset(_PRIVATE + 4096, 0xFF, 3 * 4096)
ctypes.c_uint64.from_address(_PRIVATE + _VMCB_MSRPM).value = _VMCB + 4096
ctypes.memmove(_PRIVATE + _WARM_UP_CODE, b"\xeb\x00\xf4", 3)  # JMP to the next instruction, HLT

INTERCEPTS: Final = (
    u.intercept(u.EXIT_VINTR)
    | u.intercept(u.EXIT_RDPMC)
    | u.intercept(u.EXIT_CPUID)
    | u.intercept(u.EXIT_SWINT)
    | u.intercept(u.EXIT_INVD)
    | u.intercept(u.EXIT_HLT)
    | u.intercept(u.EXIT_MSR)
    | u.intercept(u.EXIT_ICEBP)
    | u.intercept(u.EXIT_WBINVD)
    | u.intercept(u.EXIT_MONITOR)
    | u.intercept(u.EXIT_MWAIT)
)


class HookClient(Protocol):
    """Who answers an instance's hooks. None of these may raise."""

    def on_tlb_fill(self, gla: int, kind: int, entry: int) -> bool:
        """Fill the `uc_tlb_entry` at address `entry` for the page `gla`; False for a fault."""
        ...

    def on_new_block(self, block: int) -> None:
        """See the freshly translated block whose `uc_tb` is at address `block`."""
        ...

    def on_port_io(self, port: int, size: int, is_in: bool) -> int:
        """Note the I/O instruction about to execute; return what IN is to deliver."""
        ...

    def on_syscall(self) -> None:
        """Note the SYSCALL instruction about to execute."""
        ...


class _WarmUp:
    """Serves the hooks of an instance that has no CPU yet."""

    def on_tlb_fill(self, gla: int, kind: int, entry: int) -> bool:  # noqa: ARG002
        """Map the engine-private page to itself."""
        u.TLB_ENTRY.pack_into(u.TLB_ENTRY_BUFFER.from_address(entry), 0, _VMCB, u.UC_PROT_ALL)
        return gla == _VMCB

    def on_new_block(self, block: int) -> None:
        """Nothing to look for."""

    def on_port_io(self, port: int, size: int, is_in: bool) -> int:  # noqa: ARG002
        """Not reached."""
        return 0

    def on_syscall(self) -> None:
        """Not reached."""


class _Refuse(_WarmUp):
    """Has no memory at all."""

    def on_tlb_fill(self, gla: int, kind: int, entry: int) -> bool:  # noqa: ARG002
        """Nothing is mapped."""
        return False


class UnicornInstance:
    """A raw Unicorn with our hooks and intercepts, without memory until `map_ram`."""

    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        self._check("uc_open", u.uc_open(u.UC_ARCH_X86, u.UC_MODE_64, ctypes.byref(handle)))
        if handle.value is None:
            raise EngineError("uc_open returned no handle")
        self.handle = handle.value
        self._check("CPU model", u.uc_ctl(self.handle, u.CTL_CPU_MODEL, u.UC_CPU_ICELAKE_SERVER, 0))
        self._check("TLB type", u.uc_ctl(self.handle, u.CTL_TLB_TYPE, u.TLB_VIRTUAL, 0))
        self._check("exits", u.uc_ctl(self.handle, u.CTL_USE_EXITS, 1, 0))
        self.map(_VMCB, 4 * 4096, _PRIVATE)
        cpu, env = locate_cpu(self.handle)
        # Otherwise every load and store looks for a stop request, and a stop between the store of ADD [m], r and
        # its end makes it execute twice, because RIP is still there.
        ctypes.c_bool.from_address(self.handle + u.UC_NO_EXIT_REQUEST).value = True
        self._look_at(cpu, env, self.handle)
        self.client: HookClient | None = None
        self._callbacks = self._add_hooks()
        # No state component may be enabled: every XSETBV is then #GP, which we turn into its exit.
        features = env + u.ENV_FEATURES + 8 * u.FEATURE_XSAVE_COMPONENTS
        ctypes.c_uint64.from_address(features).value = 0
        self.reset()
        self._warm_up()

    def _warm_up(self) -> None:
        """Run a JMP and a HLT: the new-block hook is silent until a first block has run to its end."""
        self.client = _WarmUp()
        self.hflags.value = u.HF_GUEST | u.HF_PE | u.HF_LMA | u.HF_CS64 | u.HF_CS32 | u.HF_SS32
        u.uc_emu_start(self.handle, _VMCB + _WARM_UP_CODE, 0, 0, 0)
        self.client = None
        self.flush_tlb()
        if self.exception_index.value != u.EXIT_HLT:
            raise EngineSelfTestError(f"HLT stops Unicorn with index {self.exception_index.value:#x}")

    def reset(self) -> None:
        """Arm the intercepts; the caller sets the architectural state."""
        env = self._env
        self.interrupt_request.value = 0
        ctypes.c_uint64.from_address(env + u.ENV_TSC_OFFSET).value = 0
        ctypes.c_uint64.from_address(env + u.ENV_VM_VMCB).value = _VMCB
        ctypes.c_uint64.from_address(env + u.ENV_INTERCEPT).value = INTERCEPTS
        ctypes.c_uint16.from_address(env + u.ENV_INTERCEPT_CR_READ).value = 1 << 8
        ctypes.c_uint16.from_address(env + u.ENV_INTERCEPT_CR_WRITE).value = 1 << 0 | 1 << 4 | 1 << 8
        ctypes.c_uint16.from_address(env + u.ENV_INTERCEPT_DR_READ).value = 0xFF
        ctypes.c_uint16.from_address(env + u.ENV_INTERCEPT_DR_WRITE).value = 0xFF
        ctypes.c_uint32.from_address(env + u.ENV_INTERCEPT_EXCEPTIONS).value = 0xFFFF_FFFF

    def close(self) -> None:
        """Free everything. The CPU state stays readable, as a copy; nothing else may be used."""
        self.client = None
        handle, self.handle = self.handle, 0
        contents = (bytes(u.CPU_EXCEPTION_INDEX + 4), self.buffer.raw, bytes(u.UC_INVALID_ADDRESS + 8))
        self._last = [ctypes.create_string_buffer(content, len(content)) for content in contents]
        self._look_at(*[ctypes.addressof(copy) for copy in self._last])
        u.uc_close(handle)

    def _look_at(self, cpu: int, env: int, engine: int) -> None:
        """Take the state from these addresses: of a CPUState, a CPUX86State and a uc_struct."""
        self._env = env
        self.buffer = (ctypes.c_char * u.ENV_SIZE).from_address(env)
        self.raw = memoryview(self.buffer).cast("B")
        self.quads = self.raw.cast("Q")
        self.exception_index = ctypes.c_int32.from_address(cpu + u.CPU_EXCEPTION_INDEX)
        self.interrupt_request = ctypes.c_uint32.from_address(cpu + u.CPU_INTERRUPT_REQUEST)
        self.hflags = ctypes.c_uint32.from_address(env + u.ENV_HFLAGS)
        self.error_code = ctypes.c_uint32.from_address(env + u.ENV_ERROR_CODE)
        self.fault_address = ctypes.c_uint64.from_address(engine + u.UC_INVALID_ADDRESS)

    def map(self, base: int, length: int, pointer: int) -> None:
        """Make host memory guest-physical memory."""
        self._check("uc_mem_map_ptr", u.uc_mem_map_ptr(self.handle, base, length, u.UC_PROT_ALL, pointer))

    def unmap(self, base: int, length: int) -> None:
        """Undo `map`. Takes 10 ms a GiB, because every page of it is flushed."""
        client, self.client = self.client, _Refuse()  # Unicorn probes the TLB meanwhile
        try:
            self._check("uc_mem_unmap", u.uc_mem_unmap(self.handle, base, length))
        finally:
            self.client = client

    def flush_tlb(self) -> None:
        """Forget all address translations."""
        if self.handle:
            u.uc_ctl(self.handle, u.CTL_TLB_FLUSH, 0, 0)

    def flush_code(self) -> None:
        """Forget all translated code."""
        if self.handle:
            u.uc_ctl(self.handle, u.CTL_TB_FLUSH, 0, 0)

    def _add_hooks(self) -> tuple[object, ...]:
        def tlb_fill(_uc: int, gla: int, kind: int, entry: int, _data: int) -> bool:
            return self.client.on_tlb_fill(gla, kind, entry)  # type: ignore[union-attr]

        def new_block(_uc: int, block: int, _previous: int, _data: int) -> None:
            self.client.on_new_block(block)  # type: ignore[union-attr]

        def port_in(_uc: int, port: int, size: int, _data: int) -> int:
            return self.client.on_port_io(port, size, True)  # type: ignore[union-attr]

        def port_out(_uc: int, port: int, size: int, _value: int, _data: int) -> None:
            self.client.on_port_io(port, size, False)  # type: ignore[union-attr]

        def syscall(_uc: int, _data: int) -> None:
            self.client.on_syscall()  # type: ignore[union-attr]

        hooks = (
            (u.UC_HOOK_TLB_FILL, u.TLB_FILL_HOOK(tlb_fill), 0),
            (u.UC_HOOK_EDGE_GENERATED, u.EDGE_HOOK(new_block), 0),
            (u.UC_HOOK_INSN, u.IN_HOOK(port_in), u.UC_INS_IN),
            (u.UC_HOOK_INSN, u.OUT_HOOK(port_out), u.UC_INS_OUT),
            (u.UC_HOOK_INSN, u.SYSCALL_HOOK(syscall), u.UC_INS_SYSCALL),
            (u.UC_HOOK_INSN, u.SYSCALL_HOOK(syscall), u.UC_INS_SYSENTER),
        )
        number = ctypes.c_void_p()
        for kind, callback, instruction in hooks:
            address = ctypes.cast(callback, ctypes.c_void_p).value
            error = u.uc_hook_add(self.handle, ctypes.addressof(number), kind, address, None, 1, 0, instruction)
            self._check("uc_hook_add", error)
        return tuple(callback for _, callback, _ in hooks)

    @staticmethod
    def _check(what: str, error: int) -> None:
        if error:
            raise EngineError(f"Unicorn: {what} failed with error {error}")
