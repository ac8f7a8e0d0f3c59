"""The FPU and extended state of an unprotected vCPU: KVM_GET_FPU, KVM_GET_XSAVE and XCR0."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

XSAVE_BYTES: Final = 4096
_HEADER: Final = 512  # offset of XSTATE_BV in the standard format
_EXTENDED: Final = 576
XFEATURE_FP: Final = 1
XFEATURE_SSE: Final = 2
XFEATURE_YMM: Final = 4
_FXSAVE_RESET: Final = struct.pack("<HHBBHQQII", 0x37F, 0, 0, 0, 0, 0, 0, 0x1F80, 0xFFFF).ljust(512, b"\0")
# FXSAVE bytes 464-511 are software's; the kernel leaves the CPU's user xfeature mask there.
_SOFTWARE: Final = 464
_MXCSR_MASK: Final = 28


class XsaveArea:
    """Views of one vCPU's FPU state."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu: Final = vcpu

    def _fxsave(self) -> bytes:
        cpu = self._vcpu.cpu
        image = self._vcpu.read_state().fxsave if cpu is not None else b""
        return image or _FXSAVE_RESET

    def _store(self, image: bytes) -> None:
        cpu = self._vcpu.cpu
        if cpu is not None:
            state = self._vcpu.read_state()
            state.fxsave = image
            self._vcpu.write_state(state)

    def fpu(self) -> bytes:
        """Return ``struct kvm_fpu``."""
        image = self._fxsave()
        fcw, fsw, ftwx, _, opcode, ip, dp = struct.unpack_from("<HHBBHQQ", image)
        registers = image[32:160]
        xmm = image[160:416]
        head = struct.pack("<HHBBHQQ", fcw, fsw, ftwx, 0, opcode, ip, dp)
        return registers + head + xmm + bytes(8)  # KVM does not fill MXCSR in

    def set_fpu(self, data: bytes) -> None:
        """Take ``struct kvm_fpu``."""
        fcw, fsw, ftwx, _, opcode, ip, dp = struct.unpack_from("<HHBBHQQ", data, 128)
        mxcsr = int.from_bytes(self._fxsave()[24:28], "little")  # not taken from there either
        head = struct.pack("<HHBBHQQII", fcw, fsw, ftwx, 0, opcode, ip, dp, mxcsr, 0xFFFF)
        self._store((head + data[:128] + data[152:408]).ljust(512, b"\0"))
        self._vcpu.xstate_bv |= XFEATURE_FP | XFEATURE_SSE

    def area(self) -> bytes:
        """Return the 4096-byte ``struct kvm_xsave`` in the standard format."""
        image = bytearray(self._fxsave())
        profile = self._vcpu.vm.host.profile
        struct.pack_into("<Q", image, _SOFTWARE, profile.xsave_software)
        struct.pack_into("<I", image, _MXCSR_MASK, profile.mxcsr_mask)
        header = struct.pack("<Q", self._vcpu.xstate_bv & profile.xcomp_guest_supported).ljust(64, b"\0")
        return (bytes(image) + header + self._vcpu.xsave_extended).ljust(XSAVE_BYTES, b"\0")

    def set_area(self, data: bytes) -> None:
        """Take ``struct kvm_xsave``; EINVAL for a feature that the guest cannot have or reserved MXCSR bits."""
        (xstate_bv, xcomp_bv) = struct.unpack_from("<QQ", data, _HEADER)
        (mxcsr,) = struct.unpack_from("<I", data, 24)
        supported = self._vcpu.vm.host.profile.xcomp_guest_supported
        if xstate_bv & ~supported or xcomp_bv or any(data[_HEADER + 16 : _EXTENDED]):
            raise Errno(errno.EINVAL)
        if mxcsr & ~0xFFFF:
            raise Errno(errno.EINVAL)
        image = bytearray(data[:512])
        if not xstate_bv & XFEATURE_FP:
            image[:24], image[32:160] = _FXSAVE_RESET[:24], _FXSAVE_RESET[32:160]
        if not xstate_bv & XFEATURE_SSE:
            image[160:416] = bytes(256)
        self._store(bytes(image))
        self._vcpu.xstate_bv = xstate_bv
        self._vcpu.xsave_extended = bytes(data[_EXTENDED:])

    def xcr0_is_valid(self, value: int) -> bool:
        """Check an XCR0 value as __kvm_set_xcr() does."""
        vcpu = self._vcpu
        leaf = vcpu.cpuid.find(0xD, 0)
        offered = (leaf.eax | leaf.edx << 32) & vcpu.vm.host.profile.xcomp_guest_supported if leaf is not None else 0
        if not value & XFEATURE_FP or value & ~(offered | XFEATURE_FP):
            return False
        if value & XFEATURE_YMM and not value & XFEATURE_SSE:
            return False
        if bool(value >> 3 & 1) != bool(value >> 4 & 1):
            return False
        avx512 = value >> 5 & 7
        if avx512 and (avx512 != 7 or not value & XFEATURE_YMM):
            return False
        return value >> 17 & 3 in (0, 3)
