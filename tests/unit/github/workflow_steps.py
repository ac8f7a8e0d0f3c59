"""The steps of our workflows and of action.yml, and a way to execute them as a GitHub runner does."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[3]
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION: Final = ROOT / "action.yml"
_EXPRESSION: Final = re.compile(r"\$\{\{ *(.*?) *\}\}")
_NOT_COPIED: Final = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "golden", "results", "tests", "sim_backend/*.bin"
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step with ``run:``."""

    place: str  # "ci.yml/gate/The gate"
    run: str
    env: Mapping[str, str]


def documents() -> dict[str, dict[str, Any]]:
    """Return every workflow and the action, by file name. Strings stay strings: `on` is no boolean."""
    return {path.name: yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) for path in (*WORKFLOWS, ACTION)}


def all_steps(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of a document by job; the action is one job."""
    if "runs" in document:
        return {"action": document["runs"]["steps"]}
    return {name: job["steps"] for name, job in document["jobs"].items()}


def run_steps() -> dict[str, Step]:
    """Return every step with ``run:``, by its place."""
    steps = {}
    for file, document in documents().items():
        for job, members in all_steps(document).items():
            for step in members:
                if "run" in step:
                    place = f"{file}/{job}/{step['name']}"
                    assert place not in steps, f"two steps are called {place}"
                    steps[place] = Step(place, step["run"], step.get("env", {}))
    return steps


class Runner:
    """A directory tree like a GitHub runner's, and what a step leaves in it."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.temp = folder / "temp"
        self.tools = folder / "tools"
        for path in (self.workspace, self.temp, self.tools):
            path.mkdir()
        self._files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_PATH")}
        for path in self._files.values():
            path.touch()
        self.path = f"{self.tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def check_out(self) -> None:
        """Put the sources into the workspace."""
        shutil.copytree(ROOT, self.workspace, ignore=_NOT_COPIED, dirs_exist_ok=True)
        (self.workspace / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", self.workspace / ".ci" / "run")
        (self.workspace / ".venv").symlink_to(sys.prefix)

    def tool(self, name: str, script: str) -> None:
        """Put a tool of our own before those of the machine."""
        path = self.tools / name
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def execute(
        self, step: Step, expressions: Mapping[str, str] | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run it as ``shell: bash`` does. An expression that `expressions` does not know is a ``KeyError``."""
        known = dict(expressions or {})
        env = {name: _EXPRESSION.sub(lambda match: known[match[1]], str(value)) for name, value in step.env.items()}
        script = self.temp / "step.sh"
        script.write_text(step.run, encoding="utf-8")
        given = {"PATH": self.path, "HOME": str(self.temp), "RUNNER_TEMP": str(self.temp), "GITHUB_ACTIONS": "true"}
        given |= {"LANG": "C.UTF-8", "GITHUB_WORKSPACE": str(self.workspace)}
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=self.workspace,
            env=given | {name: str(path) for name, path in self._files.items()} | env | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    @property
    def outputs(self) -> dict[str, str]:
        """What the steps so far wrote to ``GITHUB_OUTPUT``."""
        lines = self._files["GITHUB_OUTPUT"].read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def summary(self) -> str:
        """The step summary."""
        return self._files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8")

    @property
    def added_path(self) -> str:
        """What was put before PATH for later steps."""
        return self._files["GITHUB_PATH"].read_text(encoding="utf-8").strip()
