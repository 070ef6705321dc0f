"""A model without weights: the next token's logits depend on the last token alone. For tests of everything else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trtllm_core.config import BuildConfig, EngineConfig, ModelConfig, Provider
from trtllm_core.plugin import Capabilities, Executable, TensorSpec
from trtllm_core.plugin.kv_policy import Edits, KVPlan
from trtllm_core.version import __version__


class MarkovExecutable(Executable):
    """Logits are rows of a fixed random table, so that a row's text never depends on its batch.

    It takes the tensors of the packed, paged contract, and checks that it is asked for sane ones.

    Args:
        vocab_size: tokens.
        seed: of the table.
        build: limits; None takes small ones.
        table: float32 ``[vocab_size, vocab_size]`` instead of a random one.
        remembers: the logits depend on all tokens of the text, each at its place, as they are found in the cache: a
            fork or a rewind that leaves a wrong block shows.
    """

    def __init__(
        self,
        vocab_size: int = 97,
        seed: int = 0,
        build: BuildConfig | None = None,
        table: torch.Tensor | None = None,
        remembers: bool = False,
    ) -> None:
        provider = Provider(name="markov", distribution="trtllm-core", version=__version__)
        self.config = EngineConfig(
            core_version=__version__,
            family=provider,
            backend=provider,
            contract="packed_paged",
            model=ModelConfig(
                family="markov",
                architecture="Markov",
                vocab_size=vocab_size,
                hidden_size=8,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_size=8,
                max_position_embeddings=4096,
            ),
            build=build or BuildConfig(max_batch_size=8, max_input_len=127, max_seq_len=128, tokens_per_block=8),
        )
        self.device = torch.device("cpu")
        self.capabilities = Capabilities(
            contract="packed_paged",
            dtypes=("float32",),
            multi_position=True,
            batch_invariant=True,
            hidden_states=True,
            kv=frozenset({"window", "moves", "attention_scores", "host"}),
        )
        self.tensors: tuple[TensorSpec, ...] = ()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab_size, vocab_size, generator=generator) * 3 if table is None else table
        self.states = torch.randn(vocab_size, self.config.model.hidden_size, generator=generator)
        """float32 ``[vocab_size, hidden_size]``: final hidden states, by what the logits depend on."""
        self.remembers = remembers
        self.calls = 0
        """How often it ran."""

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``: which token each cache entry holds is all there is."""
        assert plan.window is None or not self.remembers, "a ring forgets"
        self._plan = plan
        self._cache = torch.full((plan.num_blocks * plan.tokens_per_block,), -1, dtype=torch.int32)
        self._host = torch.full((plan.host_blocks, plan.tokens_per_block), -1, dtype=torch.int32)
        return self._cache.nbytes

    def edit_kv(self, edits: Edits) -> None:
        """See ``Executable``."""
        blocks = self._cache.view(-1, self._plan.tokens_per_block)
        for block, place in edits.saves:
            self._host[place] = blocks[block]
        if edits.copies:
            src, dst = (torch.tensor(side) for side in zip(*edits.copies, strict=True))
            blocks[dst] = blocks[src]
        for place, block in edits.loads:
            blocks[block] = self._host[place]

    def move_kv(self, source: np.ndarray, target: np.ndarray, layer: np.ndarray) -> None:
        """See ``Executable``. There is one layer."""
        self._cache[torch.from_numpy(target)] = self._cache[torch.from_numpy(source)]

    def attention_scores(self) -> list[np.ndarray]:
        """See ``Executable``: each token looks at all that it sees, and at large token ids most."""
        return self._looked

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``Executable``. The logits are those of the token *found in the cache*, so that a wrong block shows."""
        self.calls += 1
        self._looked: list[np.ndarray] = []
        size = self._plan.tokens_per_block
        start = 0
        last = torch.empty_like(inputs["input_ids"])
        rows = zip(
            inputs["query_lengths"].tolist(), inputs["past_lengths"].tolist(), inputs["block_tables"], strict=True
        )
        for length, past, table in rows:
            assert length > 0, "a row without tokens"
            position = torch.arange(past, past + length)
            follows = torch.equal(inputs["position_ids"][start : start + length], position)
            assert follows or self._plan.evicts, "positions follow the cache"
            place = torch.tensor([self._plan.cache_index(p) for p in range(past, past + length)])
            entries = table[place // size].long() * size + place % size
            assert (entries >= 0).all(), "a token without a block"
            ids = inputs["input_ids"][start : start + length]
            if self._plan.window is None:
                self._cache[entries] = ids
                found = self._states(table, past + length)[past:] if self.remembers else self._cache[entries]
                last[start : start + length] = found
            else:
                for i, entry in enumerate(entries.tolist()):  # a chunk may overwrite what it wrote itself
                    self._cache[entry] = ids[i]
                    last[start + i] = self._cache[entry]
            if self._plan.scores:
                self._looked.append(self._look(table, past, length))
            start += length
        if "hidden_states" in outputs:
            outputs["hidden_states"].copy_(self.states[last[inputs["hidden_indices"]].long()])
        outputs["logits"].copy_(self.table[last[inputs["logits_indices"]].long()])

    def _look(self, table: torch.Tensor, past: int, length: int) -> np.ndarray:
        place, size = torch.arange(past + length), self._plan.tokens_per_block
        ids = self._cache[table[place // size].long() * size + place % size] + 1.0
        seen = place <= torch.arange(past, past + length)[:, None]
        chances = (ids * seen) / (ids * seen).sum(1, keepdim=True)
        return chances.sum(0).view(1, 1, -1).numpy()

    def _states(self, table: torch.Tensor, length: int) -> torch.Tensor:
        position, size = torch.arange(length), self._plan.tokens_per_block
        return self.state_of(self._cache[table[position // size].long() * size + position % size])

    def state_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the table that hold the logits after each of ``tokens``, integers ``[..., n]``, if it remembers."""
        place = torch.arange(tokens.shape[-1]) * 7 + 3
        return ((tokens.long() + 1) * place).cumsum(-1) % len(self.table)

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return self.table.nbytes
