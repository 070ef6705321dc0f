"""Other engines to compare with. Each is imported only when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from trtllm_core.cli.measure import Timing, Workload, synchronize
from trtllm_core.errors import BackendError, ConfigError, listing


class Peer(Protocol):
    """Another engine with the same weights loaded."""

    name: str

    def time(self, work: Workload) -> Timing:
        """Do the same work."""
        ...


class TransformersPeer:
    """``generate`` of Hugging Face's transformers, greedy, with its default cache and attention."""

    def __init__(self, checkpoint: Path, dtype: str, device: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"the peer transformers is not installed ({error}); pip install trtllm-core[bench]"
            ) from None
        import torch

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        source, options = checkpoint, {}
        if checkpoint.is_file():
            # Dense weights on both sides: left alone, transformers would run the file's packed ones.
            dense = transformers.GgufConfig(dequantize=True)
            source, options = checkpoint.parent, {"gguf_file": checkpoint.name, "quantization_config": dense}
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self.name = f"transformers {transformers.__version__}"
        self._device = torch.device(device)
        self._model = load(source, dtype=getattr(torch, dtype), **options).eval().to(self._device)
        # A peer that stopped early would look fast: no token ends its text.
        self._model.generation_config.eos_token_id = None
        self._options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def time(self, work: Workload) -> Timing:
        """Decoding is what a whole run takes longer than one that stops after the first token."""
        first = self._seconds(work, 1)
        if work.is_prefill:
            return Timing(first, 0.0, 0)
        whole = self._seconds(work, work.new_tokens)
        return Timing(first, whole - first, work.batch * (work.new_tokens - 1))

    def _seconds(self, work: Workload, new_tokens: int) -> float:
        import torch

        ids = torch.tensor(work.prompts(self._model.config.vocab_size), device=self._device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            synchronize(self._device)
            start = time.perf_counter()
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **self._options)
            synchronize(self._device)
            seconds = time.perf_counter() - start
        if out.shape[1] != work.prompt_len + new_tokens:
            made = out.shape[1] - work.prompt_len
            raise BackendError(f"{self.name} made {made} tokens instead of {new_tokens}: it cannot be compared")
        return seconds


PEERS: dict[str, Callable[[Path, str, str], Peer]] = {"transformers": TransformersPeer}


def load_peer(name: str, checkpoint: Path, dtype: str, device: str) -> Peer:
    """A peer by name, with its weights loaded.

    Raises:
        ConfigError: there is no such peer, or it is not installed.
    """
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name!r} (known: {listing(PEERS)})")
    return PEERS[name](checkpoint, dtype, device)


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
