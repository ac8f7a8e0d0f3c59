"""A lab host's console: serial over LAN, a program of yours, or the kernel log over SSH. Kept with times."""

import os
from collections.abc import Mapping
from pathlib import Path

from tdxhw.lab.console.capture import Capture, Source
from tdxhw.lab.console.lines import ConsoleLine, read_log
from tdxhw.lab.console.program import ProgramSource
from tdxhw.lab.console.sol import SolSource
from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import ConsoleFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.inventory import sol_options
from tdxhw.lab.ipmitool import Ipmitool

__all__ = ["Capture", "ConsoleFailed", "ConsoleLine", "open_console", "read_log"]


def open_console(
    host: Host,
    path: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    labs: Path | None = None,
    ssh_config: Path | None = None,
) -> Capture | None:
    """Return a capture of the console of `host` into the file `path`; enter it to begin.

    For a host whose lab file has no console: with `labs` the kernel log over SSH, without it None.
    ``ConsoleFailed`` if credentials are not set.
    """
    source: Source
    if host.console is None:
        if labs is None:
            return None
        from tdxhw.lab.connection import Session
        from tdxhw.lab.console.kernel_log import KernelLogSource

        source = KernelLogSource(lambda: Session.open(host, labs, ssh_config=ssh_config))
    elif host.console.driver == "command":
        argv = host.console.options["argv"]
        assert isinstance(argv, tuple)
        source = ProgramSource(f"command {argv[0]}", argv)
    else:
        options = sol_options(host)
        credentials = Credentials.read(str(options["credentials_env"]), environ, ConsoleFailed, host.name)
        source = SolSource(Ipmitool(options, credentials))
    return Capture(host.name, source, path)
