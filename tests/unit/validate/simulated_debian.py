"""A Debian host with GRUB in a folder: enough of dpkg, apt and GRUB for the journal to change it and have it back.

Its power can be cut before any effect, and in the middle of dpkg's and GRUB's work.
"""

import hashlib
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from tdxhw.validate.remote import journal
from tdxhw.validate.remote.journal import ChangeError

OWN: Final = "6.12.9-own"
MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where folders of such hosts are made: the journal has everything written to the disk, which there costs nothing."""

_HEADER: Final = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="DEFAULT"
fi
"""
_FOOTER: Final = "if [ -f $prefix/custom.cfg ]; then\n  source $prefix/custom.cfg\nfi\n"


class PowerCut(BaseException):
    """The plug was pulled: nothing of the program runs any more."""


class SimulatedDebian(journal.Host):
    """Files below a folder, and programs that work on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cut_after: int | None = None
        """How many more effects there are before the power is cut; None: it is not."""
        self.effects = 0
        self.broken: set[str] = set()
        """Programs that fail."""
        self.locked_s = 0.0
        """How long somebody else still works on its packages [s]."""
        self.has_initramfs_hook = True
        self.arguments = "root=/dev/sda1 ro"
        """The kernel's command line in its menu."""
        self.archive: dict[str, dict[str, Any]] = {}
        """What is in the .deb of a name: release, size, packages it needs."""

    @classmethod
    def install(cls, root: Path) -> "SimulatedDebian":
        """Make the host."""
        host = cls(root)
        folders = (
            "boot/grub", "etc/default", "etc/systemd/system", "lib/modules", "var/lib/initramfs-tools", "run",
            "var/lib/dpkg", "var/lib/tdxhw", "var/tmp",
        )  # fmt: skip
        for folder in folders:
            (root / folder).mkdir(parents=True)
        (root / "etc/default/grub").write_text("GRUB_DEFAULT=0\n")
        host.save_packages({"linux-image-own": {"version": "1", "status": "installed", "release": OWN}})
        host.unpack_kernel(OWN)
        host.save_environment({})
        (root / "vmlinuz").symlink_to(f"boot/vmlinuz-{OWN}")
        host.update_grub()
        return host

    # ---- what a test looks at ----

    def snapshot(self) -> dict[str, str]:
        """Return everything that is on its disk, but for the journal."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if name.startswith(("var/lib/tdxhw", "run/")):
                continue
            if path.is_symlink():
                found[name] = f"-> {path.readlink()}"
            elif path.is_file():
                found[name] = f"{path.stat().st_mode & 0o7777:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            else:
                found[name] = "folder"
        return found

    # ---- the machinery ----

    def effect(self) -> None:
        """Something is about to be changed."""
        self.effects += 1
        if self.cut_after is not None:
            if self.cut_after == 0:
                raise PowerCut
            self.cut_after -= 1

    def path(self, name: str) -> Path:
        self.effect()
        return self.root / name.lstrip("/")

    def sync(self) -> None:
        self.effect()

    def wait(self, seconds: float) -> None:
        self.locked_s -= seconds

    def command(self, argv: list[str], limit_s: float = 600.0) -> str:
        self.effect()
        program = argv[0]
        if self.locked_s > 0 and program in ("apt-get", "dpkg") and "--simulate" not in argv:
            said = {
                "apt-get": "E: Could not get lock /var/lib/dpkg/lock. It is held by process 7 (unattended-upgr)",
                "dpkg": "dpkg: error: dpkg frontend lock was locked by another process with pid 7",
            }
            raise ChangeError(f"{shlex.join(argv)}: exit code 2: {said[program]}")
        if program in self.broken:
            raise ChangeError(f"{shlex.join(argv)}: exit code 1: it is broken")
        match argv:
            case ["update-grub"]:
                self.update_grub()
            case ["grub-editenv", _, "list"]:
                return "".join(f"{name}={value}\n" for name, value in self.environment().items())
            case ["grub-editenv", _, "set", setting]:
                name, _, value = setting.partition("=")
                self.save_environment(self.environment() | {name: value})
            case ["grub-editenv", _, "unset", name]:
                self.save_environment({key: value for key, value in self.environment().items() if key != name})
            case ["apt-get", *options, "install", files] if files:
                return self.apt([files], simulate="--simulate" in options)
            case ["dpkg-query", *_]:
                return "".join(f"{name} {one['status']}\n" for name, one in self.packages().items())
            case ["dpkg", "--purge", "--force-remove-reinstreq", *names]:
                for name in names:
                    self.purge(name)
            case ["dpkg", "--configure", "-a"]:
                for name, one in self.packages().items():
                    if one["status"] == "unpacked":
                        self.configure(name)
            case ["update-initramfs", "-c", "-k", release]:
                # As mkinitramfs does, which removes it in a trap: a power cut runs none.
                work = Path(tempfile.mkdtemp(prefix="mkinitramfs_", dir=self.scratch or self.file("var/tmp")))
                (work / "init").write_text("init")
                self.effect()
                partial = self.file(f"boot/initrd.img-{release}.new")
                partial.write_text("ini")
                self.effect()
                partial.write_text("initrd")
                partial.replace(self.file(f"boot/initrd.img-{release}"))
                self.effect()
                self.file(f"var/lib/initramfs-tools/{release}").write_text("sum")
                shutil.rmtree(work)
            case ["depmod", release]:
                self.file(f"lib/modules/{release}/modules.dep").write_text("")
            case _:
                raise AssertionError(f"the simulated host has no {argv}")
        return ""

    def file(self, name: str) -> Path:
        return self.root / name

    # ---- dpkg and apt ----

    def packages(self) -> dict[str, dict[str, Any]]:
        packages = json.loads(self.file("var/lib/dpkg/status").read_text())
        assert isinstance(packages, dict)
        return packages

    def save_packages(self, packages: dict[str, dict[str, Any]]) -> None:
        self.file("var/lib/dpkg/status").write_text(json.dumps(packages, sort_keys=True))

    def apt(self, files: list[str], *, simulate: bool) -> str:
        names = [Path(file).stem for file in files]
        if simulate:
            here = self.packages()
            new = [name for name in names if here.get(name, {}).get("status") in (None, "config-files")]
            lines = [f"Inst {name} (1 localhost [amd64])" for name in new]
            for name in new:
                lines += self.archive[name].get("plan", [])
            return "\n".join(lines)
        for name in names:
            release = self.archive[name]["release"]
            self.set_status(name, "half-installed", release)
            self.effect()
            self.unpack_kernel(release)
            self.set_status(name, "unpacked", release)
            self.effect()
            self.configure(name)
        return ""

    def set_status(self, name: str, status: str, release: str) -> None:
        self.save_packages(self.packages() | {name: {"version": "1", "status": status, "release": release}})

    def unpack_kernel(self, release: str) -> None:
        self.file(f"lib/modules/{release}").mkdir(exist_ok=True)
        self.file(f"lib/modules/{release}/kvm.ko").write_text(release)
        partial = self.file(f"boot/vmlinuz-{release}.dpkg-new")
        partial.write_text(release)
        self.effect()
        partial.replace(self.file(f"boot/vmlinuz-{release}"))
        if release == OWN:
            self.file(f"boot/initrd.img-{release}").write_text("initrd")

    def configure(self, name: str) -> None:
        release = self.packages()[name]["release"]
        if self.has_initramfs_hook:
            self.command(["update-initramfs", "-c", "-k", release])
        self.command(["update-grub"])
        self.links_to(f"boot/vmlinuz-{release}")
        self.set_status(name, "installed", release)

    def links_to(self, kernel: str) -> None:
        """Do as linux-update-symlinks does: to another kernel, what there was before becomes the old one."""
        for name in ("vmlinuz.old", "vmlinuz"):
            self.effect()
            self.file(name).unlink(missing_ok=True)
            self.effect()
            self.file(name).symlink_to(kernel)

    def purge(self, name: str) -> None:
        packages = self.packages()
        release = packages[name]["release"]
        # As the real postrm does: what dpkg did not bring stays if it is cut off before.
        for path in (f"boot/vmlinuz-{release}", f"lib/modules/{release}/kvm.ko"):
            self.file(path).unlink(missing_ok=True)
        self.effect()
        self.command(["update-grub"])
        self.links_to(f"boot/vmlinuz-{OWN}")
        del packages[name]
        self.save_packages(packages)

    # ---- GRUB ----

    def environment(self) -> dict[str, str]:
        environment = json.loads(self.file("boot/grub/grubenv").read_text())
        assert isinstance(environment, dict)
        return environment

    def save_environment(self, environment: dict[str, str]) -> None:
        self.file("boot/grub/grubenv").write_text(json.dumps(environment, sort_keys=True))

    def update_grub(self) -> None:
        """Write the menu: the newest kernel first. Releases of tests compare as text."""
        default = "0"
        fragments = sorted((self.root / "etc/default").glob("grub.d/*.cfg"))
        for path in (self.file("etc/default/grub"), *fragments):
            for line in path.read_text().splitlines():
                if line.startswith("GRUB_DEFAULT="):
                    default = line.partition("=")[2].strip("'")
        releases = sorted(path.name.removeprefix("vmlinuz-") for path in self.file("boot").glob("vmlinuz-*"))
        newest_first = list(reversed(releases))
        entries = [self._entry("simple", newest_first[0])]
        inner = "".join(self._entry(release, release) for release in newest_first)
        menu = "".join(entries) + f"submenu 'More' $menuentry_id_option 'more' {{\n{inner}}}\n"
        text = _HEADER.replace("DEFAULT", default) + menu + _FOOTER
        self.file("boot/grub/grub.cfg.new").write_text(text)
        self.effect()
        self.file("boot/grub/grub.cfg.new").rename(self.file("boot/grub/grub.cfg"))

    def _entry(self, identifier: str, release: str) -> str:
        initrd = f"\tinitrd /boot/initrd.img-{release}\n" if self.file(f"boot/initrd.img-{release}").exists() else ""
        name = "linux-simple" if identifier == "simple" else f"linux-{identifier}"
        return (
            f"menuentry 'Linux {release}' $menuentry_id_option '{name}' {{\n"
            f"\tlinux /boot/vmlinuz-{release} {self.arguments}\n{initrd}}}\n"
        )
