"""Drive real and simulated KVM TDX hosts with one set of suites."""

from typing import Final

__version__: Final = "0.1.0"
"""The same as in pyproject.toml; a test compares them (reading package metadata would slow every start)."""
