"""YAML whose every value knows its file and line, so that an error can say where it is.

PyYAML is asked for nodes, never for objects: no tag is ever constructed, so loading a file runs no code, and
`on`, `no` or `1e3` cannot silently become something else than what the schema wants.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

from tdxhw.lab.errors import InventoryError

try:
    import yaml
except ImportError as missing:
    raise InventoryError("lab files are read with PyYAML: pip install 'tdxhw[lab]'") from missing

_STRING: Final = "tag:yaml.org,2002:str"
_BOOLEAN: Final = "tag:yaml.org,2002:bool"
_INTEGER: Final = "tag:yaml.org,2002:int"
_NULL: Final = "tag:yaml.org,2002:null"
_WORDS: Final = {
    _BOOLEAN: "true/false",
    "tag:yaml.org,2002:float": "a fractional number",
    "tag:yaml.org,2002:timestamp": "a date",
    _INTEGER: "a number",
    _NULL: "nothing",
    _STRING: "text",
}


@dataclass(frozen=True, slots=True)
class Located:
    """One YAML value with its place: ``labs/spr-01.yaml:7``."""

    path: Path
    node: yaml.Node
    what: str  # how errors call this value: "limits.memory_gib"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the one document in `path`. ``InventoryError`` names file and line if it is not YAML."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InventoryError(f"{path}: cannot read it: {error.strerror}") from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise InventoryError(f"{path}:{line}: not UTF-8 text") from error
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise InventoryError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem or error.context}") from error
        except yaml.YAMLError as error:
            raise InventoryError(f"{path}:1: not YAML: {str(error).splitlines()[0]}") from error
        except RecursionError as error:
            raise InventoryError(f"{path}:1: too deep to be a lab file") from error
        if node is None:
            raise InventoryError(f"{path}:1: the file is empty; `tdxhw lab init` writes one to start from")
        return cls(path, node, "the file")

    @property
    def place(self) -> str:
        """``file:line`` of the value."""
        return f"{self.path}:{self.node.start_mark.line + 1}"

    def fail(self, problem: str) -> NoReturn:
        """Raise ``InventoryError`` at the place of the value."""
        raise InventoryError(f"{self.place}: {problem}")

    def _kind(self) -> str:
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        return _WORDS.get(self.node.tag, f"a value tagged {self.node.tag}")

    def _wants(self, kind: str) -> NoReturn:
        hint = " (quote it if it is meant as text)" if kind == "text" and self.node.tag in _WORDS else ""
        self.fail(f"{self.what} has to be {kind}, not {self._kind()}{hint}")

    def mapping(self, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, "Located"]:
        """Return the values by key. Unknown, repeated and missing keys are errors."""
        names = list(known)
        prefix = "" if self.what == "the file" else f"{self.what}."
        values: dict[str, Located] = {}
        for key, value in self._pairs():
            name = key.name()
            if name in values:
                key.fail(f"{key.what} {name!r} is there twice, first on line {values[name].key_line}")
            if name not in names:
                key.fail(f"unknown key {name!r}; {self.what} may have: {', '.join(names)}")
            values[name] = Located(self.path, value, prefix + name)
        for name in required:
            if name not in values:
                self.fail(f"{self.what} has no {name!r}")
        return values

    @property
    def key_line(self) -> int:
        """Line on which the value begins."""
        return int(self.node.start_mark.line) + 1

    def key_nodes(self) -> Iterator["Located"]:
        """Yield the keys, for a check that wants to see them before the schema does."""
        for key, _ in self._pairs():
            yield key

    def _pairs(self) -> Iterator[tuple["Located", yaml.Node]]:
        if not isinstance(self.node, yaml.MappingNode):
            self._wants("a mapping")
        for key, value in self.node.value:
            yield Located(self.path, key, "key"), value

    def items(self) -> list["Located"]:
        """Return the members of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self._wants("a list")
        return [Located(self.path, node, f"{self.what}[{index}]") for index, node in enumerate(self.node.value)]

    def name(self) -> str:
        """Return a key as it is written: to YAML 1.1 a plain ``on`` and ``off`` are true and false."""
        is_word = isinstance(self.node, yaml.ScalarNode) and self.node.tag == _BOOLEAN
        return str(self.node.value) if is_word else self.text()

    def text(self) -> str:
        """Return a non-empty text."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != _STRING:
            self._wants("text")
        value = str(self.node.value)
        if not value.strip():
            self.fail(f"{self.what} is empty")
        return value

    def integer(self, minimum: int, maximum: int) -> int:
        """Return a whole number between `minimum` and `maximum`, both included."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != _INTEGER:
            self._wants("a whole number")
        try:
            value = int(self.node.value)
        except ValueError:  # YAML 1.1 also has 0x10, 0b1 and 1:30: nobody means the last
            self.fail(f"{self.what}: write {self.node.value!r} as a plain decimal number")
        if not minimum <= value <= maximum:
            self.fail(f"{self.what} is {value}; it has to be between {minimum} and {maximum}")
        return value

    def texts(self) -> tuple[str, ...]:
        """Return a list of texts, each at most once."""
        seen: dict[str, Located] = {}
        for item in self.items():
            text = item.text()
            if text in seen:
                item.fail(f"{self.what} has {text!r} twice")
            seen[text] = item
        return tuple(seen)
