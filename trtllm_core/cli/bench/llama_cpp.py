"""llama.cpp as a peer, through llama-cpp-python: the same GGUF file, the same threads, the same tokens."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_core.cli.bench.peers import PeerSource
from trtllm_core.cli.bench.timing import Timing, gaps
from trtllm_core.cli.bench.workloads import Workload
from trtllm_core.errors import BackendError, ConfigError

_BATCH = 2048
"""Prompt tokens of one call, and ``_UBATCH`` of one pass: llama.cpp's own defaults."""
_UBATCH = 512


class LlamaCppPeer:
    """llama.cpp's C interface, greedy. What is timed is its own work and the choice of the largest logit."""

    def __init__(self, source: PeerSource, device: str) -> None:
        try:
            self._lib: Any = import_module("llama_cpp")
        except ImportError as error:
            raise ConfigError(
                f"the peer llama.cpp is not installed ({error}); pip install llama-cpp-python, which compiles it"
            ) from None
        import torch

        self._quiet = self._lib.llama_log_callback(lambda level, text, data: None)  # kept alive: C calls it
        self._lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._lib.llama_backend_init()
        self.name = f"llama.cpp (llama-cpp-python {self._lib.__version__})"
        self._threads = torch.get_num_threads()
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(source.checkpoint.encode(), options)
        if not self._model:
            raise BackendError(f"llama.cpp cannot load {source.checkpoint}")
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self.chosen: list[list[int]] = []
        """Of the last work: at each step, each sequence's token."""
        self._context: Any = None
        self._shape = (0, 0)

    def time(self, work: Workload) -> Timing:
        """Read all prompts, then decode all sequences a token at a time."""
        self._fit(work)
        lib, clock = self._lib, time.perf_counter
        prompts = work.prompts(self._vocab)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(_BATCH, 0, 1)
        try:
            start = clock()
            tokens = [self._read(batch, sequence, prompt) for sequence, prompt in enumerate(prompts)]
            times, chosen, busy = [clock()], [tokens], time.process_time()
            for position in range(work.prompt_len, work.prompt_len + work.new_tokens - 1):
                tokens = self._step(batch, tokens, position)
                times.append(clock())
                chosen.append(tokens)
        finally:
            lib.llama_batch_free(batch)
        self.chosen, busy = chosen, time.process_time() - busy
        made = work.batch * (work.new_tokens - 1)
        return Timing(times[0] - start, times[-1] - times[0], made, gaps([times]) * work.batch, busy)

    def _fit(self, work: Workload) -> None:
        """A context with room for the work; the one before it is kept where it has."""
        shape = (work.batch, work.prompt_len + work.new_tokens)
        if self._context is not None and shape == self._shape:
            return
        lib = self._lib
        if self._context is not None:
            lib.llama_free(self._context)
        options = lib.llama_context_default_params()
        options.n_seq_max = work.batch
        options.n_ctx = work.batch * -(-shape[1] // 256) * 256
        options.n_batch, options.n_ubatch = _BATCH, _UBATCH
        options.n_threads = options.n_threads_batch = self._threads
        self._context = lib.llama_init_from_model(self._model, options)
        self._shape = shape
        if not self._context:
            raise BackendError(f"llama.cpp has no room for {work.batch} sequences of {shape[1]} tokens")

    def _read(self, batch: Any, sequence: int, prompt: Sequence[int]) -> int:
        """Read a prompt, and return the token after it."""
        for first in range(0, len(prompt), _BATCH):
            part = prompt[first : first + _BATCH]
            for i, token in enumerate(part):
                _put(batch, i, token, first + i, sequence, first + i == len(prompt) - 1)
            self._decode(batch, len(part))
        return self._choose(len(part) - 1)

    def _step(self, batch: Any, tokens: Sequence[int], position: int) -> list[int]:
        for sequence, token in enumerate(tokens):
            _put(batch, sequence, token, position, sequence, True)
        self._decode(batch, len(tokens))
        return [self._choose(row) for row in range(len(tokens))]

    def _decode(self, batch: Any, count: int) -> None:
        batch.n_tokens = count
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise BackendError(f"llama_decode failed with status {status}")

    def _choose(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def check_source(path: Path, device: str) -> None:
    """Refuse what llama.cpp could not run beside us.

    Raises:
        ConfigError: the checkpoint is no GGUF file, or the work is not on the CPU.
    """
    if device != "cpu":
        raise ConfigError("the peer llama.cpp runs on the CPU: leave --device out")
    if not path.is_file() or path.suffix != ".gguf":
        raise ConfigError(f"the peer llama.cpp reads GGUF files, and {path} is none")


def _put(batch: Any, index: int, token: int, position: int, sequence: int, asked: bool) -> None:
    batch.token[index] = token
    batch.pos[index] = position
    batch.n_seq_id[index] = 1
    batch.seq_id[index][0] = sequence
    batch.logits[index] = asked
