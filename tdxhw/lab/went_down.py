"""What is recorded of a test during which its host went down, and did so because of it."""

from typing import Final

REBOOTED: Final = "the host rebooted during this test"
POWER_WENT_AGAIN: Final = "the host's power went off during this test, a second time"
TOOK_THE_HOST_DOWN: Final = frozenset({REBOOTED, POWER_WENT_AGAIN})
"""The messages of failures that are no mere suspicion, however few the tries."""
