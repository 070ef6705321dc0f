"""``trtllm-core bench-plugin``: what a processor, criterion or sampler costs a step and a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_core.cli.console import print_json, print_table
from trtllm_core.cli.options import parse_field, parse_sizes, parse_use
from trtllm_core.errors import ConfigError, PluginNotFoundError

if TYPE_CHECKING:
    from trtllm_core.testing.stopwatch import Cost
    from trtllm_core.testing.subject import Kind


def bench_plugin(
    plugin: Annotated[str, typer.Argument(metavar="NAME[:JSON]", help="A registered plugin, and its parameters.")],
    kind: Annotated[str | None, typer.Option(help="logits_processor, stopping_criterion or decoder.")] = None,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.", min=257)] = 128000,
    batch: Annotated[str, typer.Option(help="Rows of a step.")] = "1,64",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    set_field: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=JSON", help="A field of SamplingConfig.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Microseconds of a row: status 1 where a method takes more.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a plugin costs: each method's time for a step and a row, on a synthetic vocabulary."""
    import torch

    from trtllm_core.testing.lives import Setting
    from trtllm_core.testing.stopwatch import Workbench
    from trtllm_core.testing.subject import resolve
    from trtllm_core.testing.vocabulary import synthetic_tokenizer

    torch.set_num_threads(threads)
    use, sizes = parse_use(plugin), parse_sizes(batch, "--batch")
    subject = resolve(_kind(use.name, kind), use.name, None)
    tokenizer = synthetic_tokenizer(vocab)
    fields = dict(parse_field(text) for text in set_field or ())
    case = subject.case(use.params, fields, tokenizer.eos_ids)
    room = prompt_len + steps + 16
    costs: list[Cost] = []
    for size in sizes:
        setting = Setting(subject, vocab, tokenizer, device, size, room)
        costs += Workbench(setting, case, prompt_len).run(steps)
    over = [cost for cost in costs if budget is not None and cost.method != "begin" and cost.per_row * 1e6 > budget]
    _print(f"{subject.name} of {subject.entry.source}", costs, vocab, threads, device, as_json)
    if over:
        raise typer.Exit(1)


def _kind(name: str, wanted: str | None) -> Kind:
    """The kind of plugin that ``name`` is.

    Raises:
        ConfigError: there is no such kind, or several have a plugin of that name.
        PluginNotFoundError: none has.
    """
    from trtllm_core.plugin import Plugins
    from trtllm_core.testing.subject import KINDS

    if wanted is not None and wanted not in KINDS:
        raise ConfigError(f"--kind {wanted}: choose {', '.join(KINDS)}")
    plugins = Plugins.load()
    found = [each for each in KINDS.values() if name in getattr(plugins, each.registry) and wanted in (None, each.name)]
    if not found:
        near = [hint for each in KINDS.values() for hint in [_suggestion(plugins, each, name)] if hint]
        what = wanted or "logits processor, stopping criterion or decoder"
        raise PluginNotFoundError(f"no {what} {name!r} is registered{''.join(near)}")
    if len(found) > 1:
        raise ConfigError(f"{name!r} is registered as {' and as '.join(each.name for each in found)}: choose by --kind")
    return found[0]


def _suggestion(plugins: Any, kind: Kind, name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, [entry.name for entry in getattr(plugins, kind.registry)], n=1)
    return f"; did you mean the {kind.name.replace('_', ' ')} {close[0]!r}?" if close else ""


def _print(what: str, costs: list[Cost], vocab: int, threads: int, device: str, as_json: bool) -> None:
    if as_json:
        about = {"plugin": what, "vocab": vocab, "threads": threads, "device": device}
        print_json({**about, "costs": [cost.record() for cost in costs]})
        return
    rows = [
        (str(cost.rows), cost.method, f"{cost.mean * 1e6:.1f}", f"{cost.per_row * 1e6:.1f}", f"{cost.p95 * 1e6:.1f}")
        for cost in costs
    ]
    title = f"{what}: {vocab} tokens on {device}, {threads} thread{'s' if threads > 1 else ''}"
    print_table(("rows", "method", "µs a step", "µs a row", "p95 of a step"), rows, title)
