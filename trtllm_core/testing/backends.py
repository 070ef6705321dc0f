"""``BackendConformance``: what every backend must do: say whether it works here, and execute what it built."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.config.model import DType
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.plugin import (
    Availability,
    Backend,
    BackendRegistrar,
    Inspection,
    Plugins,
    Registry,
    Source,
    hookimpl,
)
from trtllm_core.runner import ModelRunner
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.kit import Conformance, passed_over, require

CONTRACTS = ("packed_paged", "padded_linear")
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12], [1, 2, 3])


class BackendConformance(Conformance):
    """Subclass it and set ``plugin``: a module that registers a backend, the class of one, or a registered name."""

    dtype: ClassVar[DType] = "float32"
    """Of the engine that is tried."""

    def installed(self) -> tuple[Plugins, str]:
        """The plugins with the backend among them, and the name that it has there."""
        given = self.given()
        if isinstance(given, str):
            return Plugins.load(), given
        if isinstance(given, type):
            return Plugins.load(extra=[_local(given)]), self.name or given.__name__
        registry: Registry[Backend] = Registry("backend")
        given.trtllm_register_backends(BackendRegistrar(registry, Source("kit", "kit", "0")))
        return Plugins.load(extra=[given]), self.name or next(iter(registry)).name

    def backend(self) -> Backend:
        """A new one."""
        plugins, name = self.installed()
        return plugins.backends.get(name).load()()

    def _able(self) -> tuple[Plugins, str]:
        """As ``installed``, where it can build a LLaMA model; else the check is passed over."""
        plugins, name = self.installed()
        probe = self.backend().probe()
        if not probe.available:
            passed_over(f"it cannot work here: {probe.reason}")
        if "llama" not in plugins.model_families:
            passed_over("it is tried on a LLaMA model: pip install trtllm-plugin-llama")
        return plugins, name

    def test_declarations(self) -> None:
        """It is a ``Backend`` with a name and a tensor contract that the loop knows."""
        backend = self.backend()
        require(isinstance(backend, Backend), f"it is a {type(backend).__name__}, no Backend")
        require(backend.contract in CONTRACTS, f"its contract is {backend.contract!r}; known are {CONTRACTS}")
        require(isinstance(backend.name, str) and backend.name, f"its name is {backend.name!r}")

    def test_probe(self) -> None:
        """``probe`` never raises, and says why."""
        found = self.backend().probe()
        require(isinstance(found, Availability), f"probe returned a {type(found).__name__}, no Availability")
        require(found.reason, "probe does not say what was found, or what is missing and how to install it")

    def test_generation(self) -> None:
        """It builds a small LLaMA model, loads it, and generates what the torch backend generates from it."""
        plugins, name = self._able()
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = write_llama(Path(directory) / "checkpoint")
            due = _tokens(plugins, checkpoint, Path(directory) / "torch", "torch", self.dtype)
            try:
                found = _tokens(plugins, checkpoint, Path(directory) / "other", name, self.dtype)
            except EngineUnsupportedError as error:
                passed_over(f"it builds, but cannot run here: {error}")
        require(found == due, f"a greedy request gets the tokens {found}, and from the torch backend {due}")

    def test_inspection(self) -> None:
        """It tells what an engine of its is made of, and has nothing against one that it has just built."""
        plugins, name = self._able()
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "engine"
            limits = BuildConfig(backend=name, dtype=self.dtype, max_batch_size=2, max_input_len=8, max_seq_len=16)
            config = build_engine(write_llama(Path(place) / "checkpoint"), directory, limits, plugins=plugins)
            path = directory / config.ranks[0].name
            family = plugins.model_families.get(config.family.name).load()()
            found = self.backend().inspect(path, config, family)
            require(isinstance(found, Inspection), f"inspect returned a {type(found).__name__}, no Inspection")
            require(found.told_by, "inspect does not say who tells it")
            problems = [one.found for one in self.backend().diagnose(path, config) if one.level == "problem"]
            if problems:
                try:
                    Session.from_directory(directory, plugins=plugins)
                except EngineUnsupportedError:
                    passed_over(f"it builds, but cannot run here, and says so: {'; '.join(problems)}")
            require(not problems, f"diagnose has something against a new engine: {'; '.join(problems)}")


def _tokens(plugins: Plugins, checkpoint: Path, directory: Path, backend: str, dtype: DType) -> list[Any]:
    limits = BuildConfig(backend=backend, dtype=dtype, max_batch_size=4, max_input_len=24, max_seq_len=40)
    build_engine(checkpoint, directory, limits, plugins=plugins)
    with ModelRunner.from_dir(directory, plugins=plugins) as runner:
        able = runner.session.engine.capabilities
        given = {what for what in ("multi_position", "hidden_states") if getattr(able, what)}
        said = plugins.backends.get(backend).load()().gives
        require(given == said, f"its engines give {sorted(given)}, and it says that they give {sorted(said)}")
        sampling = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)
        outputs = runner.generate([list(prompt) for prompt in PROMPTS], sampling)["outputs"]
    return [output.tokens for output in outputs]


def _local(backend: type) -> object:
    class Local:
        hook_api = "backend>=1.0,<2"

        @hookimpl
        def trtllm_register_backends(self, registrar: BackendRegistrar) -> None:
            registrar.add(backend.__name__, backend)

    return Local()
