"""``trtllm-core explain``: what a request would use, in which order, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_core.cli.console import print_facts, print_json, print_table, stdout
from trtllm_core.cli.options import SamplingOptions, takes

if TYPE_CHECKING:
    from trtllm_core.config import EngineConfig, SamplingConfig
    from trtllm_core.decoding.plan import Plan, PlanItem
    from trtllm_core.plugin import Plugins


@takes(sampling=SamplingOptions)
def explain(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine that `trtllm-core build` made.")],
    sampling: SamplingOptions,
    kv_policy: Annotated[str | None, typer.Option(help="Who would manage the KV cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a request's pipeline: order, providers, who honours each field, what was left out. Loads no weights."""
    from trtllm_core.decoding.planner import Planner, offers
    from trtllm_core.engine.directory import TOKENIZER, read_config
    from trtllm_core.plugin import Plugins

    config, plugins, request = read_config(engine), Plugins.load(), sampling.config()
    name = config.backend.name
    backend = plugins.backends.get(name, plugins.missing_hint("backend", name)).load()()
    given = {what: what in backend.gives for what in ("multi_position", "hidden_states")}
    offered = offers((engine / TOKENIZER).is_file(), **given)
    plan = Planner(plugins, offered, config.build).plan(request)
    facts = engine_facts(config, plugins, kv_policy)
    if as_json:
        print_json({"engine": facts, **plan_record(plan, request)})
        return
    print_facts([(name.replace("_", " "), str(value)) for name, value in facts.items()])
    headers = ("order", "plugin", "kind", "runs on", "capabilities", "from", "fields")
    rows = [_cells(number, _record(item, request)) for number, item in enumerate(plan.items, 1)]
    stdout().print()
    print_table(headers, rows)
    _print_fields(plan, request)


def engine_facts(config: EngineConfig, plugins: Plugins, kv_policy: str | None) -> dict[str, Any]:
    """What an engine is, and who provides its parts.

    Raises:
        PluginNotFoundError: there is no such KV policy.
    """
    from trtllm_core.kv_cache.making import policy_name

    build = config.build
    name = policy_name(kv_policy, config)
    policy = plugins.kv_policies.get(name, plugins.missing_hint("kv_policy", name))
    block = build.max_seq_len if config.contract == "padded_linear" else build.tokens_per_block
    family, backend = config.family, config.backend
    return {
        "family": f"{family.name} ({family.distribution} {family.version})",
        "backend": f"{backend.name} ({backend.distribution} {backend.version}), {config.contract}",
        "built_by": f"trtllm-core {config.core_version} from {config.source}",
        "dtype": config.model.dtype,
        "kv_dtype": config.kv_dtype,
        "limits": f"{build.max_batch_size} sequences of {build.max_seq_len} tokens, prompts of {build.max_input_len}, "
        f"{build.max_beam_width} beam{'s' if build.max_beam_width > 1 else ''}, "
        f"{build.max_num_tokens} tokens a step",
        "ranks": build.tp_size,
        "kv_policy": f"{policy.name} ({policy.source}), blocks of {block} tokens",
    } | _on_machines(config)


def _on_machines(config: EngineConfig) -> dict[str, str]:
    """How the torch backend decodes on a GPU, and on a CPU."""
    if config.backend.name != "torch":
        return {}
    facts = {"on_cuda": "decode steps are captured graphs, but those with adapters, prompt tables, drafts or a window"}
    if config.build.tp_size > 1:
        facts["on_cuda"] = "decode steps run without captured graphs: the engine has several ranks"
    if config.quantization is not None and config.quantization.weights != "fp8":
        facts["on_cpu"] = (
            "up to 64 rows meet weights with activations rounded to int8, where the CPU multiplies bytes; "
            "not with int8_activations=False, or batch_invariant"
        )
    return facts


def plan_record(plan: Plan, request: SamplingConfig) -> dict[str, Any]:
    """A plan for ``--json``."""
    from trtllm_core.decoding.ahead import needs_host, needs_python

    return {
        "hash": plan.digest(),
        "branches": asdict(plan.branching),
        "companions": {one.name: len(one.prompts) for one in plan.companions},
        "positions": plan.positions,
        "preset": request.preset,
        "phases": _phases(request),
        "pipeline": [_record(item, request) for item in plan.items],
        "asked": dict(sorted(plan.asked.items())),
        "consumers": {name: list(names) for name, names in sorted(plan.consumers.items())},
        "notes": list(plan.notes),
        "needs_host": needs_host(plan),
        "needs_python": needs_python(plan),
    }


def _phases(request: SamplingConfig) -> list[str]:
    """The order of the request's preset."""
    from trtllm_core.decoding.order import PRESETS

    return [phase.value for phase in PRESETS[request.preset].phases]


def _record(item: PlanItem, request: SamplingConfig) -> dict[str, Any]:
    from trtllm_core.plugin import Decoder, HostLogitsProcessor, HostStoppingCriterion, LogitsProcessor, Sampler

    plugin = item.plugin
    kinds = {LogitsProcessor: "logits processor", Sampler: "sampler", Decoder: "decoder"}
    kind = next((name for base, name in kinds.items() if isinstance(plugin, base)), "stopping criterion")
    capabilities = asdict(plugin.capabilities)  # type: ignore[attr-defined]
    return {
        "name": item.name,
        "kind": kind,
        "phase": plugin.phase.value if isinstance(plugin, LogitsProcessor) else None,
        "before": list(getattr(plugin, "before", ())),
        "after": list(getattr(plugin, "after", ())),
        "runs_on": "host" if isinstance(plugin, (HostLogitsProcessor, HostStoppingCriterion)) else "device",
        "capabilities": {k: sorted(v) if isinstance(v, frozenset) else v for k, v in capabilities.items()},
        "source": item.source,
        "consumes": request.model_dump(mode="json", include=set(item.consumes)),
        "params": None if item.params is None else repr(item.params),
    }


def _cells(number: int, record: dict[str, Any]) -> tuple[str, ...]:
    name = record["name"] + (f"\n{record['params']}" if record["params"] else "")
    kind = record["kind"] + (f", {record['phase']}" if record["phase"] else "")
    can = ", ".join(_capability(*pair) for pair in record["capabilities"].items() if pair[1])
    fields = ", ".join(f"{field}={value}" for field, value in record["consumes"].items())
    return (str(number), name, kind, record["runs_on"], can, record["source"], fields)


def _capability(name: str, value: Any) -> str:
    if value is True:
        return name
    return f"{name} {', '.join(value)}" if isinstance(value, list) else f"{name}={value}"


def _print_fields(plan: Plan, request: SamplingConfig) -> None:
    """Who honours what was set, what was left out, and the hash of it all."""
    there = {item.name for item in plan.items} | {"core"}
    lines = [(f"order of preset {request.preset}", " → ".join(_phases(request)))]
    lines += [
        (
            f"{name} = {getattr(request, name)!r}",
            "honoured by " + ", ".join(who if who in there else f"{who} (left out)" for who in plan.consumers[name]),
        )
        for name in sorted(request.asked())
        if name in plan.consumers
    ]
    branching = plan.branching
    if branching.max_branches > 1:
        lines.append(
            (
                "branches",
                f"starts with {branching.branches}, has up to {branching.max_branches}, returns {branching.returns}",
            )
        )
    lines += [
        ("companions", f"{one.name}: {len(one.prompts)} beside each branch, a slot each, with the same tokens")
        for one in plan.companions
    ]
    if plan.positions > 1:
        lines.append(("drafts", f"up to {plan.positions} positions of a branch are verified in a step"))
    lines.append(("steps on a GPU", _steps(plan)))
    lines += [("note", note) for note in plan.notes]
    print_facts([*lines, ("plan hash", plan.digest())])


def _steps(plan: Plan) -> str:
    """How the steps of a request follow each other, as far as its plan decides."""
    from trtllm_core.decoding.ahead import needs_host, needs_python

    if host := needs_host(plan):
        return f"each waits for the tokens of the one before: {host}"
    if python := needs_python(plan):
        return f"launched ahead; what follows the engine runs without a graph: {python}"
    return "launched ahead; what follows the engine is a captured graph"
