"""An engine of the padded, linear contract, loaded: the caches, and what is checked before every run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from trtllm_core.backends.linear.contract import cache_names, tensor_specs
from trtllm_core.config import EngineConfig
from trtllm_core.errors import BackendError
from trtllm_core.plugin import Capabilities, Executable
from trtllm_core.plugin.kv_policy import Edits, KVPlan


class LinearExecutable(Executable):
    """Owns the linear caches, of which row i is slot i's, and hands the rows of a run to the engine.

    Subclasses implement ``launch``.
    """

    def __init__(self, config: EngineConfig, device: torch.device, dtypes: tuple[str, ...]) -> None:
        layers = config.model.num_layers
        self.config = config
        self.device = device
        self.tensors = tensor_specs(config)
        self.capabilities = Capabilities("padded_linear", dtypes, multi_position=True)
        self.past, self.present = cache_names(layers, "past"), cache_names(layers, "present")
        self._caches: torch.Tensor | None = None
        self.watched: dict[str, torch.Tensor] = {}
        """While ``debugging``, what the modules gave in the last run that the build named: ``[rows, tokens, …]``."""
        self._rows: tuple[int, int] | None = None
        """First row and last but one of the run before; ``_ran`` has its caches and its longest row."""
        self._ran: tuple[Sequence[torch.Tensor], int] = (), 0

    @abstractmethod
    def launch(
        self,
        inputs: Mapping[str, torch.Tensor],
        longest: int,
        caches: Sequence[torch.Tensor],
        logits: torch.Tensor,
        stream: int,
    ) -> None:
        """Run the engine: ``input_ids``, ``write_indices`` and ``logit_indices`` in, ``logits`` out.

        ``caches`` are the run's rows of the caches, in the order of ``past`` and ``present``, updated in place.
        ``longest`` is the number of entries that the longest row has afterwards, padding included.
        """

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``: one block is one row, as long as the longest sequence."""
        model, capacity = plan.model, self.config.build.max_seq_len
        if plan.tokens_per_block != capacity or plan.window is not None:
            raise BackendError(
                "this engine's KV cache is linear, one row of max_seq_len tokens a slot: use the policy 'contiguous'"
            )
        self._caches, self._rows, self._ran = (
            None,
            None,
            ((), 0),
        )  # so that the old caches are gone before the new ones are there
        shape = (2 * model.num_layers, plan.num_blocks, model.num_kv_heads, capacity, model.head_size)
        self._caches = torch.zeros(shape, dtype=getattr(torch, model.dtype), device=self.device)
        return self._caches.nbytes

    def scramble(self) -> None:
        """Fill the caches with noise, which must not matter: what a row sees it has written."""
        self._allocated().normal_(std=3.0)

    def edit_kv(self, edits: Edits) -> None:
        """See ``Executable``: a block is a row, so what is copied are whole rows."""
        if edits.copies:
            src, dst = (torch.tensor(side, device=self.device) for side in zip(*edits.copies, strict=True))
            caches = self._allocated()
            caches.index_copy_(1, dst, caches.index_select(1, src))

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``Executable``. ``write_indices`` and ``cache_rows`` are read on the host: give them as CPU tensors.

        Raises:
            BackendError: a row would write beyond its cache, padding included, or the rows are not neighbours.
        """
        rows = inputs["cache_rows"].tolist()
        first, last = rows[0], rows[-1] + 1
        if rows != list(range(first, last)):
            raise BackendError(f"cache_rows must be one after another, got {rows}")
        longest, capacity = int(inputs["write_indices"].max()) + inputs["input_ids"].shape[1], self._capacity
        if longest > capacity or int(inputs["write_indices"].min()) < 0:
            raise BackendError(
                f"{inputs['input_ids'].shape[1]} tokens a row from {inputs['write_indices'].tolist()} on lie outside "
                f"the cache of {capacity} entries"
            )
        feed = {
            name: inputs[name].to(self.device, non_blocking=True)
            for name in ("input_ids", "write_indices", "logit_indices")
        }
        caches = self._ran[0]
        if (first, last) != self._rows:  # else a step would make as many views as there are caches
            caches, self._rows = self._allocated()[:, first:last].unbind(0), (first, last)
        self._ran = caches, longest
        self.launch(feed, longest, caches, outputs["logits"], stream)

    def debug_tensors(self) -> Mapping[str, torch.Tensor]:
        """See ``Executable``: each layer's caches, ``[rows, kv_heads, entries, head_size]``, as the run left them.

        And what the engine was built to give besides, ``[rows, tokens, …]``: see the option ``debug_tensors``.
        """
        caches, longest = self._ran
        kept = {name: cache[:, :, :longest] for name, cache in zip(self.present, caches, strict=True)}
        return {**kept, **self.watched}

    @property
    def _capacity(self) -> int:
        return self.config.build.max_seq_len

    def _allocated(self) -> torch.Tensor:
        if self._caches is None:
            raise BackendError("the engine has no KV cache yet: call allocate_kv (GenerationSession.setup) first")
        return self._caches
