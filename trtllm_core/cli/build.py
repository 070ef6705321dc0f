"""``trtllm-core build``: from a checkpoint to an engine, unless that engine is there already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trtllm_core.cli.console import print_facts, print_note, size, stderr
from trtllm_core.cli.memory import plan_memory, weight_bytes
from trtllm_core.cli.options import BuildOptions, takes
from trtllm_core.cli.plan import facts, is_engine
from trtllm_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from trtllm_core.checkpoint import Checkpoint
    from trtllm_core.config import EngineConfig
    from trtllm_core.plugin import ModelFamily


@takes(options=BuildOptions)
def build(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face directory, or GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="ENGINE", help="Where the engine goes.")],
    options: BuildOptions,
    force: Annotated[bool, typer.Option("--force", help="Build even if the engine is there already.")] = False,
    quant_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Print what --quant costs on this text.", dir_okay=False)
    ] = None,
) -> None:
    """Build an engine from a checkpoint. Does nothing where the same engine is there already."""
    from trtllm_core.checkpoint import open_checkpoint
    from trtllm_core.engine.build import build_engine, plan_engine
    from trtllm_core.engine.shards import check_weight_map
    from trtllm_core.plugin import Plugins

    started = time.perf_counter()
    plugins, source = Plugins.load(), open_checkpoint(checkpoint)
    config, family, _ = plan_engine(source, options.config(), plugins)
    _check_place(output, source)
    text = None if quant_text is None else _read_text(quant_text, config)
    if is_engine(output) and not force:
        reason = why_another(output, config)
        if reason is None:
            typer.echo(f"{output}: up to date ({_shown(config)}); --force builds it again")
            if text is not None:
                _print_cost(text, config, family, source, output)
            return
        print_note(f"{output} is built again: {reason}")
    check_weight_map(family, config.model, source)
    print_facts(facts(config, plan_memory(config, weight_bytes(config, family))))
    with _Bar() as bar:
        built = build_engine(source, output, options.config(), plugins=plugins, progress=bar.report)
    total = sum(file.total_bytes for file in built.ranks)
    typer.echo(f"{output}: {_shown(built)}, {size(total)}, {time.perf_counter() - started:.1f} s")
    if text is not None:
        _print_cost(text, built, family, source, output)


def _read_text(path: Path, config: EngineConfig) -> str:
    if config.quantization is None:
        raise ConfigError("--quant-text measures what --quant costs: name a quantisation too")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--quant-text {path} cannot be read as text: {error}") from error


def _print_cost(text: str, config: EngineConfig, family: ModelFamily, source: Checkpoint, output: Path) -> None:
    from trtllm_core.backends.torch.cost import quantization_cost
    from trtllm_core.checkpoint.tokenizer import Tokenizer
    from trtllm_core.engine.directory import TOKENIZER

    if not (output / TOKENIZER).is_file():
        raise ConfigError(f"{source.path} brings no tokenizer, so --quant-text has no tokens to run")
    cost = quantization_cost(config, family, source, Tokenizer.from_dir(output).encode(text))
    rounded = cost.rounded_perplexity
    more = "" if rounded is None else f"; perplexity {rounded:.3f} with activations in fp8 too"
    if cost.int8_error is not None:
        more += (
            f"; perplexity {cost.int8_perplexity:.3f} with activations in int8 too, as this CPU decodes few rows: "
            f"that alone moves logits by {cost.int8_error:.3f}"
        )
    typer.echo(
        f"quantised weights, over {cost.tokens} tokens of the text: perplexity {cost.perplexity:.3f} "
        f"({cost.plain_perplexity:.3f} without), logits off by {cost.error:.3f} (they spread by {cost.spread:.3f})"
        + more
    )


def why_another(directory: Path, wanted: EngineConfig) -> str | None:
    """Why the engine in ``directory`` is not the wanted one; None if it is.

    Compared is all of ``config.json`` but what follows from it and the rank files, whose sizes are checked: versions,
    plugins, model, options and the digest of the checkpoint.
    """
    from trtllm_core.engine.directory import read_config

    try:
        found = read_config(directory)
    except EngineError as error:
        return str(error)
    old, new = _flat(found), _flat(wanted)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed == ["source_digest"]:
        return f"the files of {wanted.source} are others"
    changes = [f"{name} {old.get(name)} → {new.get(name)}" for name in changed if name != "source_digest"]
    return "; ".join(changes) or None


def _flat(config: EngineConfig) -> dict[str, Any]:
    """The fields of a config in one level: ``build.max_batch_size``."""
    values = config.model_dump(mode="json", exclude={"ranks", "record", "quantization"})
    out: dict[str, Any] = {}
    for name, value in values.items():
        nested = value if isinstance(value, dict) else None
        out |= {name: value} if nested is None else {f"{name}.{key}": item for key, item in nested.items()}
    return out


def _check_place(output: Path, checkpoint: Checkpoint) -> None:
    """Building replaces the whole directory: nothing but an engine may be lost by it."""
    if checkpoint.path.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"{output} holds the checkpoint, which building there would remove: choose another directory")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not is_engine(output)):
        raise ConfigError(f"{output} is there and is no engine: remove it, or choose another path")


def _shown(config: EngineConfig) -> str:
    quantization = config.build.quantization
    codes = "" if quantization is None else f" {quantization.weights}"
    kv = "" if config.kv_dtype == config.model.dtype else f", {config.kv_dtype} KV cache,"
    return f"{config.family.name} {config.model.dtype}{codes}{kv} for {config.backend.name}"


class _Bar:
    """A progress bar with one line for each rank."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=stderr())
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        """See ``trtllm_core.engine.build.Progress``."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)
