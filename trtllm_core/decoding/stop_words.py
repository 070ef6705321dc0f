"""Stop words: token sequences that end a branch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.criteria import first_hit
from trtllm_core.decoding.history import tokens_before
from trtllm_core.decoding.state import SlotTable, accepted, copy_slots
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import DeviceStoppingCriterion, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


class StopWords(DeviceStoppingCriterion):
    """Stops where the text ends with one of ``stop_words_list``.

    The text is prompt and generated tokens, so a match may begin in the prompt; it ends in a new token. The tokens
    that matched stay. Words are kept last token first, as the text before a position is read.
    """

    reason = "stop_words"
    capabilities = StoppingCapabilities(graph_safe=True)
    examples = (Example(sampling={"stop_words_list": [[1, 2], [3, 3, 1], [8]]}),)

    _words: SlotTable

    def setup(self, context: DecodingContext) -> None:
        self._words = SlotTable(context.slots, context.device, fill=-1, depth=2)
        self._lists: dict[int, Sequence[tuple[int, ...]]] = {}

    @property
    def graph_key(self) -> Hashable:
        return self._words.shape

    def begin(self, slot: int, view: BranchView) -> None:
        self._lists[slot] = view.sampling.stop_words_list
        self._words.write(slot, [word[::-1] for word in view.sampling.stop_words_list])

    def check(self, batch: CommitBatch) -> torch.Tensor:
        n, k = batch.tokens.shape
        words = self._words.rows.index_select(0, batch.slot).unsqueeze(1)
        after = torch.arange(1, k + 1, device=batch.tokens.device).expand(n, k)
        text = tokens_before(batch.context, batch.slot, after, words.shape[3], extra=batch.tokens).unsqueeze(2)
        # -1 pads short words, and whole words where a slot has fewer than the table.
        matches = ((text == words) | (words < 0)).all(dim=3) & (words[..., 0] >= 0)
        return first_hit(matches.any(dim=2) & accepted(batch))

    def matched(self, slot: int, tokens: Sequence[int]) -> tuple[int, ...]:
        text = tuple(tokens)
        return max((word for word in self._lists[slot] if text[-len(word) :] == word), key=len)

    def end(self, slot: int) -> None:
        self._lists.pop(slot, None)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._words.rows)
