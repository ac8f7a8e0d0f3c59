"""ipmitool, called so that no password is ever on a command line and no call is without a limit in time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tdxhw.lab.bounded_command import Finished, run_bounded
from tdxhw.lab.credentials import Credentials

PROGRAM: Final = "ipmitool"
INSTALL: Final = "ipmitool is not installed: apt-get install ipmitool (dnf install ipmitool)"
_REFUSED: Final = (
    "RAKP 2 HMAC is invalid",  # wrong password
    "unauthorized name",
    "Invalid user name",
    "Unauthorized",
    "insufficient privilege",
    "Insufficient privilege",
    "invalid role",
    "password is longer than",
    "invalid authentication algorithm",  # the cipher suite, which it knows or does not
)


@dataclass(frozen=True, slots=True)
class Ipmitool:
    """How to reach one BMC over IPMI 2.0 (lanplus: encrypted, unlike ``lan``)."""

    options: Mapping[str, str | int | tuple[str, ...]]
    credentials: Credentials

    @property
    def address(self) -> str:
        """The BMC, with its port if that is not the usual one."""
        port = self.options.get("port")
        return f"{self.options['address']}:{port}" if port else str(self.options["address"])

    def argv(self, *command: str, tries: int = 3) -> list[str]:
        """Return the command line. The user's name is on it, the password is not (``-E``)."""
        options = self.options
        argv = [PROGRAM, "-I", "lanplus", "-H", str(options["address"]), "-U", self.credentials.user, "-E"]
        argv += ["-L", str(options.get("privilege", "operator")).upper(), "-N", "2", "-R", str(tries)]
        argv += ["-p", str(options["port"])] if "port" in options else []
        # Without the option ipmitool takes the best that the BMC offers.
        argv += ["-C", str(options["cipher_suite"])] if "cipher_suite" in options else []
        return [*argv, *command]

    def environ(self) -> dict[str, str]:
        """Return the environment in which ``-E`` finds the password."""
        password = self.credentials.password
        return {**os.environ, "IPMITOOL_PASSWORD": password, "IPMI_PASSWORD": password, "LC_ALL": "C"}

    def run(self, *command: str, limit_s: float = 20.0) -> Finished:
        """Run one command. ``OSError`` if there is no ipmitool."""
        return run_bounded(self.argv(*command), limit_s, self.environ())

    def refusal(self, said: str) -> str:
        """Return why trying again is of no use, nothing if it may be of some."""
        line = next((line.strip() for line in said.splitlines() if any(sign in line for sign in _REFUSED)), "")
        if "invalid authentication algorithm" in line:
            return "the BMC does not know this cipher suite: try cipher_suite: 3 (older BMCs), or 17"
        if line:
            return f"the BMC does not accept the credentials in {self.credentials.variable}: {line[:200]}"
        return ""

    def problem(self, done: Finished) -> str:
        """Return what a later try may cure."""
        if done.exit_code is None:
            return "no answer from the BMC"
        if "Unable to establish" in done.stderr:  # it may be either, and many BMCs do not say which
            return f"no session: does a BMC answer there, are the credentials in {self.credentials.variable} right?"
        return done.said[:200]
