"""KVM_TDX_FINALIZE_VM: close the measurement and let the TD run."""

import errno
from typing import TYPE_CHECKING

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.seamcalls import SUCCESS, is_busy
from sim_backend.kvm.tdx.td import TdState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps


def tdx_td_finalize(ops: "TdxOps", cmd: "TdxCmd") -> int:  # noqa: ARG001 - flags and data are not examined
    """Issue TDH.MR.FINALIZE.

    Raise ``Errno``: EINVAL (never initialised, or done already), EBUSY, or EIO with the VM bugged. The module
    itself refuses a TD without an initialised vCPU (NO_VCPUS). Source: `tdx_td_finalize()`.
    """
    td = ops.td
    if td.hkid == 0 or td.state is TdState.RUNNABLE:
        raise Errno(errno.EINVAL)
    if td.premapped and ops.host.profile.behaves("tdx_finalize_checks_premapped"):
        raise Errno(errno.EINVAL)
    with ops.on_lp() as lp:
        status = ops.host.seamcalls.mr_finalize(lp, td.tdr)
    if is_busy(status):
        raise Errno(errno.EBUSY, status)
    if status != SUCCESS:
        ops.vm.bug()
        raise Errno(errno.EIO, status)
    td.state = TdState.RUNNABLE
    return 0
