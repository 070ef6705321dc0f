"""Wheels of everything that this repository publishes, and empty environments outside it to install them in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECTS = [
    ROOT,
    *sorted(file.parent for place in ("plugins", "contrib") for file in ROOT.glob(f"{place}/*/pyproject.toml")),
]


def pyproject(project: Path) -> dict:
    """What the project's pyproject.toml says."""
    return tomllib.loads((project / "pyproject.toml").read_text())


NAMES = {canonicalize_name(pyproject(project)["project"]["name"]): project for project in PROJECTS}
"""Our distributions, and where the source of each is."""


def run(*command: object, cwd: Path, status: int = 0, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of this process's Python."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "PYTEST_", "VIRTUAL_ENV"))}
    clean |= {"NO_COLOR": "1", "COLUMNS": "200", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    clean |= {name: str(value) for name, value in environment.items()}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Wheel:
    """A wheel on disk."""

    path: Path

    @property
    def files(self) -> set[str]:
        with zipfile.ZipFile(self.path) as file:
            return set(file.namelist())

    def read(self, name: str) -> str:
        """A file of its ``.dist-info``."""
        with zipfile.ZipFile(self.path) as file:
            (path,) = (each for each in file.namelist() if each.split("/", 1)[1] == name and ".dist-info/" in each)
            return file.read(path).decode()

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(self.read("METADATA"))

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]


def closure(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """The other people's distributions that these requirements bring, as they are installed here."""
    found: dict[str, Distribution] = {}
    todo, seen = [(requirement, "") for requirement in requirements], set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in NAMES or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        for wanted in {"", *requirement.extras} - {each for known, each in seen if known == name}:
            seen.add((name, wanted))
            found[name] = distribution(name)
            todo += [(Requirement(line), wanted) for line in found[name].requires or ()]
    return found


def link(distributions: Iterable[Distribution], site: Path) -> None:
    """Make installed distributions, and nothing beside them, visible in ``site``."""
    for each in distributions:
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (site / top).is_symlink():
                (site / top).symlink_to(str(each.locate_file(top)))


class Environment:
    """A virtual environment with wheels of ours, and of other people's what the wheels' metadata ask for.

    The latter are links to what is installed here: pip finds them and checks their versions, nothing is downloaded,
    and what the metadata forget is missing.
    """

    def __init__(self, directory: Path, wheels: Iterable[Wheel]) -> None:
        self.directory, self.bin = directory, directory / "venv" / "bin"
        venv.create(directory / "venv", symlinks=True)
        base = {"base": str(directory / "venv"), "platbase": str(directory / "venv")}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=base))
        self.cwd = directory / "elsewhere"
        self.cwd.mkdir()
        wheels = list(wheels)
        link(closure(requirement for wheel in wheels for requirement in wheel.requirements).values(), self.site)
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python")
        run(*pip, "install", "--no-index", *(wheel.path for wheel in wheels), cwd=self.cwd)
        run(*pip, "check", cwd=self.cwd)

    def python(self, *arguments: object, status: int = 0, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run its interpreter, outside the repository."""
        return run(self.bin / "python", *arguments, cwd=self.cwd, status=status, **environment)

    def cli(self, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run its ``trtllm-core``, outside the repository."""
        return run(self.bin / "trtllm-core", *arguments, cwd=self.cwd, status=status)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """The wheel of each of our distributions, by name."""
    house = tmp_path_factory.mktemp("wheels")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", house)
    run(*command, *PROJECTS, cwd=house)
    return {canonicalize_name(file.name.split("-")[0]): Wheel(file) for file in house.glob("*.whl")}


MakeEnvironment = Callable[..., Environment]


@pytest.fixture(scope="session")
def make_environment(wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory) -> MakeEnvironment:
    """``make_environment("trtllm-core", …)``: a new environment with these wheels."""
    return lambda *names: Environment(tmp_path_factory.mktemp("environment"), [wheels[name] for name in names])


@pytest.fixture(scope="session")
def core_only(make_environment: MakeEnvironment) -> Environment:
    return make_environment("trtllm-core")


@pytest.fixture(scope="session")
def installed(make_environment: MakeEnvironment) -> Environment:
    return make_environment("trtllm-core", "trtllm-plugin-llama")


@pytest.fixture(scope="session")
def everything(make_environment: MakeEnvironment) -> Environment:
    return make_environment(*NAMES)


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with what tests need: a layer over an environment, which stays as it is."""
    layer = tmp_path_factory.mktemp("tools")
    link(closure(map(Requirement, pyproject(ROOT)["dependency-groups"]["dev"])).values(), layer)
    return layer
