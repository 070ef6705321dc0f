"""What decoders must do that own branches. They are examined in whole requests: their answers say what forks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.outputs import GenerationOutput
from trtllm_core.plugin import BranchPlan, BranchView, Candidates, Decoder, LogitsBatch, Selection
from trtllm_core.testing.generations import generate, new_runner, sequences
from trtllm_core.testing.kit import passed_over, require
from trtllm_core.testing.lives import G
from trtllm_core.testing.slotkit import SlotConformance

PROMPTS = ([1, 2, 3, 1, 2], [4], [5, 6, 5, 6])


class SearchChecks(SlotConformance[G]):
    """The part of ``DecoderConformance`` that is about decoders; samplers pass it over."""

    def searches(self) -> bool:
        """Whether it owns branches."""
        return isinstance(self.subject().make(), Decoder)

    def _requests(self) -> list[SamplingConfig]:
        self.skip_unless_it_can_run()
        if not self.searches():
            passed_over("it is a sampler, and owns no branches")
        return [self.seeded(case, seed).replace(return_dict=True) for seed, case in enumerate(self.cases())][:3]

    def test_plan(self) -> None:
        """``plan`` says the same each time, before ``setup`` too, and its numbers fit together."""
        self._requests()
        for case in self.cases():
            view = BranchView("0", 0, -1, (1, 2), case.sampling, self.setting().end_ids, 0, case.params)
            decoder: Decoder = self.setting().subject.make()
            plans = [decoder.plan(view), decoder.plan(view), self.setting().subject.make().plan(view)]
            require(all(plan == plans[0] for plan in plans), f"plan says {plans[0]}, and another time {plans[1:]}")
            plan = plans[0]
            require(isinstance(plan, BranchPlan), f"plan returned a {type(plan).__name__}, no BranchPlan")
            most = max(plan.branches, plan.max_branches)
            require(plan.branches >= 1 and plan.returns >= 1, f"its plan starts or returns nothing: {plan}")
            require(plan.max_positions >= 1 and most >= 1, f"its plan has no room: {plan}")

    def test_choosing_moves_no_state(self) -> None:
        """``select`` and ``survive`` are pure: asked twice, they answer alike."""
        self._watched(lambda decoder, _: asked_twice(decoder))

    def test_candidates_can_be_chosen(self) -> None:
        """No token is outside the vocabulary, or forbidden by a processor."""
        self._watched(only_possible)

    def _watched(self, watch: Callable[[Decoder, int], Any]) -> None:
        requests, vocab = self._requests(), self.setting().vocab_size
        runner = new_runner(self.setting())
        banned = [request.replace(bad_words_list=[[2], [5]]) for request in requests]
        decoder = runner.explain(requests[0]).decoder.plugin
        assert isinstance(decoder, Decoder)
        with watch(decoder, vocab):
            for asked in (requests, banned):
                for output in runner.generate(list(PROMPTS[: len(asked)]), asked)["outputs"]:
                    if isinstance(output.error, Exception) and isinstance(output.error.__cause__, AssertionError):
                        raise output.error.__cause__
                    require(output.error is None, f"in a session it fails: {output.error}")

    def test_sequences(self) -> None:
        """A request gets as many sequences as its plan says, best first, each of the vocabulary."""
        requests = self._requests()
        runner = new_runner(self.setting())
        outputs = runner.generate(list(PROMPTS[: len(requests)]), requests)["outputs"]
        for request, found in zip(requests, sequences(outputs, len(requests)), strict=True):
            require(found[0].error is None, f"in a session it fails: {found[0].error}")
            due = runner.explain(request).branching.returns
            require(len(found) == due, f"its plan returns {due} sequences, and the user gets {len(found)}")
            self._check(found)

    def _check(self, found: list[GenerationOutput]) -> None:
        scores = [one.score for one in found]
        require(scores == sorted(scores, reverse=True), f"its sequences do not come best first: scores {scores}")
        for one in found:
            wrong = [token for token in one.tokens if not 0 <= token < self.setting().vocab_size]
            require(one.tokens and not wrong, f"a sequence has the tokens {list(one.tokens)}")

    def test_beside_penalties_and_stops(self) -> None:
        """With penalties, stop words and a shortest length, requests get the same alone and together."""
        changes = {"repetition_penalty": 1.4, "stop_words_list": [[1, 2], [3]], "min_length": 3}
        requests = [request.replace(**changes) for request in self._requests()]
        prompts = list(PROMPTS[: len(requests)])
        together = generate(self.setting(), prompts, requests)
        for prompt, request, both in zip(prompts, requests, together, strict=True):
            (alone,) = generate(self.setting(), [prompt], [request])
            require(alone == both, f"with penalties and stops, a request gets {both} in a batch, and alone {alone}")


@contextmanager
def replaced(decoder: Decoder, **methods: Any) -> Iterator[None]:
    """The decoder has these methods for a while."""
    for name, method in methods.items():
        setattr(decoder, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(decoder, name)


def asked_twice(decoder: Decoder) -> Any:
    """Every question is asked twice."""
    select, survive = decoder.select, decoder.survive

    def select_twice(logits: torch.Tensor, batch: LogitsBatch) -> Selection | Candidates:
        first, second = select(logits.clone(), batch), select(logits, batch)
        for one in fields(first):
            a, b = getattr(first, one.name), getattr(second, one.name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            require(same, f"asked a second time, select answers with other {one.name}")
        return second

    def survive_twice(candidates: Candidates, stops: Any) -> Any:
        first, second = survive(candidates, stops), survive(candidates, stops)
        require(first == second, f"asked a second time, survive says {second}, not {first}")
        return second

    return replaced(decoder, select=select_twice, survive=survive_twice)


def only_possible(decoder: Decoder, vocab: int) -> Any:
    """Tokens are looked at before the core does."""
    select = decoder.select

    def select_possible(logits: torch.Tensor, batch: LogitsBatch) -> Selection | Candidates:
        raw = logits.clone()
        chosen = select(logits, batch)
        place = {slot: row for row, slot in enumerate(batch.slot.tolist())}
        if isinstance(chosen, Candidates):
            pairs = zip([place[slot] for slot in chosen.slot.tolist()], chosen.tokens.tolist(), strict=True)
        else:
            rows = batch.active.nonzero().flatten().tolist()
            if batch.draft is not None:  # rows are positions there, several of them for each branch
                return chosen
            pairs = zip(rows, chosen.tokens[rows, 0].tolist(), strict=True)
        for row, token in pairs:
            require(0 <= token < vocab, f"it takes token {token}, outside the vocabulary of {vocab}")
            require(float(raw[row, token]) > -torch.inf, f"it takes token {token}, which is forbidden")
        return chosen

    return replaced(decoder, select=select_possible)
