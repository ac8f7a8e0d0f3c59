"""Choose the machines of a run from ``--on`` and ``--profile``."""

import os
from collections.abc import Sequence
from typing import Final

from tdxhw.errors import BackendUnavailable, HarnessError, UnknownName
from tdxhw.host import Backend
from uapi_ctypes.linux import LinuxKernel

BACKENDS: Final = ("auto", "sim", "local")


def select(on: str, profiles: Sequence[str] = (), promises: Sequence[str] = ()) -> Backend:
    """Open the machines for `on` (one of `BACKENDS`).

    Raise `BackendUnavailable` with a remedy when they cannot be had, `UnknownName` on a name that is none.
    """
    # Imported here: the local backend needs no simulator, and a lab host has none installed.
    if on == "sim":
        from tdxhw.backends.sim import open_sim

        return open_sim(profiles, reason="asked for", promises=promises)
    if profiles:
        raise HarnessError("--profile names a simulated host: add --on sim")
    if on == "local":
        from tdxhw.backends.local import open_local

        return open_local(reason="asked for", promises=promises)
    if on == "auto":
        return _automatic(promises)
    raise UnknownName("backend", on, (*BACKENDS, "lab:NAME"))


def _automatic(promises: Sequence[str]) -> Backend:
    """Prefer a real /dev/kvm with TDX; else simulate and say why."""
    from tdxhw.backends.local import DEV_KVM, open_local, probe

    if not os.path.exists(DEV_KVM):  # noqa: PTH110 (a device node, and pathlib costs the start of `tdxhw run`)
        why_not = f"no {DEV_KVM} here"
    else:
        try:
            if probe(LinuxKernel()) is not None:
                return open_local(reason=f"auto: {DEV_KVM} offers TDX", promises=promises)
            why_not = f"{DEV_KVM} offers no TDX"
        except BackendUnavailable as error:
            why_not = str(error)
    from tdxhw.backends.sim import open_sim

    return open_sim((), reason=f"auto: {why_not}", promises=promises)
