"""From a checkpoint to an engine directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_core.checkpoint import Checkpoint, open_checkpoint
from trtllm_core.config import BuildConfig, EngineConfig, ModelConfig, Provider, RankFile
from trtllm_core.engine.directory import holds_engine, write_config
from trtllm_core.engine.lora import lora_layers
from trtllm_core.engine.quantization import quantization_of
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.errors import ConfigError, listing
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Backend, BuiltRank, ModelFamily, Plugins, Weight
from trtllm_core.plugin.backend import Progress
from trtllm_core.plugin.registrar import Source
from trtllm_core.version import __version__


def family_of(checkpoint: Checkpoint, plugins: Plugins) -> tuple[ModelFamily, Source]:
    """The installed family that claims a checkpoint's architecture.

    Raises:
        PluginNotFoundError: none does; the message says what to install.
    """
    name = checkpoint.architecture if checkpoint.format == "hf" else f"gguf:{checkpoint.architecture}"
    entry = plugins.model_families.get(name, plugins.missing_hint("model_family", name))
    return entry.load()(), entry.source


def plan_engine(
    checkpoint: Checkpoint, build: BuildConfig, plugins: Plugins
) -> tuple[EngineConfig, ModelFamily, Backend]:
    """All that can be known and refused before weights are read: the engine's config, its family and backend.

    Raises:
        ConfigError: limits that the model cannot serve, or adapters that the model has no layers for.
    """
    family, source = family_of(checkpoint, plugins)
    model = family.config(checkpoint)
    model = model.replace(dtype=build.dtype or model.dtype)
    build = resolve_limits(build, model)
    entry = plugins.backends.get(build.backend, plugins.missing_hint("backend", build.backend))
    backend = entry.load()()
    _check_backend(build, backend)
    layers = lora_layers(family, model, build, checkpoint) if build.max_lora_rank else {}
    config = EngineConfig(
        core_version=__version__,
        family=Provider(name=family.name, distribution=source.distribution, version=source.version),
        backend=Provider(name=backend.name, distribution=entry.source.distribution, version=entry.source.version),
        contract=backend.contract,
        model=model,
        build=build,
        lora_layers=layers,
        quantization=quantization_of(family, model, build, checkpoint, backend),
        source=checkpoint.path.name,
        source_digest=checkpoint.digest(),
    )
    return config, family, backend


def _check_backend(build: BuildConfig, backend: Backend) -> None:
    wishes = {"max_lora_rank": "lora", "max_prompt_embedding_table_size": "prompt_tables"}
    vain = [field for field, name in wishes.items() if getattr(build, field) and name not in backend.takes]
    if vain:
        raise ConfigError(f"engines of backend {backend.name!r} cannot have {listing(vain)}: leave it at 0")


def build_engine(
    checkpoint: Checkpoint | Path | str,
    directory: Path | str,
    build: BuildConfig | None = None,
    *,
    plugins: Plugins | None = None,
    progress: Progress = lambda what, done, total: None,
) -> EngineConfig:
    """Build an engine. The directory appears when all of it is written, and only then.

    Args:
        checkpoint: a Hugging Face directory, a GGUF file, or an opened checkpoint.
        directory: where the engine goes. An engine that is there already is replaced; anything else is refused.
        build: limits and choices.
        plugins: where family and backend are looked up; None loads what is installed.
        progress: called after each parameter.

    Raises:
        ConfigError: limits that the model or the backend cannot serve, or a directory that holds something else.
        CheckpointError: the checkpoint cannot be read, or its tensors are not those that the family needs.
        PluginNotFoundError: the family or backend is not installed; the message names the pip command.
    """
    plugins = plugins or Plugins.load()
    build = build or BuildConfig()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    directory = Path(directory).resolve()
    _check_place(directory)
    config, family, backend = plan_engine(checkpoint, build, plugins)
    weights = check_weight_map(family, config.model, checkpoint)
    tokenizer = checkpoint.tokenizer()  # a tokenizer that cannot be read is refused before the long part
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        files, record = [], dict[str, Any]()
        for rank in range(config.build.tp_size):
            parallel = TensorParallel(rank, config.build.tp_size)
            parts = rank_weights(weights, config.model, checkpoint, parallel, config.quantization)
            counted = _counted(parts, f"rank {rank}", _tensors(weights, config), progress)
            built = backend.build(config, family, counted, scratch, rank, progress)
            files.append(_rank_file(built))
            record |= built.record
        if tokenizer is not None:
            tokenizer.write(scratch)
        config = config.replace(ranks=tuple(files), record=record)
        write_config(scratch, config)
        scratch.chmod(0o755)
        _put(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return config


def _tensors(weights: Sequence[Weight], config: EngineConfig) -> int:
    """How many tensors a rank's weights are."""
    layers = {} if config.quantization is None else config.quantization.layers
    return len(weights) + sum(1 + (layer.form != "symmetric") for layer in layers.values())


def _rank_file(built: BuiltRank) -> RankFile:
    companions = tuple(RankFile(name=path.name, bytes=path.stat().st_size) for path in built.companions)
    return RankFile(name=built.path.name, bytes=built.path.stat().st_size, companions=companions)


def _check_place(directory: Path) -> None:
    """What is replaced is deleted, so it must be an engine: not a checkpoint, and not somebody's home."""
    if directory.is_dir() and (holds_engine(directory) or not any(directory.iterdir())):
        return
    if directory.exists():
        raise ConfigError(f"{directory} is there already and is no engine: remove it, or name another place")


def _put(scratch: Path, directory: Path) -> None:
    """Move the engine to its place. The one before it is deleted last, so that a failure leaves one of them whole."""
    old = scratch.with_name(f"{scratch.name}-old")
    if directory.exists():
        directory.rename(old)
    try:
        scratch.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def resolve_limits(build: BuildConfig, model: ModelConfig) -> BuildConfig:
    """The build's limits for this model: a default that the model cannot serve is lowered, a wish is refused.

    Raises:
        ConfigError: max_seq_len was asked for beyond the positions that the model was made for.
    """
    most, asked = model.max_position_embeddings, build.model_fields_set
    if build.max_seq_len > most:
        if "max_seq_len" in asked:
            raise ConfigError(
                f"max_seq_len ({build.max_seq_len}) is beyond the {most} positions that the model was made for"
            )
        build = BuildConfig(
            **{**_asked(build), "max_seq_len": most, "max_input_len": min(build.max_input_len, most - 1)}
        )
    return build


def _asked(build: BuildConfig) -> dict[str, Any]:
    return {name: getattr(build, name) for name in build.model_fields_set}


def _counted(
    parts: Iterable[tuple[str, torch.Tensor]], what: str, total: int, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, part in enumerate(parts, 1):
        yield part
        progress(what, done, total)
