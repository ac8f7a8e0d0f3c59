"""Completion codes of TDVMCALLs (Guest-Host Communication Interface) that KVM returns in R10."""

from typing import Final

from uapi_ctypes.tdx_status import TdvmcallStatus

SUCCESS: Final = int(TdvmcallStatus.SUCCESS)
RETRY: Final = int(TdvmcallStatus.RETRY)
INVALID_OPERAND: Final = int(TdvmcallStatus.INVALID_OPERAND)
ALIGN_ERROR: Final = int(TdvmcallStatus.ALIGN_ERROR)
SUBFUNC_UNSUPPORTED: Final = int(TdvmcallStatus.SUBFUNC_UNSUPPORTED)
