"""Choosing tokens: each row by the decoder that its request asked for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from trtllm_core.decoding.choice import Choice, Outcome, Search
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.positions import Positions
from trtllm_core.decoding.samplers import log_probs
from trtllm_core.decoding.scoring import Likeliest, largest_of, likeliest, scored
from trtllm_core.decoding.searching import check_candidates, settle, with_searches
from trtllm_core.decoding.stages import Stage, Stages
from trtllm_core.decoding.stopping import Verdict
from trtllm_core.decoding.verifying import accept_equal, checked_tokens
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import (
    Candidates,
    Decoder,
    DecoderHost,
    DecodingContext,
    Hypothesis,
    LogitsBatch,
    Sampler,
    Selection,
)
from trtllm_core.plugin.decoder import DecoderCapabilities
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.plugin.views import BranchView

INTEGERS = (torch.int64, torch.int32)


class SamplingDecoder(Decoder):
    """A sampler as a decoder: branches that go on by themselves, one token a step."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.commit = sampler.commit  # type: ignore[method-assign]
        self.capabilities: DecoderCapabilities = sampler.capabilities  # type: ignore[misc]

    @property
    def graph_key(self) -> Hashable:
        """See ``SlotPlugin``, as all that follows."""
        return self.sampler.graph_key

    def setup(self, context: DecodingContext) -> None:
        self._ones = torch.ones(context.slots, dtype=torch.int64, device=context.device)
        self.sampler.setup(context)

    def begin(self, slot: int, view: BranchView) -> None:
        self.sampler.begin(slot, view)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.sampler.fork(src, dst)

    def rewind(self, slot: int, n: int) -> None:
        self.sampler.rewind(slot, n)

    def end(self, slot: int) -> None:
        self.sampler.end(slot)

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        """See ``Decoder``."""
        tokens = checked_tokens(self.sampler.sample(logits, batch), batch)
        if batch.starts is not None:
            return accept_equal(tokens, batch)
        return Selection(tokens.unsqueeze(1), self._ones[: len(tokens)])


class Choosers(Stages[Decoder]):
    """The decoders of a session. Nearly always there is one, and then nothing is merged."""

    def __init__(self, context: DecodingContext, host: DecoderHost) -> None:
        def wrap(plugin: SlotPlugin) -> Decoder:
            if isinstance(plugin, Sampler):
                return SamplingDecoder(plugin)
            assert isinstance(plugin, Decoder)
            plugin.host = host
            return plugin

        super().__init__(context, wrap)
        self._shown: dict[int, int] = {}  # slots whose requests see likely tokens beside the chosen, and how many

    def begin(self, items: Iterable[PlanItem], view: BranchView) -> None:
        """See ``Stages``."""
        if view.sampling.num_logprobs:
            self._shown[view.slot] = view.sampling.num_logprobs
        super().begin(items, view)

    def end(self, slots: Sequence[int]) -> list[dict[str, float]]:
        """See ``Stages``."""
        for slot in slots:
            self._shown.pop(slot, None)
        return super().end(slots)

    def select(self, logits: torch.Tensor, at: Positions) -> Choice:
        """Tokens for processed ``logits`` (float32 ``[n, vocab_size_padded]``, which may be overwritten).

        Branches whose decoder failed get no token.
        """
        alone, branch = len(self.live) == 1, at.branch
        parts: list[tuple[torch.Tensor, Selection]] = []
        searches: list[Search] = []
        for stage in self.live:
            if not alone and stage.members.isdisjoint(at.slots):
                continue
            seen = at.seen_by(stage.members)
            given = logits if seen is at else logits[at.starts]
            batch = seen.batch(self.context, stage.active(seen.slot))
            try:
                beside = self._likeliest(stage, given, seen) if self._shown else {}
                chosen = stage.call(
                    stage.plugin.select, logits.clone() if given is logits and not alone else given, batch
                )
                if isinstance(chosen, Candidates):
                    asked = [each for each in at.slots if each in stage.members]
                    slots_of = check_candidates(stage.name, chosen, branch, stage.members)
                    searches.append(Search(stage, chosen, slots_of, asked, beside))
                else:
                    active = batch.active if seen.starts is None else batch.active[seen.starts]
                    parts.append((active, _checked(stage.name, chosen, branch)))
            except PluginError as error:
                self.fail(stage, error)
        if not parts:
            nothing = torch.zeros_like(branch)
            selection = Selection(nothing.unsqueeze(1), nothing)
        else:
            selection = parts[0][1] if alone else _merge(parts, logits, at)
        choice = Choice(branch, at.slots, selection, source=at.source(selection.tokens.shape[1]))
        return with_searches(choice, searches, at) if searches else choice

    def settle(
        self, choice: Choice, verdict: Verdict, scores: torch.Tensor | None, owners: Mapping[int, LiveRequest]
    ) -> Outcome:
        """What is to be committed, now that it is known what stops: searches choose their survivors.

        Args:
            choice: the step's.
            verdict: of its rows.
            scores: the logits that were chosen from, float32 ``[n, vocab_size_padded]``; None: nobody asked for
                log-probabilities.
            owners: the requests by slot.
        """
        told, beside = (None, None) if scores is None else self._log_probs(choice, scores, owners)
        if not choice.searches:
            return Outcome(
                choice.slot,
                choice.slots,
                choice.selection.tokens,
                verdict.tokens,
                verdict.stops,
                verdict,
                told,
                scores=verdict.scores,
                likeliest=beside,
            )
        outcome, failed = settle(choice, verdict, told, beside, owners)
        for stage, error in failed:
            self.fail(stage, error)
        return outcome

    def finalize(self, live: LiveRequest) -> tuple[Hypothesis, ...]:
        """The sequences of a request that is over, best first, as its decoder ranks them.

        Raises:
            PluginError: the decoder raised, or returned something else.
        """
        stage = self._all[live.plan.decoder.key]
        ranked = stage.call(stage.plugin.finalize, live.request.request_id, tuple(live.hypotheses))
        right = isinstance(ranked, Sequence) and all(isinstance(one, Hypothesis) for one in ranked)
        if not right or not ranked:
            raise PluginContractError(f"decoder {stage.name!r} returned {ranked!r} from finalize, not hypotheses")
        return tuple(ranked[: live.plan.branching.returns])

    def _likeliest(self, stage: Stage[Decoder], logits: torch.Tensor, at: Positions) -> dict[int, Likeliest]:
        """By slot of a search what its request sees beside the tokens that continue the branch."""
        if type(stage.plugin).survive is Decoder.survive:
            return {}
        mine = [(i, slot) for i, slot in enumerate(at.slots) if slot in stage.members and slot in self._shown]
        if not mine:
            return {}
        rows = torch.tensor([i for i, _ in mine], device=logits.device)
        chances = stage.call(stage.plugin.log_probs, logits[rows if at.starts is None else at.starts[rows]])
        if not isinstance(chances, torch.Tensor) or chances.shape != (len(mine), logits.shape[1]):
            raise PluginContractError(f"decoder {stage.name!r} returned {_described(chances)} from log_probs")
        found = largest_of(chances, [self._shown[slot] for _, slot in mine])
        return dict(zip((slot for _, slot in mine), found, strict=True))

    @staticmethod
    def _log_probs(
        choice: Choice, scores: torch.Tensor, owners: Mapping[int, LiveRequest]
    ) -> tuple[list[list[float]], list[list[Likeliest]]]:
        """Of the rows that belong to no search: of each token, and of the likeliest beside it."""
        plain = len(choice.slots) - sum(len(search.slots) for search in choice.searches)
        tokens, given = choice.selection.tokens[:plain], choice.selection.log_probs
        samplings, width = [owners[slot].request.sampling for slot in choice.slots[:plain]], tokens.shape[1]
        if choice.source is None:
            told = scored(scores, tokens, samplings) if given is None else given
            return told.tolist(), [[one] for one in likeliest(scores, samplings)]
        # Each token has a row of logits of its own.
        scores = scores[choice.source[:plain].reshape(-1)]
        each = [sampling for sampling in samplings for _ in range(width)]
        told = scored(scores, tokens.reshape(-1, 1), each).view(tokens.shape) if given is None else given
        beside = likeliest(scores, each)
        return told.tolist(), [beside[row * width : (row + 1) * width] for row in range(plain)]


def _checked(name: str, selection: Selection, slot: torch.Tensor) -> Selection:
    if not isinstance(selection, Selection):
        raise PluginContractError(f"decoder {name!r} returned a {type(selection).__name__}, no Selection or Candidates")
    tokens, counts = selection.tokens, selection.counts
    for what, tensor, dtypes in (("tokens", tokens, INTEGERS), ("counts", counts, INTEGERS), *_chances(selection)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes or tensor.device != slot.device:
            raise PluginContractError(
                f"decoder {name!r} returned {_described(tensor)} as {what}, where {dtypes[0]} on {slot.device} is due"
            )
    wide = tokens.dim() == 2 and len(tokens) == len(slot) and tokens.shape[1] > 0
    if not wide or counts.shape != slot.shape:
        raise PluginContractError(
            f"decoder {name!r} returned tokens {list(tokens.shape)} and counts {list(counts.shape)} for "
            f"{len(slot)} rows"
        )
    if selection.log_probs is not None and selection.log_probs.shape != tokens.shape:
        raise PluginContractError(f"decoder {name!r} returned log_probs of another shape than its tokens")
    if tokens.dtype == counts.dtype == torch.int64:
        return selection
    return replace(selection, tokens=tokens.long(), counts=counts.long())


def _chances(selection: Selection) -> Sequence[tuple[str, object, tuple[torch.dtype, ...]]]:
    return () if selection.log_probs is None else (("log_probs", selection.log_probs, (torch.float32,)),)


def _described(thing: object) -> str:
    if not isinstance(thing, torch.Tensor):
        return f"a {type(thing).__name__}"
    return f"{thing.dtype} {list(thing.shape)} on {thing.device}"


def _merge(parts: Sequence[tuple[torch.Tensor, Selection]], logits: torch.Tensor, at: Positions) -> Selection:
    width = max(selection.tokens.shape[1] for _, selection in parts)
    tokens = parts[0][1].tokens.new_zeros(parts[0][1].tokens.shape[0], width)
    counts = torch.zeros_like(parts[0][1].counts)
    for active, selection in parts:
        padded = torch.nn.functional.pad(selection.tokens, (0, width - selection.tokens.shape[1]))
        tokens = torch.where(active[:, None], padded, tokens)
        counts = torch.where(active, selection.counts, counts)
    if all(selection.log_probs is None for _, selection in parts):
        return Selection(tokens, counts)
    # What a decoder says of its own tokens stands; for the others it is what the loop would have computed.
    chances = log_probs(logits, tokens, at.source(width))
    for active, selection in parts:
        if selection.log_probs is not None:
            given = torch.nn.functional.pad(selection.log_probs, (0, width - selection.log_probs.shape[1]))
            chances = torch.where(active[:, None], given, chances)
    return Selection(tokens, counts, chances)
