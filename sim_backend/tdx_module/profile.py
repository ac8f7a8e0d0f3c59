"""Module profiles: what differs between module releases is data."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from uapi_ctypes.tdx_status import Status


@dataclass(frozen=True, slots=True)
class Addition:
    """Something a profile has beyond the release that the vectors prove."""

    what: str
    source: str


@dataclass(frozen=True, slots=True)
class ModuleProfile:
    """One TDX module release as the model plays it."""

    name: str
    major_version: int
    minor_version: int
    update_version: int
    internal_version: int
    build_num: int
    build_date: int  # BCD yyyymmdd
    module_hv: int
    min_update_hv: int
    tdx_features0: int
    attributes_fixed0: int  # ATTRIBUTES bits that may be 1
    attributes_fixed1: int  # ATTRIBUTES bits that must be 1
    config_flags_fixed0: int  # CONFIG_FLAGS bits that may be 1
    config_flags_fixed1: int  # CONFIG_FLAGS bits that must be 1
    vp_init_version1: bool  # TDH.VP.INIT version 1 takes the x2APIC id in R8
    statuses: dict[int, int]  # RAX[63:32] of 1.5.01 -> RAX[63:32] of this profile, where they differ
    exact: bool  # every recorded vector of the real module agrees
    additions: tuple[Addition, ...]  # not checked against a real module


@lru_cache
def load_profile(name: str) -> ModuleProfile:
    """Return `tdx_module/profiles/NAME.yaml`; raise ``FileNotFoundError``."""
    directory = files("sim_backend.tdx_module") / "profiles"
    data: dict[str, Any] = {}
    for part in _lineage(name):
        data |= yaml.safe_load((directory / f"{part}.yaml").read_text())
    data.pop("base", None)
    data["name"] = name
    data["statuses"] = {int(Status[old]): new for old, new in data["statuses"].items()}
    data["additions"] = tuple(Addition(**addition) for addition in data["additions"])
    return ModuleProfile(**data)


def _lineage(name: str) -> list[str]:
    """Return `name` and the profiles it is based on, the oldest first."""
    directory = files("sim_backend.tdx_module") / "profiles"
    base = yaml.safe_load((directory / f"{name}.yaml").read_text()).get("base")
    return [*(_lineage(base) if base else []), name]
