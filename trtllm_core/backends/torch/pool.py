"""The paged KV pool on one device."""

from __future__ import annotations

import torch

from trtllm_core.backends.torch.cuda.support import unsupported
from trtllm_core.backends.torch.host_blocks import HostBlocks
from trtllm_core.backends.torch.layer_cache import CODES, LayerCache, QuantizedCache
from trtllm_core.plugin.kv_policy import Edits, KVPlan


class KVPool:
    """The caches of all layers.

    Args:
        plan: how many blocks there are, and with ``model.dtype`` whether they hold codes: see ``CODES``.
        dtype: of queries, keys and values.
        device: where.
    """

    def __init__(self, plan: KVPlan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.dtype = dtype
        model, code = plan.model, CODES.get(plan.model.dtype)
        entries, heads = plan.num_blocks * plan.tokens_per_block, 2 * model.num_kv_heads
        # Zeros, not garbage: entries beyond a row's length are read and masked, and NaN would survive the mask.
        # Pages that are never written stay unbacked on the CPU.
        kept = dtype if code is None else torch.uint8
        self.storage = torch.zeros(model.num_layers, entries, heads, model.head_size, dtype=kept, device=device)
        """``[layers, entries, 2 * kv_heads, head_size]``: see ``LayerCache``; codes as bytes."""
        self.scales: torch.Tensor | None = None
        self.layers: tuple[LayerCache, ...]
        self.host: HostBlocks | None = None
        if code is None:
            self.layers = tuple(LayerCache(data, plan.tokens_per_block) for data in self.storage)
            self._make_host()
            return
        shape = model.num_layers, plan.num_blocks, heads, plan.tokens_per_block
        self.scales = torch.zeros(shape, dtype=torch.float32, device=device)
        cache = QuantizedCache
        if unsupported(device) is None:
            from trtllm_core.backends.torch.cuda.cache import CudaQuantizedCache

            cache = CudaQuantizedCache
        parts = zip(self.storage.view(code.dtype), self.scales, strict=True)
        self.layers = tuple(cache(data, scales, model.dtype, dtype) for data, scales in parts)
        self._make_host()

    def _make_host(self) -> None:
        if self.plan.host_blocks:
            parts = [self.storage] if self.scales is None else [self.storage, self.scales]
            shape = len(self.layers), self.plan.num_blocks, -1
            self.host = HostBlocks([part.view(shape) for part in parts], self.plan.host_blocks)

    @property
    def bytes(self) -> int:
        """Bytes of the pool on its device."""
        return self.storage.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def edit(self, edits: Edits) -> None:
        """Save, copy and load blocks, in all layers."""
        if self.host is not None and edits.saves:
            self.host.save(edits.saves)
        if edits.copies:
            src, dst = (torch.tensor(side, device=self.storage.device) for side in zip(*edits.copies, strict=True))
            for part in (self.storage, self.scales):
                if part is not None:
                    blocks = part.view(part.shape[0], self.plan.num_blocks, -1)
                    blocks.index_copy_(1, dst, blocks.index_select(1, src))
        if self.host is not None and edits.loads:
            self.host.load(edits.loads)

    def move(self, source: torch.Tensor, target: torch.Tensor, layer: torch.Tensor) -> None:
        """See ``Executable.move_kv``; on the device."""
        layers, entries = self.storage.shape[:2]
        everywhere = layer < 0
        first = torch.where(everywhere, 0, layer * entries)
        # An entry that moves in all layers is as many moves as there are layers.
        steps = torch.arange(layers, device=layer.device) * entries
        source, target = (
            torch.cat(
                (
                    (side + first)[~everywhere],
                    (side[everywhere][:, None] + steps).flatten(),
                )
            )
            for side in (source, target)
        )
        flat = self.storage.flatten(0, 1)
        flat[target] = flat[source]  # the right side is a copy before anything is written
        if self.scales is not None:
            size = self.plan.tokens_per_block
            scales = self.scales.flatten(0, 1)
            scales[target // size, :, target % size] = scales[source // size, :, source % size]
