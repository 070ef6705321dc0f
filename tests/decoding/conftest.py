"""A decoding floor without an engine: slots with a text, the batches that plugins are shown, and a plain reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.random import slot_key
from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


class Floor:
    """Slots whose tokens the test sets. ``histories`` holds them as lists, ``context`` as tensors."""

    def __init__(
        self, slots: int = 6, vocab: int = 40, padded: int = 44, max_seq_len: int = 48, text: Any = None
    ) -> None:
        self.vocab, self.padded = vocab, padded
        self.histories: list[list[int]] = [[] for _ in range(slots)]
        # What is undefined for plugins is filled with a token that would be noticed.
        self.context = DecodingContext(
            slots=slots,
            max_seq_len=max_seq_len,
            vocab_size=vocab,
            vocab_size_padded=padded,
            device=torch.device("cpu"),
            tokens=torch.full((slots, max_seq_len), 1, dtype=torch.int32),
            lengths=torch.zeros(slots, dtype=torch.int64),
            prompt_lengths=torch.zeros(slots, dtype=torch.int64),
            seeds=torch.tensor([slot_key(slot, 0) for slot in range(slots)]),
            text=text,
        )

    def view(
        self, slot: int, prompt: Sequence[int], end_ids: tuple[int, ...] = (), params: Any = None, **sampling: Any
    ) -> BranchView:
        """A branch begins in ``slot``."""
        self.histories[slot] = list(prompt)
        self.context.prompt_lengths[slot] = len(prompt)
        self._write(slot)
        return BranchView("r", 0, slot, tuple(prompt), SamplingConfig(**sampling), end_ids, 0, params)

    def _write(self, slot: int) -> None:
        history = self.histories[slot]
        self.context.tokens[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
        self.context.lengths[slot] = len(history)

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        self.histories[slot].extend(tokens)
        self._write(slot)

    def rewind(self, slot: int, n: int) -> None:
        """Tokens were taken back; they stay readable behind the text."""
        del self.histories[slot][len(self.histories[slot]) - n :]
        self.context.lengths[slot] -= n

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Texts follow their branches."""
        for slot, history in zip(dst, [list(self.histories[slot]) for slot in src], strict=True):
            self.histories[slot] = history
        for tensor in (self.context.tokens, self.context.lengths, self.context.prompt_lengths):
            tensor[list(dst)] = tensor[list(src)]

    def logits_batch(
        self,
        slots: Sequence[int],
        active: Sequence[bool] | None = None,
        offsets: Sequence[int] | None = None,
        draft: np.ndarray | None = None,
    ) -> LogitsBatch:
        n = len(slots)
        return LogitsBatch(
            self.context,
            torch.tensor(slots),
            torch.tensor(offsets if offsets is not None else [0] * n),
            torch.tensor(active if active is not None else [True] * n),
            None if draft is None else torch.from_numpy(draft.astype(np.int32)),
        )

    def commit_batch(
        self,
        slots: Sequence[int],
        new: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
        logits: torch.Tensor | None = None,
        source: Sequence[Sequence[int]] = (),
    ) -> CommitBatch:
        width = max(1, *map(len, new))
        tokens = torch.full((len(slots), width), 10**9)  # undefined: not even a token
        for row, given in zip(tokens, new, strict=True):
            row[: len(given)] = torch.tensor(list(given), dtype=torch.int64)
        counts = torch.tensor([len(given) for given in new])
        return CommitBatch(
            self.context,
            torch.tensor(slots),
            tokens,
            counts,
            torch.tensor(active if active else [True] * len(slots)),
            logits,
            None if logits is None else torch.tensor(source),
        )


class Reference:
    """The classic runtime's semantics, one sequence at a time: appendix A of the feature reference, in NumPy."""

    NEG = float(np.finfo(np.float32).min)

    @staticmethod
    def bias(x: np.ndarray, bias: dict[int, float] | Sequence[float]) -> np.ndarray:
        x = x.copy()
        for token, value in bias.items() if isinstance(bias, dict) else enumerate(bias):
            x[token] += np.float32(value)
        return x

    @staticmethod
    def temperature(x: np.ndarray, temperature: float, preset: str = "trtllm") -> np.ndarray:
        if preset == "hf":
            return x / np.float32(temperature)
        return x * np.float32(np.float32(1.0) / np.float32(temperature + 1e-6))

    @staticmethod
    def penalties(
        x: np.ndarray, ids: Sequence[int], rep: float, pres: float, freq: float, ignored: int = 0
    ) -> np.ndarray:
        """Presence and frequency do not count the first ``ignored`` tokens, as TensorRT-LLM documents it."""
        seen = np.bincount(np.array(ids, int), minlength=len(x)) > 0
        c = np.bincount(np.array(ids[ignored:], int), minlength=len(x))
        x = np.where(seen, np.where(x < 0, x * np.float32(rep), x / np.float32(rep)), x)
        v = x - np.float32(pres) - np.float32(freq) * c.astype(np.float32)
        return np.where(c > 0, v, x).astype(np.float32)

    @classmethod
    def min_length(
        cls, x: np.ndarray, generated: int, least: int, end_ids: Sequence[int], preset: str = "trtllm"
    ) -> np.ndarray:
        x = x.copy()
        if generated < least:
            x[list(end_ids)] = cls.NEG if preset == "trtllm" else -np.inf
        return x

    @staticmethod
    def no_repeat_ngram(x: np.ndarray, ids: Sequence[int], n: int) -> np.ndarray:
        x, ids = x.copy(), list(ids)
        if n == 0 or len(ids) < n:
            return x
        tail = ids[len(ids) - n + 1 :]
        for i in range(len(ids) - n + 1):
            if ids[i : i + n - 1] == tail:
                x[ids[i + n - 1]] = -np.inf
        return x

    @staticmethod
    def bad_words(x: np.ndarray, ids: Sequence[int], words: Sequence[Sequence[int]]) -> np.ndarray:
        x, ids = x.copy(), list(ids)
        for word in map(list, words):
            n = len(word)
            if n == 1 or (len(ids) >= n - 1 and ids[len(ids) - n + 1 :] == word[:-1]):
                x[word[-1]] = -np.inf
        return x

    @staticmethod
    def min_p(x: np.ndarray, min_p: float) -> np.ndarray:
        p = np.exp(x.astype(np.float64) - x.max())
        return np.where(p < min_p * p.max(), -np.inf, x).astype(np.float32)

    @staticmethod
    def sample(x: np.ndarray, u: float, top_k: int = 0, top_p: float = 0.0) -> int:
        if top_k == 0 and top_p == 0.0:
            top_k = 1
        order = np.argsort(-x, kind="stable")[: top_k or None]
        if top_k and top_p == 0.0:
            top_p = 1.0
        e = np.exp(x[order] - x[order[0]])
        r = np.float32(u * top_p) * e.sum()
        for token, mass in zip(order, e, strict=True):
            r -= mass
            if r <= 0:
                return int(token)
        return int(order[-1])

    @staticmethod
    def distribution(x: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
        """Exact probabilities of ``sample``, in float64."""
        if top_k == 0 and top_p == 0.0:
            top_k = 1
        order = np.argsort(-x, kind="stable")[: top_k or None]
        e = np.exp(x[order].astype(np.float64) - x[order[0]])
        share = e / e.sum()
        p = top_p or 1.0
        before = np.cumsum(share) - share
        out = np.zeros(len(x))
        out[order] = np.clip(p - before, 0, share) / p
        return out

    @staticmethod
    def stop_at(history: Sequence[int], new: Sequence[int], words: Sequence[Sequence[int]]) -> int:
        """Index of the first new token after which the text ends with a word, or -1."""
        ids = list(history)
        for at, token in enumerate(new):
            ids.append(token)
            if any(len(ids) >= len(word) and ids[len(ids) - len(word) :] == list(word) for word in words):
                return at
        return -1


@pytest.fixture(scope="session")
def new_floor() -> type[Floor]:
    """Call it with the sizes that a test wants."""
    return Floor


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
