"""Decoding without an engine: tokens chosen from logits that come from anywhere, by the plans that sessions run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trtllm_core.assembling import make_loop
from trtllm_core.checkpoint import Tokenizer
from trtllm_core.config import BuildConfig, EngineConfig, KVCacheConfig, ModelConfig, Provider, SamplingConfig
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import (
    Capabilities,
    Executable,
    Hypothesis,
    LogitsProcessor,
    Plugins,
    StoppingCriterion,
    TensorSpec,
)
from trtllm_core.plugin.kv_policy import Edits, KVPlan
from trtllm_core.session import Session
from trtllm_core.version import __version__


@dataclass(frozen=True, slots=True)
class Rows:
    """What asks for logits: one row for each sequence that goes on, those of a prompt together."""

    tokens: torch.Tensor
    """int64 ``[rows]``, on the device: the last token of each, which a model would run next."""
    parents: torch.Tensor
    """int64 ``[rows]``: the row of the step before that each continues, whose cache it goes on with. Of the first rows,
    their own places."""
    prompts: Sequence[int]
    """The place of each one's prompt in the batch."""
    branches: Sequence[int]
    """The number of each within its prompt: of the beam, or of the answer."""

    def __len__(self) -> int:
        return len(self.prompts)


class StandaloneDecoder:
    """Chooses tokens for a batch, step by step, from logits that the caller brings.

    Everything that a session honours is honoured, by the same objects: samplers and searches, processors, criteria,
    log-probabilities. What needs an engine is refused by name: drafts, hidden states, companions.

    Args:
        vocab_size: tokens; wider logits are cut.
        max_batch_size: prompts.
        max_beam_width: sequences of a prompt.
        max_seq_len: prompt and generated tokens of a sequence.
        device: where logits are.
        tokenizer: for text: stop strings, regexes, ``Hypothesis.text``.
        end_ids: tokens that end a sequence where its SamplingConfig names none; None takes the tokenizer's.
        plugins: where everything is looked up; None loads what is installed.
        debug_mode: checks shapes, dtypes and NaN after every plugin.
        clock: seconds since some moment, for time limits.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_batch_size: int = 8,
        max_beam_width: int = 1,
        max_seq_len: int = 2048,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
        end_ids: Sequence[int] | None = None,
        plugins: Plugins | None = None,
        debug_mode: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        build = BuildConfig(
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_input_len=max_seq_len - 1,
            max_seq_len=max_seq_len,
            max_num_tokens=max_batch_size * max_seq_len,
        )
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._engine = GivenLogits(vocab_size, build, self.device)
        session = Session.from_engine(self._engine)
        plugins = plugins or Plugins.load()
        self._loop = make_loop(session, plugins, KVCacheConfig(), tokenizer, end_ids, debug_mode, clock, False)
        self._loop.branches.planner.offers -= {"companions"}  # their logits nobody gives
        self._text = tokenizer is not None
        self._live: list[LiveRequest] = []
        self._rows: list[Branch] = []

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriterion] = (),
    ) -> Rows:
        """Begin a batch: one row for each prompt. What was decoded before is given up.

        Args:
            prompts: token ids, at least one each.
            sampling: of all prompts, or one for each.
            logits_processors, stopping_criteria: objects for all of them, beside those that ``sampling`` names.

        Raises:
            CapacityError: more or longer sequences than the decoder was made for.
            ConfigError, PluginError: a plan cannot be made, or needs an engine; then nothing begins.
        """
        self.cancel()
        configs = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
        if len(configs) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts need one SamplingConfig or {len(prompts)}, not {len(configs)}")
        objects = tuple(logits_processors), tuple(stopping_criteria)
        try:
            for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
                self._live.append(self._admitted(Request(str(i), tuple(prompt), config, *objects, text=self._text)))
        except Exception:
            self.cancel()
            raise
        self._rows = [branch for live in self._live for branch in live.running]
        return self._shown(range(len(self._rows)))

    def _admitted(self, request: Request) -> LiveRequest:
        build, longest = self._engine.config.build, len(request.prompt) + request.sampling.max_new_tokens
        vocab = self.vocab_size
        if not request.prompt or not all(0 <= token < vocab for token in request.prompt):
            raise ConfigError(f"prompt {request.request_id} must have tokens, all of them below {vocab}")
        if longest > build.max_seq_len:
            raise CapacityError(
                f"prompt {request.request_id} and its max_new_tokens are {longest} tokens; the decoder was made for "
                f"{build.max_seq_len}"
            )
        live = self._loop.admit(request)
        if live is None:
            raise CapacityError(
                f"the batch has more sequences than the {build.max_branches} that the decoder was made for"
            )
        if live.error is not None:
            self._loop.end(live, "plugin_error")
        return live

    def step(self, logits: torch.Tensor) -> Rows:
        """Choose the next token of each row; the rows that go on come back.

        Args:
            logits: ``[rows, vocab_size]`` of any floating dtype, one row for each of the last ``Rows``; left as it is.

        Raises:
            ConfigError: another shape, or nothing has begun.
        """
        before = self._rows
        if not before or logits.dim() != 2 or logits.shape[0] != len(before) or logits.shape[1] < self.vocab_size:
            raise ConfigError(f"logits {list(logits.shape)} are not [{len(before)}, {self.vocab_size}]")
        self._engine.logits = logits[:, : self.vocab_size].to(self.device, torch.float32)
        slots = [branch.slot for branch in before]
        known, cached = self._loop.branches.slots.lengths, self._loop.cache.cached
        # A search moves branches to other slots, as new objects: then the text says which one was before.
        place = {branch: row for row, branch in enumerate(before)}
        texts = {(branch.owner, tuple(branch.generated)): row for row, branch in enumerate(before) if _moves(branch)}
        self._loop.step(slots, [int(known[slot] - cached[slot]) for slot in slots])
        self._rows = [branch for live in self._live if not live.over for branch in live.running]
        parents = []
        for branch in self._rows:
            row = place.get(branch)
            parents.append(texts[branch.owner, tuple(branch.generated[:-1])] if row is None else row)
        return self._shown(parents)

    @property
    def over(self) -> bool:
        """Whether nothing asks for logits any more."""
        return not self._rows

    @property
    def errors(self) -> list[Exception | None]:
        """What ended each prompt's sequences with ``plugin_error``."""
        return [live.error for live in self._live]

    def sequences(self, prompt: int) -> Mapping[int, Hypothesis]:
        """The sequences of a prompt: what it returns, best first, where it is over; else its branches, by number."""
        live = self._live[prompt]
        if live.over:
            return live.standing()
        ended = {} if live.plan.ranked else {one.branch: one for one in live.hypotheses}
        return ended | {branch.number: branch.hypothesis("") for branch in live.running}

    def cancel(self) -> None:
        """Give up what is not over, and forget the batch."""
        for live in self._live:
            if not live.over:
                self._loop.end(live, "cancelled")
        self._live, self._rows = [], []

    def _shown(self, parents: Sequence[int]) -> Rows:
        tokens = [branch.generated[-1] if branch.generated else branch.request.prompt[-1] for branch in self._rows]
        place = {live: i for i, live in enumerate(self._live)}
        return Rows(
            torch.tensor(tokens, dtype=torch.int64, device=self.device),
            torch.tensor(list(parents), dtype=torch.int64, device=self.device),
            [place[branch.owner] for branch in self._rows],
            [branch.number for branch in self._rows],
        )


def _moves(branch: Branch) -> bool:
    """Whether what continues a branch may be another object: in a search, and where one prompt has several answers."""
    plan = branch.owner.plan
    return plan.ranked or (not branch.generated and plan.branching.max_branches > 1)


class GivenLogits(Executable):
    """An engine that computes nothing: its logits are what it was given."""

    def __init__(self, vocab_size: int, build: BuildConfig, device: torch.device) -> None:
        nobody = Provider(name="given", distribution="trtllm-core", version=__version__)
        model = ModelConfig(
            family="given",
            architecture="given",
            vocab_size=vocab_size,
            hidden_size=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=1,
            max_position_embeddings=build.max_seq_len,
        )
        self.config = EngineConfig(
            core_version=__version__,
            family=nobody,
            backend=nobody,
            contract="packed_paged",
            model=model,
            build=build,
        )
        self.device = device
        self.capabilities = Capabilities(contract="packed_paged", dtypes=("float32",), batch_invariant=True)
        self.tensors: tuple[TensorSpec, ...] = ()
        self.logits: torch.Tensor
        """float32 ``[rows, vocab_size]``, in the order of the step's rows."""

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``: there is no cache."""
        return 0

    def edit_kv(self, edits: Edits) -> None:
        """See ``Executable``."""

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``Executable``."""
        outputs["logits"].copy_(self.logits)

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return 0
