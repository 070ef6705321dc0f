"""LoRA adapters on the torch backend: a bank of factors for each layer, and products that serve mixed batches.

The factors of all adapters lie side by side, each padded to one rank. One product then serves rows of several
adapters: every row meets the factors of all of them, and what it has from others' is set to zero in between. That reads
each factor once and needs two or three products a layer, however the batch is mixed, which is what counts while few
rows run, and on a GPU, where every launch costs. Where many run on a CPU, arithmetic counts, and each adapter's rows
get products of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import nn

from trtllm_core.config import BuildConfig
from trtllm_core.errors import ConfigError
from trtllm_core.nn import Linear
from trtllm_core.nn.linear import MatMul
from trtllm_core.plugin import LowRank

RANK_STEP = 16
"""Ranks are padded to a multiple of this: 64 bytes of float32, so that every adapter's factors lie alike."""

TOGETHER_UP_TO = 64
"""Rows with an adapter up to which one product serves all adapters on a CPU. On a GPU it always does: for 8 adapters of
rank 16 on 4096 x 4096 bfloat16 features (H100), it adds 147, 65 and 83 µs to 8, 1024 and 4096 rows; products of their
own add 669, 803 and 560 µs."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows of a call that one product serves."""

    rows: torch.Tensor | None
    """int64 ``[n]``; None: all rows of the call, in order."""
    first: int
    last: int
    """Adapters ``first`` to ``last - 1`` are among them."""
    others: torch.Tensor | None
    """bool ``[n, last - first, 1, 1]``: which adapters are not the row's; None: there is one, and it is."""


def group_rows(adapters: np.ndarray, device: torch.device, together: int = TOGETHER_UP_TO) -> list[AdapterRows]:
    """Rows by adapter, once for all layers of a call.

    Args:
        adapters: integers ``[rows]``: each row's adapter, -1 for none.
        together: rows up to which different adapters share a product.
    """
    with_one = np.flatnonzero(adapters >= 0)
    present = np.unique(adapters[with_one])
    if len(present) > 1 and len(with_one) <= together:
        parts = [with_one]
    else:
        parts = [np.flatnonzero(adapters == adapter) for adapter in present]
    groups = []
    for part in parts:
        own = adapters[part]
        first, last = int(own.min()), int(own.max()) + 1
        others = None if last - first == 1 else torch.from_numpy(own[:, None] != np.arange(first, last))
        groups.append(
            AdapterRows(
                None if len(part) == len(adapters) else torch.from_numpy(part).to(device, non_blocking=True),
                first,
                last,
                None if others is None else others[:, :, None, None].to(device, non_blocking=True),
            )
        )
    return groups


class LoraLinear:
    """A linear layer's product with what adapters add to it; stands where the layer's own product stood.

    ``sizes`` are the output features of the layer's parts, each with factors of its own: queries, keys and values.
    """

    def __init__(self, layer: Linear, bank: LoraBank, sizes: Sequence[int]) -> None:
        self.product = layer.matmul
        self.bank = bank
        self.inputs = layer.weight.shape[1]
        self.sizes = tuple(sizes)
        self.starts = tuple(accumulate(self.sizes, initial=0))[:-1]
        self._a: torch.Tensor | None = None
        """``[adapters, parts, rank, in]``; None until an adapter changes the layer."""
        self._b: list[torch.Tensor] = []
        """Of each part ``[adapters * rank, out]``."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ``MatMul``. ``x [rows, in]``."""
        y = self.product(x, weight, bias)
        if self._a is not None:
            for group in self.bank.groups:
                self._add(y, x, self._a[group.first : group.last], group)
        return y

    def _add(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, group: AdapterRows) -> None:
        adapters, parts, rank = a.shape[:3]
        low = self.bank.product(x if group.rows is None else x[group.rows], a.flatten(0, 2), None)
        low = low.view(-1, adapters, parts, rank)
        if group.others is not None:
            low.masked_fill_(group.others, 0)
        for part, (start, size, b) in enumerate(zip(self.starts, self.sizes, self._b, strict=True)):
            more = self.bank.product(low[:, :, part].flatten(1), b[group.first * rank : group.last * rank].t(), None)
            out = y[:, start : start + size]
            if group.rows is None:
                out.add_(more)
            else:
                out.index_add_(0, group.rows, more)

    def put(self, index: int, factors: Sequence[LowRank]) -> None:
        """Keep an adapter's factors; none drops what is there."""
        if self._a is None:
            if not factors:
                return
            self._allocate()
            assert self._a is not None
        rank = self._a.shape[2]
        self._a[index].zero_()
        for b in self._b:
            b[index * rank : (index + 1) * rank].zero_()
        for one in factors:
            part, own = self.starts.index(one.start), one.a.shape[0]
            self._a[index, part, :own] = one.a
            self._b[part][index * rank : index * rank + own] = one.b.t()

    def _allocate(self) -> None:
        bank, zeros = self.bank, partial(torch.zeros, dtype=self.bank.dtype, device=self.bank.device)
        self._a = zeros(bank.adapters, len(self.sizes), bank.rank, self.inputs)
        self._b = [zeros(bank.adapters * bank.rank, size) for size in self.sizes]


class LoraBank:
    """The adapters of an engine, and which rows of the running call use them.

    Args:
        module: the family's module, whose layers get their products wrapped.
        sizes: by layer, see ``LoraLinear``.
        build: how many adapters, and of what rank.
        product: of the factors.
        invariant: no row's result may depend on others: every adapter's rows have products of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        sizes: Mapping[str, Sequence[int]],
        build: BuildConfig,
        dtype: torch.dtype,
        device: torch.device,
        product: MatMul,
        invariant: bool = False,
    ) -> None:
        self.adapters = build.max_loras
        self.rank = -(-build.max_lora_rank // RANK_STEP) * RANK_STEP
        self.dtype, self.device, self.product = dtype, device, product
        self.groups: Sequence[AdapterRows] = ()
        """Of the running call."""
        self._together = 0 if invariant else TOGETHER_UP_TO if device.type == "cpu" else sys.maxsize
        self._layers: dict[str, LoraLinear] = {}
        for name, parts in sizes.items():
            layer = module.get_submodule(name)
            assert isinstance(layer, Linear)
            layer.matmul = self._layers[name] = LoraLinear(layer, self, parts)

    def put(self, index: int, adapter: Mapping[str, Sequence[LowRank]]) -> None:
        """See ``Executable.put_adapter``.

        Raises:
            ConfigError: there is no such index.
        """
        if not 0 <= index < self.adapters:
            raise ConfigError(f"there is no place {index} for an adapter: the engine was built for {self.adapters}")
        for name, layer in self._layers.items():
            layer.put(index, adapter.get(name, ()))

    def begin(self, lora_ids: np.ndarray | None, query_lengths: np.ndarray) -> None:
        """A call begins: ``lora_ids [rows]``, -1 for none; None: no row has an adapter."""
        if lora_ids is None or not (lora_ids >= 0).any():
            self.groups = ()
        else:
            self.groups = group_rows(np.repeat(lora_ids, query_lengths), self.device, self._together)
