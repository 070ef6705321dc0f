"""The paged KV pool on one device."""

from __future__ import annotations

import torch

from trtllm_core.plugin.kv_policy import Edits, KVPlan


class KVPool:
    """The caches of all layers, each ``[entries, 2 * kv_heads, head_size]``; entry = block * tokens_per_block + i.

    An entry holds a token's keys and then its values, so that both are written, gathered and copied in one go.
    """

    def __init__(self, plan: KVPlan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        model = plan.model
        entries = plan.num_blocks * plan.tokens_per_block
        # Zeros, not garbage: entries beyond a row's length are read and masked, and NaN would survive the mask.
        # Pages that are never written stay unbacked on the CPU.
        self.storage = torch.zeros(
            model.num_layers, entries, 2 * model.num_kv_heads, model.head_size, dtype=dtype, device=device
        )
        self.layers = self.storage.unbind(0)

    @property
    def bytes(self) -> int:
        """Bytes of the pool."""
        return self.storage.nbytes

    def edit(self, edits: Edits) -> None:
        """Copy blocks, in all layers."""
        if edits.copies:
            blocks = self.storage.view(self.storage.shape[0], self.plan.num_blocks, -1)
            src, dst = (torch.tensor(side, device=self.storage.device) for side in zip(*edits.copies, strict=True))
            blocks.index_copy_(1, dst, blocks.index_select(1, src))

    def move(self, source: torch.Tensor, target: torch.Tensor, layer: torch.Tensor) -> None:
        """See ``Executable.move_kv``; on the device."""
        layers, entries = self.storage.shape[:2]
        flat = self.storage.view(layers * entries, *self.storage.shape[2:])
        everywhere = layer < 0
        first = torch.where(everywhere, 0, layer * entries)
        # An entry that moves in all layers is as many moves as there are layers.
        steps = torch.arange(layers, device=layer.device) * entries
        parts = [
            torch.cat(
                (
                    (side + first)[~everywhere],
                    (side[everywhere][:, None] + steps).flatten(),
                )
            )
            for side in (source, target)
        ]
        flat[parts[1]] = flat[parts[0]]  # the right side is a copy before anything is written
