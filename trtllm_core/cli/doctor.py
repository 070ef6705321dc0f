"""``trtllm-core doctor``: what could go wrong here, and what to do about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from trtllm_core.cli.console import size, stdout
from trtllm_core.cli.memory import plan_memory
from trtllm_core.errors import EngineError, TrtllmCoreError
from trtllm_core.plugin import Finding
from trtllm_core.version import __version__

if TYPE_CHECKING:
    import torch

    from trtllm_core.config import EngineConfig
    from trtllm_core.plugin import Plugins

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    engine: Annotated[Path | None, typer.Argument(metavar="ENGINE", help="An engine to check too.")] = None,
) -> None:
    """Check this installation, and an engine without loading it. Status 2 where there is a problem."""
    from trtllm_core.plugin import Plugins

    plugins = Plugins.load()
    checks = [*check_environment(), *check_plugins(plugins)]
    if engine is not None:
        checks += check_engine(engine, plugins)
    for check in checks:
        level = f"[{_COLOURS[check.level]}]{check.level:<8}[/]"
        stdout().print(f"{level} [bold]{escape(check.what)}[/]: {escape(check.found)}", soft_wrap=True)
    if any(check.level == "problem" for check in checks):
        raise typer.Exit(2)


def check_environment() -> Iterator[Finding]:
    """Python, PyTorch, CPU, GPU and memory."""
    yield Finding("ok", "python", f"{sys.version.split()[0]}, trtllm-core {__version__}")
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        yield Finding("problem", "torch", f"cannot be imported ({error}); pip install --force-reinstall torch")
        return
    yield Finding("ok", "torch", torch.__version__)
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" in capability or sys.platform == "darwin":
        yield Finding("ok", "cpu", f"{capability}, {torch.get_num_threads()} threads")
    else:
        yield Finding("warning", "cpu", f"{capability}: slow in half precision; float32 engines prefill faster here")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding(
                "ok", f"cuda:{index}", f"{name}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}"
            )
            yield _check_graphs(torch.device("cuda", index))
    else:
        yield Finding("ok", "cuda", "no GPU; engines run on the CPU")
    memory = memory_available()
    yield Finding("ok", "memory", "unknown" if memory is None else f"{size(memory)} available")


def _check_graphs(device: torch.device) -> Finding:
    from trtllm_core.backends.torch.cuda.support import unsupported

    why = unsupported(device)
    if why is None:
        return Finding("ok", f"graphs on {device}", "decode steps of the torch backend are captured")
    return Finding("warning", f"graphs on {device}", f"decode steps run without CUDA graphs, slowly: {why}")


def check_plugins(plugins: Plugins) -> Iterator[Finding]:
    """Each plugin, and whether each backend can work."""
    for report in plugins.report():
        name, version = f"plugin {report.plugin}", f"{report.distribution} {report.version}"
        if report.status == "failed":
            yield Finding("problem", name, f"{version} failed: {report.why}")
        else:
            yield Finding("ok", name, f"{version}, {report.status}" + (f": {report.why}" if report.why else ""))
    for entry in plugins.backends:
        try:
            found = entry.load()().probe()
        except TrtllmCoreError as error:
            yield Finding("problem", f"backend {entry.name}", str(error))
            continue
        # A backend that cannot work hurts only those who want it: an engine of it is checked by itself.
        level: Literal["ok", "warning"] = "ok" if found.available else "warning"
        yield Finding(level, f"backend {entry.name}", f"{found.version} {found.reason}".strip())
    if not list(plugins.model_families):
        yield Finding("warning", "families", "none is installed; pip install trtllm-plugin-llama, for instance")


def check_engine(directory: Path, plugins: Plugins) -> Iterator[Finding]:
    """What can be known of an engine without loading it."""
    from trtllm_core.engine.directory import TOKENIZER, newer_core, read_config

    try:
        config = read_config(directory)
    except EngineError as error:
        yield Finding("problem", "engine", str(error))
        return
    built = f"built by trtllm-core {config.core_version}"
    if newer_core(config, __version__):
        yield Finding("warning", "engine", f"{built}, newer than this {__version__}; pip install -U trtllm-core")
    else:
        yield Finding("ok", "engine", f"format {config.format_version}, {built} from {config.source}")
    for file in config.ranks:
        yield Finding("ok", file.name, f"{size(file.bytes)}, as config.json says")
    yield from _check_parts(config, plugins)
    if config.backend.name in plugins.backends:
        backend = plugins.backends.get(config.backend.name).load()()
        for file in config.ranks:
            yield from backend.diagnose(directory / file.name, config)
    if (directory / TOKENIZER).is_file():
        yield _check_tokenizer(directory)
    else:
        yield Finding("warning", "tokenizer", "none: the engine takes and gives token ids only")
    yield _check_memory(config)


def _check_parts(config: EngineConfig, plugins: Plugins) -> Iterator[Finding]:
    """The plugins that the engine needs."""
    for kind, provider, registry in (
        ("model_family", config.family, plugins.model_families),
        ("backend", config.backend, plugins.backends),
    ):
        what = kind.removeprefix("model_")
        try:
            entry = registry.get(provider.name, plugins.missing_hint(kind, provider.name, provider.distribution))
        except TrtllmCoreError as error:
            yield Finding("problem", what, str(error))
            continue
        if entry.source.version != provider.version:
            built = f"built with {provider.distribution} {provider.version}, {entry.source} is installed"
            yield Finding("warning", what, f"{built}; build the engine again if results differ")
        else:
            yield Finding("ok", what, f"{provider.name} of {entry.source}")
    if config.backend.name in plugins.backends:
        found = plugins.backends.get(config.backend.name).load()().probe()
        if not found.available:
            yield Finding("problem", "backend", found.reason)


def _check_tokenizer(directory: Path) -> Finding:
    from trtllm_core.checkpoint import Tokenizer

    try:
        tokenizer = Tokenizer.from_dir(directory)
    except TrtllmCoreError as error:
        return Finding("problem", "tokenizer", str(error))
    template = "a chat template" if tokenizer.has_chat_template else "no chat template"
    return Finding("ok", "tokenizer", f"{tokenizer.vocab_size} tokens, {template}")


def _check_memory(config: EngineConfig) -> Finding:
    plan, free = plan_memory(config, [file.total_bytes for file in config.ranks]), memory_available()
    needs = f"{size(plan.total)} needed a rank ({size(plan.weights)} weights, {size(plan.kv_at_limits)} KV)"
    if free is None or plan.total <= free:
        return Finding("ok", "memory for it", needs + ("" if free is None else f", {size(free)} available"))
    cure = "run it with --kv-max-tokens" if plan.weights + plan.logits < free else "split it with --tp-size"
    return Finding("warning", "memory for it", f"{needs}, but {size(free)} available on the host; {cure}, or a GPU")


def memory_available() -> int | None:
    """Bytes of the host's memory that a process can take; None where that cannot be known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
