"""Module parameters as a matrix: ``kvm_intel.tdx=Y,N`` and ``kvm_intel.ept=Y,N`` are four boots.

Names and values end on a kernel command line, by way of a boot loader's configuration. So only characters that mean
nothing to either are let through.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import prod
from typing import Final

from tdxhw.errors import HarnessError

MAX_BOOTS: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_VALUE: Final = re.compile(r"[A-Za-z0-9_.:+/-]+")


class MatrixError(HarnessError):
    """The matrix cannot be understood, or is not safe on a command line."""


def parse(words: Iterable[str]) -> list[dict[str, str]]:
    """Return one ``{parameter: value}`` per boot, the first values first, the last parameter varying fastest.

    No words are one boot without parameters. ``MatrixError`` names the word that is wrong.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise MatrixError(f"{word!r}: a matrix is written MODULE.PARAMETER=VALUE,VALUE…, as kvm_intel.tdx=Y,N")
        module, _, parameter = name.partition(".")
        name = f"{module.replace('-', '_')}.{parameter.replace('-', '_')}"  # the kernel takes either for the other
        if name in axes:
            raise MatrixError(f"{word!r}: {name} is there twice")
        axes[name] = _values(word, values)
    boots = prod(len(values) for values in axes.values())
    if boots > MAX_BOOTS:
        raise MatrixError(f"the matrix has {boots} boots; at most {MAX_BOOTS} are one validation")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _values(word: str, text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    for value in values:
        if not _VALUE.fullmatch(value):
            raise MatrixError(f"{word!r}: {value!r} is no value for a command line: letters, digits and _.:+/- are")
    if len(set(values)) < len(values):
        raise MatrixError(f"{word!r}: a value is there twice")
    return values


def words(parameters: dict[str, str]) -> str:
    """Return the parameters of one boot as they stand on the kernel command line."""
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def differs(parameters: Mapping[str, str], base: Mapping[str, str]) -> bool:
    """Whether one of `parameters` has another value in `base`, as /sys/module shows it; what is not there does not."""
    return any(name in base and _meant(value, base[name]) != base[name] for name, value in parameters.items())


def is_in_effect(value: str, shown: str) -> bool:
    """Whether a parameter has the value that was asked for, as /sys/module shows it: 0x10 as 16, on as Y."""
    try:
        return int(value, 0) == int(shown, 0)
    except ValueError:
        return _meant(value, shown) == shown


def _meant(value: str, shown: str) -> str:
    """Return a value as the kernel would show it, where it shows a switch (`kstrtobool()`)."""
    if shown not in ("Y", "N"):
        return value
    return {"y": "Y", "t": "Y", "1": "Y", "n": "N", "f": "N", "0": "N"}.get(
        value[:1].lower(), {"on": "Y", "of": "N"}.get(value[:2].lower(), value)
    )
