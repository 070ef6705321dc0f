"""``trtllm-core plan``: how much memory an engine takes, before there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_core.cli.console import print_facts, print_json, size
from trtllm_core.cli.memory import MemoryPlan, parse_size, plan_memory, weight_bytes
from trtllm_core.cli.options import BuildOptions, takes
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import EngineConfig


@takes(options=BuildOptions)
def plan(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_ENGINE", help="What to plan for.")],
    options: BuildOptions,
    memory: Annotated[str | None, typer.Option(help="See how many sequences fit in it, such as 24GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory before anything is loaded: weights, KV cache, logits, and what fits."""
    room = None if memory is None else parse_size(memory)
    config, needed = plan_engine_directory(source, options) if is_engine(source) else plan_checkpoint(source, options)
    if as_json:
        print_json(needed.as_json(room))
        return
    print_facts(facts(config, needed, room))


def is_engine(path: Path) -> bool:
    """Whether a directory holds an engine, as far as its config.json tells."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "format_version" in config


def plan_engine_directory(directory: Path, options: BuildOptions) -> tuple[EngineConfig, MemoryPlan]:
    """The plan of an engine that is built.

    Raises:
        ConfigError: build options, which come too late.
    """
    from trtllm_core.engine.directory import read_config

    if given := options.given():
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{directory} is built already: {names} can be planned for a checkpoint only")
    config = read_config(directory)
    return config, plan_memory(config, [file.total_bytes for file in config.ranks])


def plan_checkpoint(path: Path, options: BuildOptions) -> tuple[EngineConfig, MemoryPlan]:
    """The plan of an engine that could be built, from the checkpoint's headers."""
    from trtllm_core.checkpoint import open_checkpoint
    from trtllm_core.engine.build import plan_engine
    from trtllm_core.engine.shards import check_weight_map
    from trtllm_core.plugin import Plugins

    checkpoint = open_checkpoint(path)
    config, family, _ = plan_engine(checkpoint, options.config(), Plugins.load())
    check_weight_map(family, config.model, checkpoint)
    return config, plan_memory(config, weight_bytes(config, family))


def facts(config: EngineConfig, needed: MemoryPlan, memory: int | None = None) -> list[tuple[str, str]]:
    """The plan for people."""
    build, ranks = config.build, config.build.tp_size
    lines = [
        ("weights", f"{size(needed.weights)} {config.model.dtype}"),
        ("KV per token", f"{size(needed.kv_per_token)} {config.kv_dtype}"),
        ("KV per sequence", f"{size(needed.kv_per_sequence)} ({build.max_seq_len} tokens)"),
        ("KV at limits", f"{size(needed.kv_at_limits)} ({build.max_branches} sequences)"),
        ("logits", size(needed.logits)),
        *([("LoRA adapters", f"{size(needed.lora)} at most")] if needed.lora else []),
        ("in all", f"{size(needed.total)}, and activations"),
    ]
    if ranks > 1:
        lines.insert(0, ("each of", f"{ranks} ranks; {size(needed.weights_all_ranks)} of weights together"))
    if memory is not None:
        count = needed.sequences_in(memory)
        lines.append((f"in {size(memory)}", f"{count} sequences of {build.max_seq_len} tokens fit beside the weights"))
    return lines
