"""Read GRUB's menu: which entry boots when nobody chooses, which kernel an entry loads, and an entry for another one.

``grub.cfg`` is a program; read is only the part of its language that ``grub-mkconfig`` writes into a menu.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from tdxhw.errors import HarnessError
from tdxhw.lab.kernel_command_line import SEPARATOR, halves_for_grub

CANDIDATE: Final = "tdxhw-validate"
"""The id of the entry that boots the kernel on trial."""

TITLE: Final = "Kernel on trial"
"""What that entry is called; GRUB says it when it boots it."""

_LINUX: Final = ("linux", "linux16", "linuxefi")
_INITRD: Final = ("initrd", "initrd16", "initrdefi")
_LOADED: Final = "set tdxhw_loaded=1"
_NEEDS_INITRD: Final = re.compile(r"root=(UUID|LABEL)=")
_NOT_COPIED: Final = ("echo", "savedefault", "recordfail", "initrdfail", *_INITRD)
"""What writes the entry that runs into GRUB's environment (Ubuntu's would boot it again), or only talks."""
_DEFAULT: Final = re.compile(r"""^\s*set default=(?:"([^"]*)"|'([^']*)'|(\S+))""", re.MULTILINE)


class MenuError(HarnessError):
    """GRUB's configuration cannot be understood, so it is left alone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A menu entry, or a submenu with its entries."""

    title: str
    id: str
    body: tuple[str, ...] = ()
    children: tuple["Entry", ...] = field(default=())
    is_submenu: bool = False

    @property
    def kernel(self) -> str:
        """The file it loads as the kernel, as GRUB names it; nothing if it loads none."""
        words = self._command(_LINUX)
        return words[1] if len(words) > 1 else ""

    @property
    def arguments(self) -> str:
        """The kernel's command line."""
        lines = (line.removeprefix("if ").removesuffix("; then").split(maxsplit=2) for line in self.body)
        return next((words[2] for words in lines if len(words) > 2 and words[0] in _LINUX), "")

    @property
    def initrds(self) -> tuple[str, ...]:
        """The files that it loads as initial RAM disk."""
        return tuple(self._command(_INITRD)[1:])

    @property
    def kernel_name(self) -> str:
        """The kernel's file name: ``vmlinuz-6.12.9``."""
        return PurePosixPath(self.kernel).name

    def _command(self, names: Sequence[str]) -> list[str]:
        lines = (line.removeprefix("if ").removesuffix("; then").split() for line in self.body)
        return next((words for words in lines if words and words[0] in names), [])


def parse(configuration: str) -> tuple[Entry, ...]:
    """Return the menu. ``MenuError`` if braces do not match."""
    lines = iter(configuration.splitlines())
    return tuple(_entries(lines, outermost=True))


def _entries(lines: Iterator[str], *, outermost: bool) -> Iterator[Entry]:
    depth = 0
    for line in lines:
        stripped = line.strip()
        word = stripped.split(maxsplit=1)[0] if stripped else ""
        if word in ("menuentry", "submenu") and stripped.endswith("{"):
            title, identifier = _header(stripped)
            if word == "submenu":
                children = tuple(_entries(lines, outermost=False))
                yield Entry(title, identifier, children=children, is_submenu=True)
            else:
                yield Entry(title, identifier, tuple(_body(lines)))
        elif stripped.startswith("#"):
            continue
        elif stripped == "}":
            if depth:
                depth -= 1
            elif outermost:
                raise MenuError("grub.cfg: a '}' too many")
            else:
                return
        elif stripped.endswith("{"):
            depth += 1
    if depth or not outermost:
        raise MenuError("grub.cfg: a '}' is missing")


def _body(lines: Iterator[str]) -> Iterator[str]:
    depth = 0
    for line in lines:
        stripped = line.strip()
        if stripped == "}" and depth == 0:
            return
        depth += stripped.endswith("{") - (stripped == "}")
        yield stripped
    raise MenuError("grub.cfg: a menu entry has no end")


def _header(line: str) -> tuple[str, str]:
    try:
        words = shlex.split(line.removesuffix("{"))
    except ValueError as error:
        raise MenuError(f"grub.cfg: {line}: {error}") from error
    title = words[1] if len(words) > 1 else ""
    identifier = next((after for word, after in itertools.pairwise(words) if _is_id_option(word)), "")
    return title, identifier or title  # GRUB itself takes the title where there is no id


def _is_id_option(word: str) -> bool:
    return word in ("--id", "$menuentry_id_option", "${menuentry_id_option}")


def parse_environment(listing: str) -> dict[str, str]:
    """Return GRUB's environment from what ``grub-editenv list`` prints."""
    return dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)


def one_shot_works(configuration: str) -> bool:
    """Whether the configuration reads ``next_entry`` and forgets it before it boots."""
    wanted = ("load_env", 'set default="${next_entry}"', "save_env next_entry")
    return all(words in configuration for words in wanted)


def reads_custom(configuration: str) -> bool:
    """Whether the configuration reads ``custom.cfg``, where the entry on trial goes."""
    return "/custom.cfg" in configuration


def waits_for_ever(configuration: str) -> bool:
    """Whether its menu waits for somebody to choose."""
    return re.search(r"^\s*set timeout=[\"']?-", configuration, re.MULTILINE) is not None


def asks_for_a_password(configuration: str) -> bool:
    """Whether entries are only for users who have a password: it would be asked for on the console."""
    return re.search(r"^\s*set superusers=[\"']?[^\s\"']", configuration, re.MULTILINE) is not None


def default_entry(configuration: str, environment: Mapping[str, str]) -> Entry:
    """Return the entry that boots when nobody chooses. ``MenuError`` if that cannot be told."""
    choices = [next(text for text in found if text) for found in _DEFAULT.findall(configuration) if any(found)]
    choices = [choice for choice in choices if choice != "${next_entry}"]
    if not choices:
        raise MenuError("grub.cfg sets no default")
    choice = choices[-1].replace("${saved_entry}", environment.get("saved_entry") or "0")
    entries = parse(configuration)
    found: Entry | None = None
    for part in choice.split(">"):
        found = _choose(entries, part)
        if found is None:
            raise MenuError(f"grub.cfg: the default is {choice!r}, and no entry is called that")
        entries = found.children
    while found is not None and found.is_submenu:  # GRUB shows it, and then boots its first entry
        found = found.children[0] if found.children else None
    if found is None:
        raise MenuError(f"grub.cfg: the default is {choice!r}, a menu without entries")
    return found


def _choose(entries: Sequence[Entry], name: str) -> Entry | None:
    for entry in entries:
        if name in (entry.id, entry.title):
            return entry
    if name.isdecimal() and int(name) < len(entries):
        return entries[int(name)]
    return None


def path_to(configuration: str, kernel_name: str) -> tuple[str, Entry]:
    """Return the lasting name of the entry that loads a kernel, as GRUB_DEFAULT takes it, and the entry.

    The first of the menu does not count: it is called the same whichever kernel is the newest. ``MenuError`` if no
    other entry loads that kernel.
    """
    for path, entry in _walk(parse(configuration), ()):
        if entry.kernel_name == kernel_name and "-simple" not in entry.id and "recovery" not in entry.id:
            return ">".join(path), entry
    raise MenuError(f"GRUB's menu has no lasting entry for {kernel_name}")


def _walk(entries: Sequence[Entry], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Entry]]:
    for entry in entries:
        if entry.is_submenu:
            yield from _walk(entry.children, (*above, entry.id))
        else:
            yield (*above, entry.id), entry


def candidate_entry(base: Entry, kernel: str, initrd: str, append: str, root: str = "") -> str:
    """Return the text of an entry that boots `kernel` the way `base` boots its own, with `append` on the command line.

    What is for the kernel in `append` goes before a ``--`` of `base`: behind it, it would be for init, and do nothing.
    Without `initrd` it loads none, and `root` takes the place of a root that only one would find (by UUID or label).
    What GRUB cannot load (it is broken, or not signed) it would answer with a menu that waits for somebody for ever:
    then it boots `base`. It is not saved as the default, whatever `base` does.
    """
    for_kernel, for_init = halves_for_grub(base.arguments)
    if not initrd and root:
        for_kernel = [root if _NEEDS_INITRD.match(word) else word for word in for_kernel]
    more_for_kernel, more_for_init = halves_for_grub(append)
    for_init += more_for_init
    arguments = " ".join([*for_kernel, *more_for_kernel, *([SEPARATOR, *for_init] if for_init else [])])
    folder = str(PurePosixPath(base.kernel).parent).rstrip("/")
    early = [file for file in base.initrds if not PurePosixPath(file).name.startswith("init")]
    own = [line for line in base.body if line.split(maxsplit=1)[:1] and line.split(maxsplit=1)[0] in _LINUX + _INITRD]
    body = []
    for line in base.body:
        word = line.split(maxsplit=1)[0] if line else ""
        if word in _LINUX:
            load = f"if {word} {folder}/{kernel} {arguments}; then"
            if initrd:
                # Asked for before anything is loaded: GRUB does not recover from a half loaded kernel (tried).
                body += ["set tdxhw_loaded=", f"if [ -f {folder}/{initrd} ]; then", f"\t{load}"]
                body += [f"\t\t{_initrd_command(base)} {' '.join([*early, f'{folder}/{initrd}'])}"]
                body += [f"\t\t{_LOADED}", "\tfi"]
            else:
                body += ["set tdxhw_loaded=", load, f"\t{_LOADED}"]
            body += ["fi", 'if [ "${tdxhw_loaded}" != 1 ]; then', *(f"\t{one}" for one in own), "fi"]
        elif word not in _NOT_COPIED:
            body.append(line)
    lines = "".join(f"\t{line}\n" for line in body)
    return f"menuentry '{TITLE}: {kernel}' --id {CANDIDATE} {{\n{lines}}}\n"


def _initrd_command(base: Entry) -> str:
    words = (line.split(maxsplit=1)[0] for line in base.body if line)
    return next((word for word in words if word in _INITRD), "initrd")
