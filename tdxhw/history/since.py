"""Points in time as people write them: ``2026-11-01``, ``2026-11-01T12:30``, ``7d``, ``12h``."""

import re
import time
from datetime import UTC, datetime
from typing import Final

import click

_UNITS_S: Final = {"h": 3600, "d": 86400, "w": 7 * 86400}


class Since(click.ParamType[float]):
    """Seconds since 1970 from a date (UTC unless it says otherwise) or from how long ago it was."""

    name = "DATE|7d"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the point in time [s since 1970]."""
        if isinstance(value, float):
            return value
        told = str(value)
        if ago := re.fullmatch(r"([0-9]{1,5})([hdw])", told):
            return time.time() - int(ago[1]) * _UNITS_S[ago[2]]
        try:
            date = datetime.fromisoformat(told)
        except ValueError:
            self.fail(f"{told!r} is no date: 2026-11-01, 2026-11-01T12:30, 7d, 12h, 2w", param, ctx)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
