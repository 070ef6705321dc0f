"""The options of ``trtllm-core bench``, in groups."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trtllm_core.cli.bench.trace import Trace, make_trace, parse_range, read_trace
from trtllm_core.cli.bench.workloads import Lengths
from trtllm_core.cli.options import parse_option, parse_sizes
from trtllm_core.errors import ConfigError

Mode = Literal["latency", "prefill", "throughput", "scale"]
MODES: tuple[Mode, ...] = ("latency", "prefill", "throughput", "scale")
TAKES = {
    "latency": {"--batch", "--prompt-len", "--new-tokens", "--prefill-len", "--peer", "--checkpoint", "--plot"},
    "prefill": {"--batch", "--prefill-len", "--peer", "--checkpoint", "--plot"},
    "throughput": {"--requests", "--prompts", "--outputs", "--rate", "--trace", "--slots", "--peer", "--checkpoint"},
    "scale": {"--batch", "--queue"},
}
"""By mode, the options that it honours beside those that all of them do."""
_SCALE = (1, 4, 16, 64, 256, 1024)


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True)
class SubjectOptions:
    """What is measured."""

    shape: Annotated[
        str | None, _option("Instead of ENGINE: random weights of a model such as llama-3-8b.", "What")
    ] = None
    dtype: Annotated[str | None, _option("Of random weights (default: the model's own).", "What")] = None
    quant: Annotated[str | None, _option("Of random weights: int4, int8 or fp8 (default: the dtype).", "What")] = None
    kv_dtype: Annotated[str | None, _option("Of random weights' KV cache: fp8 or int8.", "What")] = None
    option: Annotated[
        list[str] | None,
        _option("Of the backend, such as cuda_graphs=false: NAME=VALUE. May be repeated.", "What"),
    ] = None
    peer: Annotated[str | None, _option("Compare with it: transformers, llama.cpp.", "What")] = None
    checkpoint: Annotated[Path | None, _option("The peer's weights (default: beside the engine).", "What")] = None

    def random(self) -> dict[str, Any]:
        """Of random weights, what ``BuildConfig`` says of them."""
        quant = None if self.quant is None else {"weights": self.quant}
        values = {"dtype": self.dtype, "quantization": quant, "kv_dtype": self.kv_dtype}
        return {name: value for name, value in values.items() if value is not None}

    def backend(self) -> dict[str, Any]:
        """How the backend loads it.

        Raises:
            ConfigError: an option that is not written as NAME=VALUE.
        """
        return dict(map(parse_option, self.option or ()))

    def given(self) -> list[str]:
        """Names of the options of the peer that were set. All modes take the others."""
        return [name for name, value in (("--peer", self.peer), ("--checkpoint", self.checkpoint)) if value is not None]


@dataclass(frozen=True)
class WorkOptions:
    """Which work."""

    batch: Annotated[str | None, _option("Batch sizes, such as 1,8,64 (default: 1,8; prefill: 1).", "Work")] = None
    prompt_len: Annotated[str | None, _option("Prompts when decoding, such as 128,512 (default: 128).", "Work")] = None
    new_tokens: Annotated[str | None, _option("Tokens to decode, such as 64,256 (default: 64).", "Work")] = None
    prefill_len: Annotated[str | None, _option("Prompts when reading (default: 512).", "Work")] = None
    queue: Annotated[str | None, _option("Of --mode scale: requests that wait (default: 10,1000,100000).", "Work")] = (
        None
    )

    def given(self) -> list[str]:
        """Names of the options that were set."""
        return ["--" + name.replace("_", "-") for name, value in asdict(self).items() if value is not None]

    def scale(self, most: int | None) -> tuple[list[int], list[int]]:
        """Of ``--mode scale``: batch sizes, by default powers of 4 up to ``most``, and lengths of the queue."""
        batches = None if self.batch is None else parse_sizes(self.batch, "--batch")
        queues = parse_sizes(self.queue or "10,1000,100000", "--queue")
        return batches or [size for size in _SCALE if most is None or size <= most], queues

    def lengths(self, mode: Mode) -> Lengths:
        """The grid of workloads."""
        batches = None if self.batch is None else parse_sizes(self.batch, "--batch")
        prompts = None if self.prompt_len is None else parse_sizes(self.prompt_len, "--prompt-len")
        outputs = [64] if self.new_tokens is None else parse_sizes(self.new_tokens, "--new-tokens")
        prefills = None if self.prefill_len is None else parse_sizes(self.prefill_len, "--prefill-len")
        if min(outputs) < 2:
            raise ConfigError("--new-tokens: decoding is what comes after the first token, so at least 2")
        if mode == "prefill":
            return Lengths(batches=(), prefills=prefills, prefill_batches=batches or (1,))
        return Lengths(batches, prompts, outputs, prefills)


@dataclass(frozen=True)
class TraceOptions:
    """Of ``--mode throughput``."""

    requests: Annotated[int | None, _option("How many (default: 32).", "Throughput")] = None
    prompts: Annotated[str | None, _option("Range of their prompts (default: 32-512).", "Throughput")] = None
    outputs: Annotated[str | None, _option("Range of their new tokens (default: 64-256).", "Throughput")] = None
    rate: Annotated[
        float | None, _option("Requests a second, as they come at random (default: all at once).", "Throughput")
    ] = None
    trace: Annotated[Path | None, _option("Instead: a file of requests, one JSON object a line.", "Throughput")] = None
    slots: Annotated[int | None, _option("Of random weights: sequences that run together.", "Throughput")] = None

    def given(self) -> list[str]:
        """Names of the options that were set."""
        return ["--" + name for name, value in asdict(self).items() if value is not None]

    def make(self) -> Trace:
        """The requests.

        Raises:
            ConfigError: a file and a description of another trace; or a range or number that cannot be.
        """
        if self.trace is not None:
            others = [name for name in self.given() if name not in ("--trace", "--slots")]
            if others:
                raise ConfigError(f"--trace says all of the requests: leave {', '.join(others)} out")
            return read_trace(self.trace)
        count = 32 if self.requests is None else self.requests
        if count < 1 or (self.rate is not None and not self.rate > 0):
            raise ConfigError("--requests and --rate are above 0")
        prompts = parse_range(self.prompts or "32-512", "--prompts")
        return make_trace(count, prompts, parse_range(self.outputs or "64-256", "--outputs"), self.rate)
