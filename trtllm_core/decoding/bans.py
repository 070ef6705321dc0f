"""Logits processors that forbid tokens because of the text before them: bad words and repeated n-grams."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.history import recent, texts
from trtllm_core.decoding.state import SlotTable, copy_slots, per_row
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.logits import DeviceLogitsProcessor, LogitsCapabilities, Phase

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch


def lower(
    logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, value: float | torch.Tensor = -torch.inf
) -> None:
    """Lower the logits of some tokens to ``value``, in place and without a sync.

    Args:
        logits: float32 ``[n, vocab]``.
        tokens: int64 ``[n, m]``. Ids outside the vocabulary, such as the -1 of padding, are passed over.
        mask: bool, broadcasts to ``[n, m]``: which of the tokens are meant. One that occurs several times is lowered if
            any of its places is.
        value: one for all, or float32 ``[n, 1]``.
    """
    known = (tokens >= 0) & (tokens < logits.shape[1])
    values = torch.where(mask & known, value, torch.inf)
    # The minimum, because a plain scatter would let any one of a token's places win.
    logits.scatter_reduce_(1, tokens.clamp(0, logits.shape[1] - 1), values, "amin")


class NoRepeatNgram(DeviceLogitsProcessor):
    """Forbids tokens that would complete an n-gram which the text, prompt included, holds already."""

    phase = Phase.CONSTRAINT
    after = ("min_length",)
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"no_repeat_ngram_size": 2}), Example(sampling={"no_repeat_ngram_size": 3}))

    _size: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._max_size = context.max_seq_len
        self._size = torch.zeros(context.slots, dtype=torch.int64, device=context.device)
        self._live: dict[int, int] = {}

    @property
    def graph_key(self) -> Hashable:
        return max(self._live.values(), default=0)

    def begin(self, slot: int, view: BranchView) -> None:
        size = view.sampling.no_repeat_ngram_size
        self._live[slot] = size if size <= self._max_size else 0  # larger n-grams cannot repeat
        self._size[slot].fill_(self._live[slot])

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        size = per_row(self._size, batch, neutral=0)
        text, end = texts(batch)
        last = recent(batch, max(self._live.values(), default=0))
        # repeats[:, p]: the n-1 tokens before p are those before the new token, so the one at p is forbidden.
        column = torch.arange(text.shape[1], device=text.device)
        repeats = (column >= size - 1) & (column < end.unsqueeze(1)) & (size > 0)
        for back in range(1, last.shape[1]):
            same = text.roll(back, dims=1) == last[:, back - 1, None]
            repeats &= same | (back >= size)
        lower(logits, text, repeats)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._size)

    def end(self, slot: int) -> None:
        self._live.pop(slot, None)


class BadWords(DeviceLogitsProcessor):
    """Forbids the last token of each word whose other tokens stand right before it, prompt included.

    In preset ``hf`` an end token on its own is no bad word, as in transformers. Words are kept last token first, as the
    text before a position is read.
    """

    phase = Phase.CONSTRAINT
    after = ("min_length", "no_repeat_ngram")
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"bad_words_list": [[1, 2], [4], [3, 1, 0]]}),)

    _words: SlotTable

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size
        self._words = SlotTable(context.slots, context.device, fill=-1, depth=2)

    @property
    def graph_key(self) -> Hashable:
        return self._words.shape

    def begin(self, slot: int, view: BranchView) -> None:
        words = view.sampling.bad_words_list
        if wrong := [word for word in words if max(word) >= self._vocab_size]:
            raise ConfigError(f"bad_words_list: {wrong[0]} is not in the vocabulary of {self._vocab_size} tokens")
        if view.sampling.preset == "hf":
            words = tuple(word for word in words if not (len(word) == 1 and word[0] in view.end_ids))
        self._words.write(slot, [word[::-1] for word in words])

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        words = self._words.rows.index_select(0, batch.slot)
        last, rest = words[:, :, 0], words[:, :, 1:]
        before = recent(batch, rest.shape[2]).unsqueeze(1)
        begun = ((rest == before) | (rest < 0)).all(dim=2)
        lower(logits, last, begun & batch.active.unsqueeze(1))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._words.rows)
