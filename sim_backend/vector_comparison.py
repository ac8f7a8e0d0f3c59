"""What of a recorded answer is compared with the model's, and what is not."""

from typing import Final

from sim_backend.hw.gprs import GPR_NAMES, RAX, RSP, Gprs
from sim_backend.tdx_module.metadata import Context
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

Outputs = tuple[tuple[str, int], ...]
"""Register names and their indexes."""

_HOST_NAMES: Final = ("rcx", "rdx", "rbx", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))

INDEX: Final = {name: index for index, name in enumerate(GPR_NAMES)}
HOST_OUTPUTS: Final[Outputs] = tuple((name, INDEX[name]) for name in _HOST_NAMES)
TD_EXIT_OUTPUTS: Final[Outputs] = tuple((name, index) for name, index in INDEX.items() if index not in {RAX, RSP})
GUEST_OUTPUTS: Final[Outputs] = tuple((name, index) for name, index in INDEX.items() if index != RSP)

_TD, _VP = Context.TD, Context.VP
METADATA_SEAMCALLS: Final[dict[int, Context]] = {
    SeamcallLeaf.TDH_MNG_RD: _TD, SeamcallLeaf.TDH_MNG_WR: _TD, SeamcallLeaf.TDH_VP_RD: _VP,
    SeamcallLeaf.TDH_VP_WR: _VP,
}  # fmt: skip
METADATA_TDCALLS: Final[dict[int, Context]] = {
    TdcallLeaf.TDG_VM_RD: _TD, TdcallLeaf.TDG_VM_WR: _TD, TdcallLeaf.TDG_VP_RD: _VP, TdcallLeaf.TDG_VP_WR: _VP,
    TdcallLeaf.TDG_SERVTD_RD: _TD, TdcallLeaf.TDG_SERVTD_WR: _TD,
}  # fmt: skip
"""Leaves that show a field of that context in R8."""

_NOT_COMPARED_FIELDS: Final = frozenset({
    *((_TD, 0, code) for code in range(0x20, 0x24)),  # TD_UUID
    (_TD, 0x11, 0x0A),  # TSC_OFFSET
    (_TD, 0x11, 0x0B),  # TSC_MULTIPLIER
    *((_TD, 0x18, code) for code in range(0x10, 0x20)),  # migration keys
    (_VP, 0, 0x2010),  # TD VMCS: TSC offset
    (_VP, 0, 0x2032),  # TD VMCS: TSC multiplier
    (_VP, 0x20, 0x0A),  # LAST_EXIT_TSC
})  # fmt: skip
"""Context, class and code of the fields whose values come from the recorder's TSC or random numbers."""


def same_registers(expected: dict[str, str], regs: Gprs, outputs: Outputs) -> bool:
    """Tell whether the registers are as a record has them; the ones it leaves out are zero."""
    matched = 0
    for name, index in outputs:
        value = regs[index]
        if value:
            text = expected.get(name)
            if text is None or int(text, 16) != value:
                return False
            matched += 1
    return matched == len(expected)


def is_not_compared(field_id: int, context: Context) -> bool:
    """Tell whether a metadata field is one of `_NOT_COMPARED_FIELDS`; the other bits of its id do not matter."""
    return (context, field_id >> 56 & 0x3F, field_id & 0xFF_FFFF) in _NOT_COMPARED_FIELDS
