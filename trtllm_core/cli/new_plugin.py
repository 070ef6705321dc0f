"""``trtllm-core new-plugin``: a package that works, to start a plugin from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_core.cli.console import stdout
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.plugin import Plugins

PREFIX = "trtllm-plugin-"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TEMPLATES = "templates"
_TORCH = '"torch>=2.11", '
_PYDANTIC = '"pydantic>=2.9", '


@dataclass(frozen=True)
class Scaffold:
    """What differs between kinds of plugins."""

    summary: str
    kind: str
    """As in ``HOOK_VERSIONS``."""
    usage: str
    """A command that uses it, or a comment."""
    dependencies: str = _PYDANTIC + _TORCH
    test_dependencies: str = ""
    registry: str = ""
    """Attribute of ``Plugins`` that it registers with."""
    bench: bool = False
    target: str = "$package.plugin"


SCAFFOLDS = {
    "logits-processor": Scaffold(
        "The logits processor $name for trtllm-core",
        "logits_processor",
        'trtllm-core run engine "Hello" --temperature 0.8 --processor \'$name:{"amount": 2.0}\'',
        registry="logits_processors",
        bench=True,
    ),
    "stopping-criterion": Scaffold(
        "The stopping criterion $name for trtllm-core",
        "stopping_criterion",
        'trtllm-core run engine "Hello" --criterion \'$name:{"most": 5}\'',
        dependencies=_PYDANTIC,
        registry="stopping_criteria",
        bench=True,
    ),
    "decoder": Scaffold(
        "The decoder $name for trtllm-core",
        "decoder",
        'trtllm-core run engine "Hello" --decoder \'$name:{"sharpness": 2.0}\'',
        registry="decoders",
        bench=True,
    ),
    "kv-policy": Scaffold(
        "The KV cache policy $name for trtllm-core",
        "kv_policy",
        "trtllm-core explain engine --kv-policy $name",
        dependencies=_PYDANTIC,
        registry="kv_policies",
    ),
    "family": Scaffold(
        "The model family $name for trtllm-core",
        "model_family",
        "trtllm-core build path/to/checkpoint -o engine",
        dependencies=_TORCH,
        test_dependencies=', "transformers>=5"',
        registry="model_families",
    ),
    "backend": Scaffold(
        "The backend $name for trtllm-core",
        "backend",
        "trtllm-core build path/to/checkpoint -o engine --backend $name",
        dependencies=_TORCH,
        test_dependencies=', "trtllm-plugin-llama"',
        registry="backends",
    ),
    "observer": Scaffold(
        "The observer $name for trtllm-core",
        "observer",
        'trtllm-core run engine "Hello"',
        dependencies="",
        target="$package.plugin:plugin",
    ),
}


def new_plugin(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(SCAFFOLDS)}.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Small letters, digits and hyphens: my-plugin.")],
    into: Annotated[Path, typer.Option(help="Where the package's directory is made.")] = Path(),
) -> None:
    """Write a package with a plugin that works and a test that passes, to be changed into what you want."""
    made = write(kind, name, into)
    stdout().print(f"{made} is there. Next:\n", soft_wrap=True)
    for line in (f"cd {made}", 'pip install -e ".[test]"', "pytest"):
        stdout().print(f"    {line}", markup=False, soft_wrap=True)


def write(kind: str, name: str, into: Path) -> Path:
    """Write the package ``trtllm-plugin-NAME`` into a directory, and return where it is.

    Raises:
        ConfigError: there is no such kind, the name is none or is taken, or the package's directory is there already.
    """
    if kind not in SCAFFOLDS:
        raise ConfigError(f"there is no kind of plugin {kind!r}; choose {', '.join(SCAFFOLDS)}")
    name = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name: write small letters, digits and hyphens, such as my-plugin")
    scaffold = SCAFFOLDS[kind]
    words = _words(scaffold, name)
    _refuse_taken(scaffold, words["name"])
    directory = into / words["distribution"]
    if directory.exists():
        raise ConfigError(f"{directory} is there already: choose another name, or another place with --into")
    for path, text in _files(kind, words).items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text, encoding="utf-8")
    return directory


def _words(scaffold: Scaffold, name: str) -> dict[str, str]:
    """What stands for the words of the templates."""
    from trtllm_core.plugin import HOOK_VERSIONS
    from trtllm_core.version import __version__

    major, minor = __version__.split(".")[:2]
    version = HOOK_VERSIONS[scaffold.kind]
    module = name.replace("-", "_")
    words = {
        "name": module,
        "distribution": f"{PREFIX}{name}",
        "package": f"trtllm_plugin_{module}",
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "version": version,
        "next_version": str(int(version.split(".")[0]) + 1),
        "entry_point": name,
        "dependencies": f'{scaffold.dependencies}"trtllm-core>={major}.{minor},<{major}.{int(minor) + 1}"',
        "test_dependencies": scaffold.test_dependencies,
        "conform": _CONFORM_FAMILY if scaffold.kind == "model_family" else "",
        "bench": f"\ntrtllm-core bench-plugin {module}    # what it costs a step and a row" if scaffold.bench else "",
    }
    for key in ("summary", "usage", "target"):
        words[key] = Template(getattr(scaffold, key)).substitute(words)
    return words


_CONFORM_FAMILY = """,
                                    # given a small model: --params 'NAME:{"model_type": …, "hidden_size": 64, …}'"""
"""What ``conform`` needs besides: no model can be made of a family alone."""


def _refuse_taken(scaffold: Scaffold, name: str) -> None:
    """A name that something installed has already would be refused when the package is loaded."""
    from trtllm_core.plugin import Plugins

    plugins: Plugins = Plugins.load()
    if scaffold.registry and name in (registry := getattr(plugins, scaffold.registry)):
        what = scaffold.kind.replace("_", " ")
        raise ConfigError(f"there is a {what} {name!r} already, of {registry.get(name).source}: choose another name")


def _files(kind: str, words: dict[str, str]) -> dict[str, str]:
    """The package's files: path within it, and text."""
    source = f"src/{words['package']}"
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "__init__.py": f"{source}/__init__.py",
        "test.py": f"tests/test_{words['name']}.py",
    }
    templates = files("trtllm_core.cli") / _TEMPLATES
    found = {f"{source}/py.typed": ""}
    for template in [*_sorted(templates / "common"), *_sorted(templates / kind)]:
        name = template.name.removesuffix(".in")
        found[places.get(name, f"{source}/{name}")] = Template(template.read_text("utf-8")).substitute(words)
    return found


def _sorted(directory: Traversable) -> list[Traversable]:
    return sorted(directory.iterdir(), key=lambda file: file.name)
