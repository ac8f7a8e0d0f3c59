"""Lab hosts for tests: each a network, process, mount and host-name namespace with a real sshd of its own."""

import os
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

SSHD: Final = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin") or ""
# By process: two test runs on one machine must not share addresses.
SUBNET: Final = f"10.{64 + (os.getpid() >> 8) % 64}.{os.getpid() % 256}"


def why_impossible() -> str:
    """Return what is missing for such hosts on this machine, nothing if they can be made."""
    missing = [tool for tool in ("ip", "unshare", "ssh-keygen") if shutil.which(tool) is None]
    missing += [] if SSHD else ["sshd"]
    if missing:
        return f"no {', '.join(missing)}: apt-get install openssh-server iproute2 util-linux"
    if os.geteuid() != 0:
        return "namespaces need root"
    trial = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return f"unshare: {trial.stderr.decode().strip()}" if trial.returncode else ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class NamespaceHost:
    """One host. Its root's home, /run/lock, /etc and boot id are its own; the rest is this machine's."""

    def __init__(self, folder: Path, number: int, client_key: Path) -> None:
        self.name = f"host-{number}"
        self.address = f"{SUBNET}.{4 * number + 2}"
        self._near = f"{SUBNET}.{4 * number + 1}"
        self._tag = f"tdxhw{os.getpid() % 100000}-{number}"
        self._veth = f"tw{os.getpid() % 100000}n{number}"
        self.folder = folder / self.name
        self.folder.mkdir()
        self.client_key = client_key
        self._process: subprocess.Popen[bytes] | None = None
        self.new_host_key()

    # ---- what a test does to a host ----

    def new_host_key(self) -> None:
        """Give it another host key: it was installed anew."""
        key = self.folder / "host_key"
        key.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def known_hosts_line(self) -> str:
        """Return the line that vouches for it."""
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        return f"{self.address} {kind} {key}\n"

    def cut(self) -> None:
        """Pull its cable: packets vanish, nobody is told."""
        _ip("link", "set", self._veth, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._veth, "up")

    def processes(self, pattern: str) -> list[int]:
        """Return the processes on the host whose command line contains `pattern`."""
        found = subprocess.run(["ip", "netns", "pids", self._tag], check=True, capture_output=True, text=True).stdout
        matching = []
        for pid in found.split():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if pattern in line:
                matching.append(int(pid))
        return matching

    # ---- life ----

    def start(self) -> None:
        """Boot it and wait until its sshd answers."""
        if self._process is None:
            _ip("netns", "add", self._tag)
            _ip("link", "add", self._veth, "type", "veth", "peer", "name", "eth0", "netns", self._tag)
            _ip("addr", "add", f"{self._near}/30", "dev", self._veth)
            _ip("link", "set", self._veth, "up")
            for arguments in (["addr", "add", f"{self.address}/30", "dev", "eth0"], ["link", "set", "eth0", "up"],
                              ["link", "set", "lo", "up"]):  # fmt: skip
                _ip("-n", self._tag, *arguments)
        config = self.folder / "sshd_config"
        config.write_text(
            f"HostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nAcceptEnv LANG\nMaxSessions 64\n"
            f"MaxStartups 64\nAuthorizedKeysFile {self.client_key}.pub\nSubsystem sftp internal-sftp\n"
        )
        for name in ("upper", "work"):
            (self.folder / name).mkdir(exist_ok=True)
        q = shlex.quote
        script = f"""set -e
            mkdir -p /run/sshd
            for d in /root /run/lock; do mount -t tmpfs -o size=64m lab $d; done
            chmod 1777 /run/lock; chmod 700 /root
            cd {q(str(self.folder))}
            mount -t overlay overlay -o lowerdir=/etc,upperdir=upper,workdir=work /etc
            hostname {q(self.name)}
            cat /proc/sys/kernel/random/uuid >boot_id
            mount --bind boot_id /proc/sys/kernel/random/boot_id
            exec {q(SSHD)} -D -e -f {q(str(config))}"""
        log = (self.folder / "sshd.log").open("ab")
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self._tag, *namespaces, "sh", "-c", script]
        with log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait_for_banner()

    def _wait_for_banner(self) -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "sshd.log").read_text()
            try:
                with socket.create_connection((self.address, 22), timeout=1) as connection:
                    if connection.recv(4) == b"SSH-":
                        return
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"{self.name}: no sshd after 10 s: " + (self.folder / "sshd.log").read_text())

    def die(self) -> None:
        """Lose power: everything on it ends at once."""
        if self._process is not None:
            self._process.kill()  # unshare ignores SIGTERM; --kill-child takes the rest along
            self._process.wait()

    def reboot(self) -> None:
        """Lose power and come up again."""
        self.die()
        self.start()

    def remove(self) -> None:
        """Take it down and away."""
        self.die()
        subprocess.run(["ip", "link", "del", self._veth], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self._tag], check=False, capture_output=True)
