"""``trtllm-core inspect``: what an engine is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_core.cli.console import print_facts, print_json, print_table, size
from trtllm_core.cli.memory import MemoryPlan, plan_memory
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import EngineConfig
    from trtllm_core.plugin import Inspection, TensorSpec


def inspect(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="What to look into.")],
    rank: Annotated[int, typer.Option(help="Which rank of it.")] = 0,
    every: Annotated[
        bool, typer.Option("--all", help="Each cache, layer and weight, rather than their kinds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: everything.")] = False,
) -> None:
    """What an engine is made of: layers, tensors, profiles, memory and weights. Nothing is run."""
    config, found = inspect_engine(engine, rank)
    needed = plan_memory(config, [file.total_bytes for file in config.ranks])
    if as_json:
        memory = {**needed.as_json(), **found.memory}
        print_json({**asdict(found), "memory": memory, "engine": config.model_dump(mode="json")})
        return
    print_facts(_facts(config, found, needed, rank))
    print_table(("tensor", "", "dtype", "shape", "smallest", "largest"), _tensors(found.tensors, every), "Tensors")
    if found.profiles:
        print_table(("profile", "input", "smallest", "usual", "largest"), _profiles(found, every), "Profiles")
    print_table(("layer", "count"), _layers(found, every), "Layers")
    if found.weights:
        print_table(("weight", "dtype", "shape", "bytes"), _weights(found, every), "Weights")


def inspect_engine(directory: Path, rank: int) -> tuple[EngineConfig, Inspection]:
    """One rank's engine, as its backend tells of it.

    Raises:
        EngineError, PluginError: there is no engine, or nobody here knows it.
        ConfigError: it has no such rank.
    """
    from trtllm_core.engine.directory import read_config
    from trtllm_core.plugin import Plugins

    plugins = Plugins.load()
    config = read_config(directory)
    if not 0 <= rank < len(config.ranks):
        raise ConfigError(f"{directory} has ranks 0 to {len(config.ranks) - 1}; rank {rank} is not one of them")
    parts: list[Any] = []
    for kind, provider, registry in (
        ("backend", config.backend, plugins.backends),
        ("model_family", config.family, plugins.model_families),
    ):
        entry = registry.get(provider.name, plugins.missing_hint(kind, provider.name, provider.distribution))
        parts.append(entry.load()())
    backend, family = parts
    return config, backend.inspect(directory / config.ranks[rank].name, config, family)


def _facts(config: EngineConfig, found: Inspection, needed: MemoryPlan, rank: int) -> list[tuple[str, str]]:
    file, build = config.ranks[rank], config.build
    files = " and ".join(f"{one.name} ({size(one.bytes)})" for one in (file, *file.companions))
    limits = f"{build.max_batch_size} sequences of {build.max_seq_len} tokens, prompts of {build.max_input_len}"
    beams = f", {build.max_beam_width} beams" if build.max_beam_width > 1 else ""
    backend = f"{config.backend.name} ({config.backend.distribution} {config.backend.version})"
    return [
        ("model", f"{config.family.name}, {config.model.num_layers} layers of {config.model.hidden_size}"),
        ("backend", backend),
        ("contract", config.contract),
        ("limits", limits + beams),
        ("files", files),
        ("record", ", ".join(f"{name} {value}" for name, value in config.record.items() if isinstance(value, str))),
        ("weights", f"{size(needed.weights)} {config.model.dtype}"),
        ("KV at limits", f"{size(needed.kv_at_limits)} {config.kv_dtype}"),
        *((name, size(count)) for name, count in found.memory.items()),
        ("told by", found.told_by),
    ]


def _tensors(specs: Sequence[TensorSpec], every: bool) -> list[tuple[str, ...]]:
    """Caches of all layers are one row, unless every one is wanted."""
    rows, seen = [], set()
    for spec in specs:
        stem, _, layer = spec.name.rpartition("_")
        name = f"{stem}_*" if layer.isdigit() and not every else spec.name
        if name not in seen:
            seen.add(name)
            shapes = (spec.shape, spec.minimum, spec.maximum)
            rows.append((name, "in" if spec.is_input else "out", spec.dtype, *map(_shape, shapes)))
    return rows


def _profiles(found: Inspection, every: bool) -> list[tuple[str, ...]]:
    rows = []
    for number, profile in enumerate(found.profiles):
        seen = set()
        for name, bounds in profile.items():
            stem, _, layer = name.rpartition("_")
            shown = f"{stem}_*" if layer.isdigit() and not every else name
            if shown not in seen:
                seen.add(shown)
                rows.append((str(number), shown, *map(_shape, bounds)))
    return rows


def _layers(found: Inspection, every: bool) -> list[tuple[str, ...]]:
    if not every:
        return [(group.kind, str(group.count)) for group in found.layers]
    return [
        (f"{group.kind} {name}".rstrip(), str(count))
        for group in found.layers
        for name, count in ([(name, 1) for name in group.names] or [("", group.count)])
    ]


def _weights(found: Inspection, every: bool) -> list[tuple[str, ...]]:
    if every:
        return [(one.name, one.dtype, _shape(one.shape), size(one.bytes)) for one in found.weights]
    counts, total = Counter(one.dtype for one in found.weights), Counter[str]()
    for one in found.weights:
        total[one.dtype] += one.bytes
    return [(f"{count} tensors", dtype, "", size(total[dtype])) for dtype, count in counts.most_common()]


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else ""
