"""A torch engine, loaded on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch, host, is_all
from trtllm_core.backends.torch.cpu.attention import DecodeAttention
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.layers import weight_bytes
from trtllm_core.backends.torch.cpu.steps import StepPrograms
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.invariant import InvariantContext
from trtllm_core.backends.torch.lora import LoraBank
from trtllm_core.backends.torch.plain import PlainContext
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.backends.torch.watching import LayerWatch
from trtllm_core.config import EngineConfig
from trtllm_core.errors import BackendError
from trtllm_core.nn import Attention, VocabParallelEmbedding
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Capabilities, Executable, LowRank, TensorSpec
from trtllm_core.plugin.kv_policy import Edits, KVPlan

if TYPE_CHECKING:
    from trtllm_core.backends.torch.cuda.graphs import StepGraphs

T = TypeVar("T")

_ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def tensor_specs(config: EngineConfig) -> tuple[TensorSpec, ...]:
    """Inputs and outputs of the packed, paged contract."""
    build = config.build
    blocks = -(-build.max_seq_len // build.tokens_per_block)
    tokens, rows, asked = build.max_num_tokens, build.max_branches, build.max_num_tokens

    def vector(name: str, dtype: str, symbol: str, most: int) -> TensorSpec:
        return TensorSpec(name, dtype, (symbol,), True, (1,), (most,))

    more = []
    if build.max_lora_rank:
        more.append(replace(vector("lora_ids", "int32", "rows", rows), optional=True))
    if build.max_prompt_embedding_table_size:
        hidden = config.model.hidden_size
        table = TensorSpec(
            "virtual_embeddings", config.model.dtype, ("virtual", hidden), True, (1, hidden), (tokens, hidden), True
        )
        more += [replace(vector("virtual_tokens", "int64", "virtual", tokens), optional=True), table]
    return (
        vector("input_ids", "int32", "tokens", tokens),
        vector("position_ids", "int64", "tokens", tokens),
        vector("query_lengths", "int32", "rows", rows),
        vector("past_lengths", "int32", "rows", rows),
        TensorSpec("block_tables", "int32", ("rows", "blocks"), True, (1, 1), (rows, blocks)),
        vector("logits_indices", "int64", "asked", asked),
        *more,
        replace(vector("hidden_indices", "int64", "wanted", tokens), optional=True),
        TensorSpec("logits", "float32", ("asked", config.vocab_size_padded), False),
        TensorSpec("hidden_states", "float32", ("wanted", config.model.hidden_size), False, optional=True),
    )


class TorchExecutable(Executable):
    """Runs a family's module over packed rows and a paged pool.

    Inputs: ``input_ids`` and ``position_ids`` ``[tokens]``, the rows' tokens one after another; ``query_lengths`` and
    ``past_lengths`` ``[rows]``, tokens of this call and tokens cached before it; ``block_tables [rows, blocks]``;
    ``logits_indices [asked]``, the tokens whose logits are wanted. Output: ``logits [asked, vocab_size_padded]``.
    The output ``hidden_states [wanted, hidden_size]``, where it is given, gets what logits are made of, for the tokens
    ``hidden_indices [wanted]``.
    Engines built for adapters take ``lora_ids [rows]``, the index of each row's adapter, -1 for none. Engines built for
    prompt tables take ``virtual_embeddings [virtual, hidden_size]``, what stands in place of the embeddings of the
    tokens ``virtual_tokens [virtual]``, whose ids may be any of the vocabulary.
    """

    def __init__(
        self,
        config: EngineConfig,
        module: nn.Module,
        device: torch.device,
        batch_invariant: bool = False,
        parallel: TensorParallel | None = None,
        lora: LoraBank | None = None,
        native: Kernels | None = None,
        cuda_graphs: bool = False,
        switch: Switch | None = None,
    ) -> None:
        self.config = config
        self.module: Any = module
        self.device = device
        self.tensors = tensor_specs(config)
        self.capabilities = Capabilities(
            contract="packed_paged",
            dtypes=("float32", "bfloat16", "float16"),
            multi_position=True,
            cuda_graphs=cuda_graphs,
            hidden_states=True,
            batch_invariant=batch_invariant,
            kv=_offered(module, batch_invariant or (parallel is not None and parallel.size > 1)),
            attention_window=_attention_window(module),
            lora=lora is not None,
            prompt_tables=config.build.max_prompt_embedding_table_size > 0,
        )
        self._virtual: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.capabilities.prompt_tables:
            for layer in module.modules():
                if isinstance(layer, VocabParallelEmbedding):
                    layer.replace = self._replace
        self._lora = lora
        self._native = None if native is None else DecodeAttention(native)
        self._context: Callable[[PackedBatch, KVPool, torch.Tensor], PagedContext] = PagedContext
        self._scores: list[list[torch.Tensor]] = []
        self._pool: KVPool | None = None
        self._graphs: StepGraphs | StepPrograms | None = None
        self._fused_from = 0  # tokens of a call without a graph
        self._watch: LayerWatch | None = None
        self._switch = switch or Switch()
        self._parallel = parallel or TensorParallel()

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``."""
        if plan.scores and plan.window is not None:
            raise BackendError("the torch backend keeps no attention scores of cyclic caches: their entries change")
        self._pool = self._graphs = None  # so that the old pool is gone before the new one is there
        self._pool = KVPool(plan, getattr(torch, self.config.model.dtype), self.device)
        if self.capabilities.batch_invariant:
            self._context = InvariantContext
        elif plan.scores or plan.positions == "cache":
            self._context = PlainContext
        else:
            self._context = PagedContext if self._native is None else self._native.context
        if self.capabilities.cuda_graphs and self._context is PagedContext and plan.window is None:
            from trtllm_core.backends.torch.cuda.context import FUSED_FROM, MixedContext
            from trtllm_core.backends.torch.cuda.graphs import StepGraphs

            self._context, self._fused_from = MixedContext, FUSED_FROM
            rows, tokens = self.config.build.max_branches, self.config.build.max_num_tokens
            self._graphs = StepGraphs(self.module, self._pool, rows, tokens, self.device, self._switch)
        if self._native is not None and self._context == self._native.context and self._can_record(self._pool):
            self._graphs = StepPrograms(self.module, self._pool, self._native)
        return self._pool.bytes

    @property
    def kv_plan(self) -> KVPlan | None:
        """Of the KV cache that there is."""
        return None if self._pool is None else self._pool.plan

    def _can_record(self, pool: KVPool) -> bool:
        """Whether nothing happens in a CPU's decode step beside what its operations do."""
        return pool.plan.window is None and self._lora is None and self._parallel.size == 1

    def edit_kv(self, edits: Edits) -> None:
        """See ``Executable``."""
        self._require_pool().edit(edits)

    def move_kv(self, source: np.ndarray, target: np.ndarray, layer: np.ndarray) -> None:
        """See ``Executable``."""
        sides = (torch.from_numpy(side).to(self.device) for side in (source, target, layer))
        self._require_pool().move(*sides)

    def attention_scores(self) -> list[np.ndarray]:
        """See ``Executable``."""
        return [np.stack([host(scores) for scores in row]) for row in self._scores]

    @torch.inference_mode()
    def put_adapter(self, index: int, adapter: Mapping[str, Sequence[LowRank]]) -> None:
        """See ``Executable``."""
        if self._lora is None:
            raise BackendError("the engine was not built for LoRA adapters: build it with max_lora_rank")
        self._lora.put(index, adapter)

    @torch.inference_mode()
    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``Executable``. Lengths and tables are read on the host: they are best given as CPU tensors.

        With ``capabilities.cuda_graphs``, a step of one token a row, or of one short prompt, replays a captured graph;
        on a CPU with kernels of its own, a step of one token for a few rows runs a recorded program. Not so where it
        has adapters, a prompt table, a cache that is a ring or keeps scores, or is asked for hidden states.
        """
        pool = self._require_pool()
        states = outputs.get("hidden_states")
        self._virtual = None
        if self._watch is not None and not self.debugging:
            self._watch.end()  # before a graph or a program is made of the copies too
            self._watch = None
        graphs = None if self._graphs is None or self.debugging or states is not None else self._graphs.find(inputs)
        if graphs is not None:
            if self._lora is not None:
                self._lora.begin(None, host(inputs["query_lengths"]))
            graphs.run(inputs, outputs["logits"])
            return
        if self.debugging and self._watch is None:
            self._watch = LayerWatch(self.module)
        batch = PackedBatch(inputs, pool.plan, self.device)
        positions = inputs["position_ids"].to(self.device, non_blocking=True)
        context = self._context(batch, pool, positions)
        if self._lora is not None:
            ids = inputs.get("lora_ids")
            self._lora.begin(None if ids is None else host(ids), host(inputs["query_lengths"]))
        if self.capabilities.prompt_tables:
            self._virtual = self._virtual_of(inputs)
        with self._attentions(), self._kernels(inputs["input_ids"].shape[0]):
            hidden = self.module(inputs["input_ids"].to(self.device, non_blocking=True), context)
        if self._watch is not None:
            self._watch.found["hidden"] = hidden
        if isinstance(context, PlainContext):
            self._scores = context.scores
        if states is not None:
            states.copy_(hidden[inputs["hidden_indices"].to(self.device, non_blocking=True)])
        asked = inputs["logits_indices"]
        if not is_all(asked, hidden.shape[0]):
            hidden = hidden[asked.to(self.device, non_blocking=True)]
        if asked.shape[0]:
            outputs["logits"].copy_(self.module.logits(hidden))

    def _attentions(self) -> AbstractContextManager[None]:
        """What PyTorch may compute attention with. cuDNN's, which it prefers on new GPUs, makes a plan for each shape
        it has not seen, for tens of milliseconds; here every prompt has a shape of its own."""
        return sdpa_kernel(_ATTENTIONS) if self.device.type == "cuda" else nullcontext()

    def _kernels(self, tokens: int) -> AbstractContextManager[None]:
        """What a call without a graph is computed with: of many tokens, the kernels that graphs use."""
        return self._switch.turned_on() if self._graphs is not None and tokens >= self._fused_from else nullcontext()

    def debug_tensors(self) -> Mapping[str, torch.Tensor]:
        """See ``Executable``: ``hidden [tokens, hidden_size]`` and what each layer gave, ``layers.{i}``."""
        return {} if self._watch is None else self._watch.found

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return weight_bytes(self.module)

    def broadcast(self, value: T) -> T:
        """See ``Executable``."""
        return self._parallel.broadcast_object(value)  # type: ignore[no-any-return]

    def _virtual_of(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        tokens = inputs.get("virtual_tokens")
        if tokens is None:
            return None
        rows = inputs["virtual_embeddings"].to(self.device, getattr(torch, self.config.model.dtype), non_blocking=True)
        return tokens.to(self.device, non_blocking=True), rows

    def _replace(self, rows: torch.Tensor) -> None:
        """See ``VocabParallelEmbedding``."""
        if self._virtual is not None:
            rows.index_copy_(0, *self._virtual)

    def _require_pool(self) -> KVPool:
        if self._pool is None:
            raise BackendError("the engine has no KV cache yet: call allocate_kv (GenerationSession.setup) first")
        return self._pool


def _attentions(module: nn.Module) -> list[Attention]:
    return [layer for layer in module.modules() if isinstance(layer, Attention)]


def _offered(module: nn.Module, sums_only: bool) -> frozenset[str]:
    """See ``Capabilities.kv``; ``sums_only``: the whole model's probabilities are not in one place, or nowhere."""
    layers = _attentions(module)
    offered = {"window", "host"}
    if all(layer.sliding_window is None and layer.alibi is None for layer in layers):
        offered.add("moves")  # else what a token sees depends on where its neighbours were
    # Angles that grow with the length belong to the token's own number, and so do learned positions.
    turned = (layer.rotary is not None and layer.rotary.scaling.kind != "dynamic" for layer in layers)
    if all(rotary or layer.alibi is not None for rotary, layer in zip(turned, layers, strict=True)):
        offered.add("positions")
    return frozenset(offered if sums_only else offered | {"attention_scores"})


def _attention_window(module: nn.Module) -> int | None:
    """See ``Capabilities.attention_window``."""
    windows = [layer.sliding_window for layer in _attentions(module)]
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None
