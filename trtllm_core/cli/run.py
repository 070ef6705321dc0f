"""``trtllm-core run``: prompts in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from trtllm_core.cli.adapters import AdapterOptions
from trtllm_core.cli.console import print_error, print_facts, print_json, print_note, stderr, stdout
from trtllm_core.cli.options import SamplingOptions, takes
from trtllm_core.cli.prompts import encode, read_prompts
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.outputs import GenerationOutput
    from trtllm_core.prompt_table import VirtualTokens
    from trtllm_core.runner import ModelRunner

DEFAULT_NEW_TOKENS = 256
_ENGINE = "Engine"


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is loaded."""

    device: Annotated[
        str | None, typer.Option(help="Such as cuda (default: the backend's own).", rich_help_panel=_ENGINE)
    ] = None
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Same result in any batch, slower.", rich_help_panel=_ENGINE)
    ] = False
    kv_policy: Annotated[str | None, typer.Option(help="Who manages the KV cache.", rich_help_panel=_ENGINE)] = None
    kv_max_tokens: Annotated[
        int | None, typer.Option(help="Room of the KV cache, in tokens.", rich_help_panel=_ENGINE)
    ] = None

    def load(self, engine: Path, extra: Sequence[object] = (), **more: Any) -> ModelRunner:
        """The engine, loaded, with observers. ``more`` are arguments of ``ModelRunner.from_dir``."""
        from trtllm_core.config import KVCacheConfig
        from trtllm_core.engine.directory import read_config
        from trtllm_core.plugin import Plugins
        from trtllm_core.runner import ModelRunner

        ranks = read_config(engine).build.tp_size
        if ranks > 1:
            raise ConfigError(
                f"{engine} has {ranks} ranks, and the command line runs engines of one: start a process for each rank "
                "and load it with ModelRunner.from_dir(engine, rank, parallel=…)"
            )
        kv: dict[str, Any] = {"policy": self.kv_policy, "max_tokens": self.kv_max_tokens}
        cache = KVCacheConfig(**{name: value for name, value in kv.items() if value is not None})
        # Backends know different options: one that was not asked for is not passed.
        options: dict[str, Any] = {"device": self.device, "batch_invariant": self.batch_invariant}
        options = {name: value for name, value in options.items() if value}
        return ModelRunner.from_dir(engine, kv_cache=cache, plugins=Plugins.load(extra=extra), **options, **more)


@dataclass(frozen=True)
class Job:
    """One prompt on its way through the engine."""

    prompt: str
    tokens: list[int]
    sampling: SamplingConfig
    uid: str | None = None
    virtual: VirtualTokens | None = None


@takes(sampling=SamplingOptions, loading=LoadOptions, adapters=AdapterOptions)
def run(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine that `trtllm-core build` made.")],
    sampling: SamplingOptions,
    loading: LoadOptions,
    adapters: AdapterOptions,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]", help="Default: stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help='A prompt a line, or JSON lines with "prompt"; - is stdin.')] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes, prompt after prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print plan, times and rates at the end.")] = False,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template (default: if there is one).")] = None,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
) -> None:
    """Generate from prompts: arguments, a file, or stdin."""
    from trtllm_core.cli.clock import StepClock

    if stream and as_json:
        raise ConfigError("--stream prints text and --json objects: choose one of them")
    clock = StepClock()
    given = sampling.given()
    texts = read_prompts(prompts or [], file)
    uids = adapters.uids(len(texts))
    runner = loading.load(engine, [clock] if stats else [], **adapters.loading())
    jobs = _jobs(runner, texts, given, chat, system, uids, adapters)
    plan = runner.explain(jobs[0].sampling)
    for note in plan.notes:
        print_note(note)
    failed = _stream(runner, jobs) if stream else _batches(runner, jobs, as_json)
    runner.close()
    if stats:
        names = " → ".join(item.name for item in plan.items)
        print_facts([("plan", f"{names} ({plan.digest()[:12]})"), *clock.lines()], stderr())
    if failed:
        raise typer.Exit(2)


def _jobs(
    runner: ModelRunner,
    prompts: Sequence[str],
    given: dict[str, Any],
    chat: bool | None,
    system: str | None,
    uids: Sequence[str | None],
    adapters: AdapterOptions,
) -> list[Job]:
    """All prompts as tokens, each refused now if the engine cannot run it."""
    from trtllm_core.config import SamplingConfig

    tokenizer = runner.tokenizer
    if tokenizer is None:
        raise ConfigError(
            "the engine has no tokenizer: it takes and gives token ids only, through ModelRunner.generate"
        )
    ids = encode(tokenizer, prompts, tokenizer.has_chat_template if chat is None else chat, system)
    jobs = []
    tables = adapters.tables(runner, len(prompts))
    for number, (prompt, text, uid, virtual) in enumerate(zip(prompts, ids, uids, tables, strict=True), 1):
        runner.generation.lora.find(uid)  # an adapter that is not there is refused before the first prompt
        tokens = adapters.prepended(text, virtual)
        room = max(runner.max_sequence_length - len(tokens), 1)
        sampling = SamplingConfig(**{"max_new_tokens": min(DEFAULT_NEW_TOKENS, room), **given})
        runner.check_prompt(tokens, sampling, f"prompt {number}", virtual)
        jobs.append(Job(prompt, tokens, sampling, uid, virtual))
    return jobs


def _batches(runner: ModelRunner, jobs: Sequence[Job], as_json: bool) -> bool:
    """Run as many at once as the engine takes. Returns whether one failed."""
    failed = False
    for job, output in _outputs(runner, jobs):
        failed |= output.error is not None
        if as_json:
            print_json(_record(job, output))
            continue
        if len(jobs) > 1:
            _print_header(job)
        typer.echo(output.text)
        if output.error is not None:
            print_error(f"{job.prompt!r} ended early: {output.error}")
    return failed


def _outputs(runner: ModelRunner, jobs: Sequence[Job]) -> Iterator[tuple[Job, GenerationOutput]]:
    most = runner.max_batch_size
    for batch in (jobs[start : start + most] for start in range(0, len(jobs), most)):
        sampling = [job.sampling for job in batch]
        result = runner.generate(
            [job.tokens for job in batch], sampling, text=True, return_dict=True, **_conditions(batch)
        )
        yield from ((batch[int(output.request_id)], output) for output in result["outputs"])


def _conditions(jobs: Sequence[Job]) -> dict[str, Any]:
    """What ``generate`` is told of adapters and tables."""
    out: dict[str, Any] = {}
    if any(job.uid is not None for job in jobs):
        out["lora_uids"] = [job.uid for job in jobs]
    if any(job.virtual is not None for job in jobs):
        out["prompt_table"] = [None if job.virtual is None else job.virtual.rows.unsqueeze(0) for job in jobs]
    return out


def _stream(runner: ModelRunner, jobs: Sequence[Job]) -> bool:
    """Print each prompt's text as it comes. Returns whether one failed."""
    failed = False
    for job in jobs:
        plan = runner.explain(job.sampling)
        if plan.ranked or plan.branching.returns > 1:
            raise ConfigError(
                "--stream prints one text as it grows; this request has several, or revises it: leave it out"
            )
    for job in jobs:
        if len(jobs) > 1:
            _print_header(job)
        for delta in runner.generate([job.tokens], job.sampling, streaming=True, text=True, **_conditions([job])):
            typer.echo(delta.text, nl=False)
            if delta.error is not None:
                failed = True
                print_error(f"{job.prompt!r} ended early: {delta.error}")
        typer.echo()
    return failed


def _print_header(job: Job) -> None:
    stdout().rule(f"[bold]{escape(' '.join(job.prompt.split()))}[/]", align="left")


def _record(job: Job, output: GenerationOutput) -> dict[str, Any]:
    return {
        "prompt": job.prompt,
        "sequence": output.sequence,
        "text": output.text,
        "tokens": list(output.tokens),
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "matched": output.matched,
        "error": None if output.error is None else str(output.error),
    }
