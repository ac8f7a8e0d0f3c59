"""What the runner, the pytest plugin and the fixtures share about one session."""

from typing import Final

import pytest

from tdxhw.capabilities import Capabilities
from tdxhw.host import Backend, Host
from tdxhw.interruption import Interruption

BACKEND: Final = pytest.StashKey[Backend]()
"""The machines of the run."""
PROBES: Final = pytest.StashKey[dict[str, Capabilities]]()
"""What each host offers, by its id."""
EXPLICIT_SUITES: Final = pytest.StashKey[bool]()
"""Whether the user named the suites: one that cannot run at all is then an error, not a row of skips."""
INTERRUPTION: Final = pytest.StashKey[Interruption]()
"""Whether the run is being cut short; only under `tdxhw run`."""
DEFAULT_TIME_LIMIT_S: Final = 120.0
"""For one test [s]."""


def capabilities_of(config: pytest.Config, host: Host) -> Capabilities:
    """Return what `host` offers, probed once a session and only through its kernel."""
    probes = config.stash.setdefault(PROBES, {})
    if host.id not in probes:
        probes[host.id] = Capabilities(host.kernel)
    return probes[host.id]


def suite_of(nodeid: str) -> str:
    """Return the suite that a test belongs to: the name of its file without ``test_`` and ``.py``."""
    name = nodeid.partition("::")[0].rpartition("/")[2]
    return name.removeprefix("test_").removesuffix(".py")
