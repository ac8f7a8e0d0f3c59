"""Serial over LAN, through ipmitool."""

import threading
from typing import Final

from tdxhw.lab.console.capture import Sink
from tdxhw.lab.console.program import ProgramSource
from tdxhw.lab.errors import ConsoleFailed
from tdxhw.lab.ipmitool import INSTALL, Ipmitool

_READY: Final = b"[SOL Session operational.  Use ~? for help]"


class SolSource:
    """The BMC's SOL session. There is one: whoever has it, mostly a dead ipmitool of ours, loses it to us."""

    def __init__(self, tool: Ipmitool) -> None:
        self.name = f"ipmi-sol {tool.address}"
        self._tool = tool
        # Not with usesolkeepalive: then a session that lost a packet on a busy machine stays silent for half a minute
        # and ends (measured with ipmi_sim: 2 of 2 sessions in 100 s, none of 7 with the usual keep-alive).
        self._program = ProgramSource(
            self.name, tool.argv("sol", "activate", tries=2), tool.environ(), ready=_READY, remedy=INSTALL,
            refusal=tool.refusal, goodbye_s=3.0,
        )  # fmt: skip

    def read(self, sink: Sink, stop: threading.Event) -> str:
        """End a session that may be left over, then read a new one."""
        try:
            done = self._tool.run("sol", "deactivate")
        except FileNotFoundError:
            raise ConsoleFailed(INSTALL) from None
        if refusal := self._tool.refusal(done.stderr):
            raise ConsoleFailed(refusal)
        if done.exit_code is None or "Unable to establish" in done.stderr:
            return self._tool.problem(done)
        return self._program.read(sink, stop)
