"""What of a recorded answer is compared with the model's, and what is not."""

from typing import Final

from sim_backend.hw.gprs import GPR_NAMES, RAX, RSP, Gprs
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

Outputs = tuple[tuple[str, int], ...]
"""Register names and their indexes."""

_HOST_NAMES: Final = ("rcx", "rdx", "rbx", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))

INDEX: Final = {name: index for index, name in enumerate(GPR_NAMES)}
HOST_OUTPUTS: Final[Outputs] = tuple((name, INDEX[name]) for name in _HOST_NAMES)
TD_EXIT_OUTPUTS: Final[Outputs] = tuple((name, index) for name, index in INDEX.items() if index not in {RAX, RSP})
GUEST_OUTPUTS: Final[Outputs] = tuple((name, index) for name, index in INDEX.items() if index != RSP)

METADATA_SEAMCALLS: Final = frozenset({
    SeamcallLeaf.TDH_MNG_RD, SeamcallLeaf.TDH_MNG_WR, SeamcallLeaf.TDH_VP_RD, SeamcallLeaf.TDH_VP_WR,
})  # fmt: skip
METADATA_TDCALLS: Final = frozenset({
    TdcallLeaf.TDG_VM_RD, TdcallLeaf.TDG_VM_WR, TdcallLeaf.TDG_VP_RD, TdcallLeaf.TDG_VP_WR,
})  # fmt: skip
_NOT_COMPARED_FIELDS: Final = frozenset({
    *range(0x8010_0003_0000_0020, 0x8010_0003_0000_0024),  # TD_UUID
    *range(0x1110_0003_0000_000A, 0x1110_0003_0000_000E),  # TSC offset, multiplier and frequency, virtual TSC
    *range(0x9810_0003_0000_0010, 0x9810_0003_0000_0020),  # migration keys
    0x0024_0003_0000_2010,  # TD VMCS: TSC offset
    0x0024_0003_0000_2032,  # TD VMCS: TSC multiplier
    0xA020_0003_0000_000A,  # LAST_EXIT_TSC
})  # fmt: skip
"""Metadata fields whose values come from the recorder's TSC or random numbers."""
_CONTEXT_CODE: Final = 7 << 52


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


def is_not_compared(field_id: int) -> bool:
    """Tell whether a metadata field is one of `_NOT_COMPARED_FIELDS`; a context code of 0 stands for any."""
    return field_id in _NOT_COMPARED_FIELDS or (
        not field_id & _CONTEXT_CODE
        and (field_id | 1 << 52 in _NOT_COMPARED_FIELDS or field_id | 2 << 52 in _NOT_COMPARED_FIELDS)
    )
