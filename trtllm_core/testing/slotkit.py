"""Checks that hold for everything that keeps state by slot: processors, criteria and decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_core.config import SamplingConfig
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.versions import CORE
from trtllm_core.testing.devicechecks import DeviceChecks
from trtllm_core.testing.generations import generate, new_runner
from trtllm_core.testing.kit import passed_over, require
from trtllm_core.testing.lives import G
from trtllm_core.testing.subject import Case


class SlotConformance(DeviceChecks[G]):
    """The life of a slot: begin, commit, fork, rewind, end, and begin again.

    Every check lives through random texts and compares what the plugin says of each slot with what a new object of it
    says that was told the same text from its beginning, one token at a time.
    """

    def test_asking_moves_no_state(self) -> None:
        """State moves in ``commit`` alone: a step that is asked twice is answered alike."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig, slots = life.rig, list(life.rig.branches)
            first = rig.answers(slots)
            self.same_answers(rig, rig.answers(slots), first, "asked a second time, it answers differently")
            for _ in range(3):
                rig.answers(slots)
                life.commit()
            self.same(rig, rig.replayed(), "asked more often than it was told tokens, it ends in another state")

    def test_rows_are_independent(self) -> None:
        """A row's answer depends neither on its place in the batch nor on who is beside it."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig, slots = life.rig, list(life.rig.branches)
            due = rig.answers(slots)
            self.same_answers(rig, rig.answers(slots[::-1]), due, "in another order of rows, it answers differently")
            shuffled = life.random.sample(slots, len(slots))
            self.same_answers(rig, rig.answers(shuffled), due, "in another order of rows, it answers differently")
            for part in (slots[:2], slots[2:], *([slot] for slot in slots)):
                self.same_answers(rig, rig.answers(part), due, "in a smaller batch, it answers differently")

    def test_commits_of_part_of_the_batch(self) -> None:
        """Slots that are not in a step, and rows of others in it, change nothing."""
        for seed in range(self.lives):
            life = self.life(seed)
            life.grow(4)
            self.same(life.rig, life.rig.replayed(), "after commits of some slots at a time, its state is another")

    def test_slots_are_used_again(self) -> None:
        """``begin`` writes all state of a slot: nothing of the branch before is left."""
        for seed in range(self.lives):
            life = self.life(seed)
            for _ in range(3):
                life.restart()
                self.same(life.rig, life.rig.replayed(), "in a slot that was used before, it answers differently")
                life.grow(2)
            self.same(life.rig, life.rig.replayed(), "in a slot that was used before, it answers differently")

    def test_forks_are_simultaneous(self) -> None:
        """Copies are made all at once: 0←1, 1←0 swaps two branches, and rings of three go round."""
        for seed in range(self.lives):
            life = self.life(seed)
            for event in (lambda life=life: life.cycle(2), lambda life=life: life.cycle(3), life.fork):
                life.grow(2)
                event()
                self.same(life.rig, life.rig.replayed(), "after a fork, it answers differently")

    def test_forks_are_independent(self) -> None:
        """What happens to a copy does not happen to what it was copied from."""
        for seed in range(self.lives):
            life = self.life(seed)
            life.rig.fork([(0, 1), (0, 2)])
            life.give({1: life.tokens(1)})
            life.give({1: life.tokens(1), 2: life.tokens(1)})
            self.same(life.rig, life.rig.replayed(), "after a copy went its own way, it answers differently")

    # -- speculation ---------------------------------------------------------------------------------------------

    def test_several_tokens_at_once(self) -> None:
        """A commit of several tokens is the same as several commits of one."""
        self.skip_unless_it_speculates()
        for seed in range(self.lives):
            life = self.life(seed, chunk=4)
            life.grow(4)
            self.same(life.rig, life.rig.replayed(), "after commits of several tokens, its state is another")

    def test_rewinds(self) -> None:
        """Tokens that were taken back leave nothing behind."""
        self.skip_unless_it_speculates()
        for seed in range(self.lives):
            life = self.life(seed, chunk=3)
            for _ in range(4):
                life.rewind()
                self.same(life.rig, life.rig.replayed(), "after a rewind, it answers differently")
                life.commit()
            self.same(life.rig, life.rig.replayed(), "after rewinds and commits, it answers differently")

    def test_everything_together(self) -> None:
        """Long lives of all events."""
        for seed in range(self.lives):
            chunk = 3 if self.speculates() else 1
            life = self.life(100 + seed, chunk)
            events = [life.commit, life.commit, life.fork, life.restart, *([life.rewind] if self.speculates() else [])]
            for _ in range(5):
                for _ in range(3):
                    life.random.choice(events)()
                after = "after commits, forks, rewinds and restarts, it answers differently"
                self.same(life.rig, life.rig.replayed(), after)

    # -- requests ------------------------------------------------------------------------------------------------

    def test_wrong_parameters_are_refused(self) -> None:
        """Each of ``wrong_params`` is refused before the first token, by a ``ConfigError``."""
        if not self.wrong_params:
            passed_over("no `wrong_params` are given")
        for params in self.wrong_params:
            require(self._refuses(params), f"it takes the parameters {dict(params)}")

    def seeded(self, case: Case, seed: int) -> SamplingConfig:
        """A request whose draws can be repeated."""
        return case.sampling.replace(random_seed=seed)

    def _refuses(self, params: Mapping[str, Any]) -> bool:
        subject = self.subject()
        try:
            request = subject.request(params, self.examples()[0].sampling, self.setting().end_ids)
            self.begins(Case(request, subject.planned(request).params, str(params)))
        except ConfigError:
            return True
        return False

    def test_who_does_not_ask_pays_nothing(self) -> None:
        """A request that asks for nothing does not have it in its plan, and no time is spent in it."""
        self.skip_unless_it_can_run()
        subject, idle = self.subject(), SamplingConfig(top_k=0, top_p=1.0, end_id=(), max_new_tokens=6)
        if subject.entry.source.distribution == CORE:
            passed_over("it is the core's: the defaults of SamplingConfig say who asks for it")
        runner = new_runner(self.setting())
        names = [item.name for item in runner.explain(idle).items]
        require(subject.name not in names, "it joins requests that did not ask for it: see its `consumes`")
        runner.generate([[1, 2]], self.cases()[0].sampling)
        before = runner.generation.loop.branches.plugin_seconds().get(subject.name)
        runner.generate([[1, 2], [3]], idle)
        after = runner.generation.loop.branches.plugin_seconds().get(subject.name)
        require(before == after, "time is spent in it though no request asks for it any more")

    def test_generation(self) -> None:
        """Whole requests, alone and together with others: the same tokens, and no error."""
        self.skip_unless_it_can_run()
        mine = [self.seeded(case, seed).replace(return_dict=True) for seed, case in enumerate(self.cases())][:3]
        other = SamplingConfig(top_k=0, top_p=1.0, random_seed=9, end_id=(), max_new_tokens=20, return_dict=True)
        prompts = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6]][: len(mine)]
        together = generate(self.setting(), [*prompts, [2]], [*mine, other])
        alone = [generate(self.setting(), [p], [s])[0] for p, s in zip(prompts, mine, strict=True)]
        for one, both, sampling in zip(alone, together, mine, strict=False):
            require(one == both, f"in a batch, a request gets {both}, and alone {one} ({sampling!r})")
        (idle,) = generate(self.setting(), [[2]], [other])
        require(idle == together[-1], "a request that did not ask for it gets other tokens beside one that did")
