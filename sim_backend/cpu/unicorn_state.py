"""Architectural state to and from Unicorn's CPUX86State: segments, control registers, translation flags."""

import struct
from typing import Final

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.engine import CpuState, Segment
from sim_backend.cpu.paging import CR0_PE, CR4_SMAP, EFER_LMA

_CR4_OSFXSR: Final = 1 << 9
_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_ES, _CS, _SS, _DS = range(4)
_CONTROL: Final = struct.Struct("<5Q")
_RFLAGS_VM: Final = 1 << 17


def load_segments(raw: memoryview, state: CpuState) -> None:
    """Store the segment and descriptor-table registers of `state` into a CPUX86State."""
    for index, name in enumerate(_NAMES):
        segment: Segment = getattr(state, name)
        ar = segment.ar
        flags = 0 if ar & 0x10000 else (ar & 0xF0FF) << 8 | (segment.limit & 0xF0000 if ar & 0x8000 else 0)
        u.SEGMENT.pack_into(
            raw,
            u.ENV_SEGS + 24 * index,
            segment.selector,
            segment.base & 0xFFFF_FFFF_FFFF_FFFF,
            segment.limit & 0xFFFF_FFFF,
            flags,
        )
    for index, (base, limit) in enumerate(
        ((state.gdtr_base, state.gdtr_limit), (state.idtr_base, state.idtr_limit)), start=8
    ):
        u.SEGMENT.pack_into(raw, u.ENV_SEGS + 24 * index, 0, base, limit, 0)


def save_segments(raw: memoryview, state: CpuState) -> None:
    """Store the segment and descriptor-table registers of a CPUX86State into `state`."""
    for index, name in enumerate(_NAMES):
        selector, base, limit, flags = u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * index)
        ar = flags >> 8 & 0xF0FF
        if not ar & 0x80:
            ar |= 0x10000
        setattr(state, name, Segment(selector, base, limit, ar))
    _, state.gdtr_base, state.gdtr_limit, _ = u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * 8)
    _, state.idtr_base, state.idtr_limit, _ = u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * 9)


def translation_flags(raw: memoryview, cr0: int, cr4: int, efer: int, rflags: int) -> int:
    """Compute hflags from the state in a CPUX86State and the registers given."""
    cs_flags: int = u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * _CS)[3]
    ss_flags: int = u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * _SS)[3]
    flags = u.HF_GUEST | u.HF_IOBPT
    flags |= (cr0 & 0b1110) << 8  # MP, EM, TS to bits 9 to 11
    if cr4 & _CR4_OSFXSR:
        flags |= u.HF_OSFXSR
    if cr4 & CR4_SMAP:
        flags |= u.HF_SMAP
    if not cr0 & CR0_PE:
        return flags | u.HF_ADDSEG
    flags |= u.HF_PE
    if rflags & _RFLAGS_VM:
        return flags | u.HF_ADDSEG | 3
    flags |= ss_flags >> 13 & 3
    if efer & EFER_LMA:
        flags |= u.HF_LMA
        if cs_flags & 1 << 21:
            return flags | u.HF_CS32 | u.HF_SS32 | u.HF_CS64
    if cs_flags & 1 << 22:
        flags |= u.HF_CS32
    if ss_flags & 1 << 22:
        flags |= u.HF_SS32
    bases = [u.SEGMENT.unpack_from(raw, u.ENV_SEGS + 24 * index)[1] for index in (_DS, _ES, _SS)]
    if not cs_flags & 1 << 22 or any(bases):
        flags |= u.HF_ADDSEG
    return flags
