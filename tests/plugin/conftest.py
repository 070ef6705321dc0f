"""Fake distributions on disk, for the tests of the plugin system."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trtllm_core.plugin import Plugins

DECODER = """
from trtllm_core.plugin import hookimpl
hook_api = "decoder>=1.0,<2"

@hookimpl
def trtllm_register_decoders(registrar):
    registrar.add({name!r}, dict)
"""


class Site:
    """A directory on ``sys.path`` that distributions are installed into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: list[str] = []

    def install(
        self,
        distribution: str,
        source: str,
        *,
        plugin: str | None = None,
        version: str = "0.3.0",
        requires: tuple[str, ...] = (),
        attribute: str = "",
    ) -> str:
        """Install a distribution with one module, its entry point naming the module or an attribute of it.

        Returns the module's name.
        """
        name = distribution.replace("-", "_")
        module = f"{name}_module"
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n")
        target = f"{module}:{attribute}" if attribute else module
        (info / "entry_points.txt").write_text(f"[trtllm_core]\n{plugin or name} = {target}\n")
        self.modules.append(module)
        importlib.invalidate_caches()
        return module

    def decoder(self, distribution: str, name: str, **options: object) -> str:
        """Install a distribution that registers one decoder."""
        return self.install(distribution, DECODER.format(name=name), **options)  # type: ignore[arg-type]

    def entry_points(self) -> list[importlib.metadata.EntryPoint]:
        """Those of this site alone, whatever else is installed on this machine."""
        found = importlib.metadata.distributions(path=[str(self.path)])
        return [point for dist in found for point in dist.entry_points.select(group="trtllm_core")]

    def load(self, **options: object) -> Plugins:
        """``Plugins.load`` with this site's entry points, as if trtllm-core 0.1.0 were installed."""
        return Plugins.load(**{"entry_points": self.entry_points(), "version": "0.1.0", **options})  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty site on ``sys.path``; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Site(tmp_path)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def module() -> Callable[..., types.ModuleType]:
    """Makes a module of source text, to be passed as ``extra``."""

    def make(source: str, name: str = "mine") -> types.ModuleType:
        made = types.ModuleType(name)
        exec(textwrap.dedent(source), made.__dict__)
        return made

    return make
