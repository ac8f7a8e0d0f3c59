"""What happens where a lab test cannot have what it needs."""

import os
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip; under `make test-lab`, where nothing may be missing, fail."""
    if os.environ.get("TDXHW_LAB_TESTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)
