"""The slots: history and length of every live branch, on the device and on the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from trtllm_core.decoding import kernels
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.plugin import DecodingContext


class Slots:
    """Tokens, lengths and random keys, indexed by slot. On the CPU the host's arrays and the tensors are one memory.

    The host's copy follows the device's when a step's tokens have come back: see ``commit`` and ``record``.

    Args:
        count: how many there are.
        max_seq_len, vocab_size, vocab_size_padded, device, text, clock: as of ``DecodingContext``.
        apart: the device's copy is never the host's memory, as a loop that looks ahead needs it.
    """

    def __init__(
        self,
        count: int,
        max_seq_len: int,
        vocab_size: int,
        vocab_size_padded: int,
        device: torch.device,
        text: TokenBytes | None = None,
        clock: Callable[[], float] = time.monotonic,
        apart: bool = False,
    ) -> None:
        self.tokens = np.zeros((count, max_seq_len), np.int32)
        """int32 ``[slots, max_seq_len]``: prompt and committed tokens."""
        self.lengths = np.zeros(count, np.int64)
        """int64 ``[slots]``: tokens of each slot."""
        self.ahead = np.zeros(count, np.int64)
        """int64 ``[slots]``: tokens that the device has committed and the host has not seen yet."""
        self.limits = np.zeros(count, np.int64)
        """int64 ``[slots]``: tokens that each can have, prompt included."""
        self.shared = device.type == "cpu" and not apart
        """Whether the host's copy and the device's are one memory."""
        self._ones = torch.ones(count, dtype=torch.int64, device=device)
        self._free = list(range(count - 1, -1, -1))
        self.context = DecodingContext(
            slots=count,
            max_seq_len=max_seq_len,
            vocab_size=vocab_size,
            vocab_size_padded=vocab_size_padded,
            device=device,
            tokens=torch.from_numpy(self.tokens).to(device, copy=not self.shared),
            lengths=torch.from_numpy(self.lengths).to(device, copy=not self.shared),
            prompt_lengths=torch.zeros(count, dtype=torch.int64, device=device),
            seeds=torch.zeros(count, dtype=torch.int64, device=device),
            text=text,
            vocabulary=None if text is None else text.pieces,
            encode=None if text is None else text.encode,
            clock=clock,
        )

    def ones(self, n: int) -> torch.Tensor:
        """int64 ``[n]`` on the device: one token each. The same memory each time."""
        return self._ones[:n]

    def sent(self, values: Sequence[int]) -> torch.Tensor:
        """Numbers as int64 on the device, without waiting for it."""
        return torch.tensor(values).to(self.context.device, non_blocking=True)

    @property
    def free(self) -> int:
        """Slots that hold no branch."""
        return len(self._free)

    def take(self) -> int:
        """A free slot; the lowest, so that a small batch stays close together."""
        return self._free.pop()

    def give(self, slot: int) -> None:
        """The slot is free again."""
        self._free.append(slot)
        self._free.sort(reverse=True)

    def begin(self, slot: int, prompt: Sequence[int], key: int, most: int) -> None:
        """A branch starts with ``prompt``; ``key`` is that of its random numbers, ``most`` its limit."""
        n = len(prompt)
        self.tokens[slot, :n] = prompt
        self.lengths[slot], self.limits[slot], self.ahead[slot] = n, most, 0
        context = self.context
        if not self.shared:
            context.tokens[slot, :n].copy_(torch.from_numpy(self.tokens[slot, :n]), non_blocking=True)
            context.lengths[slot].fill_(n)
        # To assign a number would copy it from the host, and wait until the device has come that far.
        context.prompt_lengths[slot].fill_(n)
        context.seeds[slot].fill_(key)

    def commit(self, slot: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Append ``tokens [n, k]``, of each row the first ``counts``, on the device. Fixed shapes, no sync.

        Where the host's copy is the same memory, that is ``record``'s to do.
        """
        if self.shared:
            return
        context = self.context
        lengths = context.lengths.index_select(0, slot)
        for j in range(tokens.shape[1]):
            # A row without a j-th token writes back what is there, so that shapes never depend on the data.
            at = (lengths + j).clamp_(max=context.max_seq_len - 1)
            new = torch.where(j < counts, tokens[:, j].to(torch.int32), context.tokens[slot, at])
            context.tokens.index_put_((slot, at), new)
        context.lengths.index_put_((slot,), lengths + counts)

    def commit_one(
        self, slot: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a step whose tokens the host has not seen: ``chosen [n, 1]`` may be no tokens.

        Returns:
            What was appended, int64 ``[n, 1]`` and int32 ``[n]``: in place of no token, the nearest one.
        """
        context = self.context
        if kernels.takes(slot):
            from trtllm_core.decoding.kernels.commit import commit_one

            return commit_one(slot, chosen, counts, context.tokens, context.lengths, context.vocab_size)
        tokens = chosen.clamp(0, context.vocab_size - 1)
        self.commit(slot, tokens, counts)
        return tokens, tokens.squeeze(1).int()

    def record(self, slots: Sequence[int], new: Sequence[Sequence[int]], single: bool = False) -> None:
        """The same on the host, once the tokens are known there.

        Args:
            slots: each once.
            new: of each slot.
            single: whether that is one token each.
        """
        if single:
            rows = np.asarray(slots)
            length = self.lengths[rows]
            self.tokens[rows, length] = np.asarray(new)[:, 0]
            self.lengths[rows] = length + 1
            return
        for slot, row in zip(slots, new, strict=True):
            length = self.lengths[slot]
            self.tokens[slot, length : length + len(row)] = row
            self.lengths[slot] += len(row)

    def rewind(self, slot: int, n: int) -> None:
        """Take back the last ``n`` tokens. They stay readable behind the length until others are written."""
        self.lengths[slot] -= n
        if not self.shared:
            self.context.lengths[slot] -= n

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Slots ``dst`` become copies of slots ``src``, all at the same time; random keys stay the slots' own."""
        a, b = list(src), list(dst)
        for array in (self.tokens, self.lengths):
            array[b] = array[a]  # the right side is a copy before the left is written
        context = self.context
        tensors = [context.prompt_lengths] if self.shared else [context.prompt_lengths, context.tokens, context.lengths]
        for tensor in tensors:
            tensor[b] = tensor[a].clone()

    def history(self, slot: int) -> list[int]:
        """Prompt and committed tokens of a slot."""
        return self.tokens[slot, : self.lengths[slot]].tolist()  # type: ignore[no-any-return]
