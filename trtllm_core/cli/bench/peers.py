"""Other engines to compare with. Each is imported only when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_core.cli.bench.timing import Timing, gaps, synchronize
from trtllm_core.cli.bench.workloads import Workload
from trtllm_core.errors import BackendError, ConfigError, listing

if TYPE_CHECKING:
    import torch

    from trtllm_core.cli.bench.subject import Subject
    from trtllm_core.config import EngineConfig


class Peer(Protocol):
    """Another engine with the same weights loaded."""

    name: str

    def time(self, work: Workload) -> Timing:
        """Do the same work."""
        ...


@dataclass(frozen=True)
class PeerSource:
    """Which peer, and what it loads. It is plain data, so that another process can load the same."""

    name: str
    dtype: str
    checkpoint: str = ""
    """The files of the weights."""
    shape: str = ""
    """Or a published shape, for random weights."""


class TransformersPeer:
    """``generate`` of Hugging Face's transformers, greedy, with its default cache and attention."""

    def __init__(self, source: PeerSource, device: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"the peer transformers is not installed ({error}); pip install trtllm-core[bench]"
            ) from None
        import torch

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.name = f"transformers {transformers.__version__}"
        self._device = torch.device(device)
        dtype = getattr(torch, source.dtype)
        self.model: Any = _random_model(source.shape, dtype, device) if source.shape else _load_model(source, dtype)
        self.model.eval().to(self._device)
        # A peer that stopped early would look fast: no token ends its text.
        self.model.generation_config.eos_token_id = None
        self._options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def time(self, work: Workload) -> Timing:
        """One run, whose tokens are timed where ``generate`` asks whether to stop."""
        import torch

        ids = torch.tensor(work.prompts(self.model.config.vocab_size), device=self._device)
        mask, clock = torch.ones_like(ids), _Clock(self._device)
        with torch.inference_mode():
            synchronize(self._device)
            start = time.perf_counter()
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=work.new_tokens, stopping_criteria=[clock], **self._options
            )
            synchronize(self._device)
            end, busy = time.perf_counter(), time.process_time()
        if out.shape[1] != work.prompt_len + work.new_tokens:
            made = out.shape[1] - work.prompt_len
            raise BackendError(f"{self.name} made {made} tokens instead of {work.new_tokens}: it cannot be compared")
        first, made = clock.times[0], work.batch * (work.new_tokens - 1)
        return Timing(first - start, end - first, made, gaps([clock.times]) * work.batch, busy - clock.busy)


class _Clock:
    """A stopping criterion that never stops, and notes when it was asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []
        self.busy = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.times:
            synchronize(self._device)  # the first token is there when it is; of later ones generate itself waits
            self.busy = time.process_time()
        self.times.append(time.perf_counter())
        return input_ids.new_zeros(input_ids.shape[0], dtype=bool)  # type: ignore[call-overload,no-any-return]


def _load_model(source: PeerSource, dtype: torch.dtype) -> Any:
    import transformers

    path, options = Path(source.checkpoint), dict[str, Any]()
    if path.is_file():
        # Dense weights on both sides: left alone, transformers would run the file's packed ones.
        dense = transformers.GgufConfig(dequantize=True)
        path, options = path.parent, {"gguf_file": path.name, "quantization_config": dense}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def _random_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    """Made where it runs, so that a large one does not pass through the host."""
    import torch
    import transformers

    from trtllm_core.cli.bench.shapes import find_shape

    fields = dict(find_shape(shape).config)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _llama_cpp(source: PeerSource, device: str) -> Peer:
    from trtllm_core.cli.bench.llama_cpp import LlamaCppPeer

    return LlamaCppPeer(source, device)


PEERS: dict[str, Callable[[PeerSource, str], Peer]] = {"transformers": TransformersPeer, "llama.cpp": _llama_cpp}


def load_peer(source: PeerSource, device: str) -> Peer:
    """A peer, with its weights loaded.

    Raises:
        ConfigError: it is not installed.
    """
    return PEERS[source.name](source, device)


def peer_source(name: str, checkpoint: Path | None, subject: Subject, config: EngineConfig, device: str) -> PeerSource:
    """What a peer loads to have what we have.

    Raises:
        ConfigError: there is no such peer, no checkpoint for it, or none that it can run.
    """
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name!r} (known: {listing(PEERS)})")
    if subject.shape:
        if checkpoint is not None:
            raise ConfigError("--checkpoint is of an engine's peer: beside --shape, the peer's weights are random too")
        if name == "llama.cpp":
            raise ConfigError("the peer llama.cpp reads GGUF files: build an engine from one, instead of --shape")
        return PeerSource(name, config.model.dtype, shape=subject.shape)
    path = find_checkpoint(checkpoint, Path(subject.engine), config.source)
    if name == "llama.cpp":
        from trtllm_core.cli.bench.llama_cpp import check_source

        check_source(path, device)
    return PeerSource(name, config.model.dtype, str(path))


def find_checkpoint(given: Path | None, engine: Path, source: str) -> Path:
    """The checkpoint that an engine was made of: as given, or beside the engine.

    Raises:
        ConfigError: it is not there.
    """
    candidates = [engine.resolve().parent / source, Path(source)] if given is None else [given]
    for path in candidates:
        if (given is not None or source) and path.exists():
            return path
    if given is not None:
        raise ConfigError(f"there is no checkpoint at {given}")
    raise ConfigError(
        f"the peer needs the checkpoint {source!r}, which is not beside the engine: use --checkpoint PATH"
    )
