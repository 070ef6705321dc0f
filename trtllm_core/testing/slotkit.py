"""Checks that hold for everything that keeps state by slot: processors, criteria and decoders."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Generic

import torch

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.config import SamplingConfig
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import Example
from trtllm_core.plugin.versions import CORE
from trtllm_core.testing.generations import generate, new_runner
from trtllm_core.testing.kit import Conformance, cuda, need_gpu, passed_over, require
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.lives import G, Life, Rig, Setting
from trtllm_core.testing.subject import Case, Kind, Subject, resolve
from trtllm_core.testing.watch import HostWait, Operation, no_waiting, operations

END_IDS = (9,)
"""Of the tokenizer that kits make themselves; random texts hold it."""


class SlotConformance(Conformance, Generic[G]):
    """The life of a slot: begin, commit, fork, rewind, end, and begin again.

    Every check lives through random texts and compares what the plugin says of each slot with what a new object of it
    says that was told the same text from its beginning, one token at a time.
    """

    params: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Parameters to try. Where neither these nor ``sampling`` are given, the plugin's own ``examples`` are tried."""
    sampling: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Fields of SamplingConfig to try, each with each of ``params``."""
    vocab_size: ClassVar[int] = 40
    """Of the model that is tried. Random texts are mostly of its first tokens."""
    tokenizer: ClassVar[Tokenizer | None] = None
    """Of the model that is tried; None makes one of ``vocab_size`` tokens that are words of letters."""
    lives: ClassVar[int] = 4
    """How many random lives each check tries."""

    offers: ClassVar[frozenset[str]] = frozenset({"text"})
    """What a plugin may need, and is given."""
    kind: ClassVar[Kind]
    rig: type[G]
    _subject: ClassVar[Subject]
    _refusal: ClassVar[str]

    @classmethod
    def subject(cls) -> Subject:
        """What is examined, found once for each kit."""
        if "_subject" not in vars(cls):
            cls._subject = resolve(cls.kind, cls.given(), cls.name)
        return cls._subject

    @classmethod
    def cases(cls) -> list[Case]:
        """The requests to try."""
        subject, ends = cls.subject(), cls.setting().end_ids
        return [subject.case(each.params, each.sampling, ends) for each in cls.examples()]

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """How to ask for it."""
        if cls.params or cls.sampling:
            return [Example(one, other) for one in cls.params or ({},) for other in cls.sampling or ({},)]
        return cls.subject().make().examples or (Example(),)

    @classmethod
    def setting(cls, device: str = "cpu") -> Setting:
        """What rigs are made for."""
        tokenizer = cls.tokenizer or letter_tokenizer(cls.vocab_size, END_IDS)
        return Setting(cls.subject(), cls.vocab_size, tokenizer, device)

    def life(self, seed: int, chunk: int = 1, device: str = "cpu") -> Life[G]:
        """A new plugin, whose slots have lived a little."""
        self.skip_unless_it_can_run()
        life = Life(self.rig(self.setting(device)), self.cases(), chunk, seed)
        life.grow(3)
        return life

    def skip_unless_it_can_run(self) -> None:
        """What a plugin needs beside tokens and text is not here."""
        capabilities = self.subject().make().capabilities
        missing = capabilities.needs - self.offers
        if missing:
            passed_over(f"it needs {', '.join(sorted(missing))}, which this kit cannot give it")
        if why := self.refusal():
            passed_over(f"it cannot be asked for like this: {why}")

    @classmethod
    def refusal(cls) -> str:
        """Why the requests to try are refused; empty where they are not. Found once for each kit."""
        if "_refusal" not in vars(cls):
            try:
                for case in cls.cases():
                    cls.begins(case)
                cls._refusal = ""
            except ConfigError as error:
                cls._refusal = str(error)
        return cls._refusal

    def speculates(self) -> bool:
        """Whether it says that it can take part in verify steps, and give tokens back."""
        return getattr(self.subject().make().capabilities, "speculation", "rewind") != "none"

    def skip_unless_it_speculates(self) -> None:
        """Nothing of the sort is promised."""
        if not self.speculates():
            passed_over('it declares speculation="none": requests that use it verify no drafts')

    def on_device(self) -> bool:
        """Whether it works on tensors of all rows at once."""
        return True

    def same(self, rig: Rig[Any], other: Rig[Any], after: str) -> None:
        """Both must answer alike for all live slots."""
        self.same_answers(rig, rig.answers(list(rig.branches)), other.answers(list(rig.branches)), after)

    def same_answers(self, rig: Rig[Any], found: Mapping[int, Any], due: Mapping[int, Any], after: str) -> None:
        """The answers must be those that are due."""
        for slot, answer in found.items():
            difference = rig.difference(answer, due[slot])
            branch = rig.branches[slot]
            text = f"text {list(branch.prompt)} + {list(branch.generated)}"
            require(not difference, f"{after}: {difference} (slot {slot}, {branch.case}, {text})")

    @classmethod
    def begins(cls, case: Case) -> None:
        """A request begins.

        Raises:
            ConfigError: the plugin refuses it.
        """
        Life(cls.rig(cls.setting()), [case])

    def test_it_can_be_asked_for(self) -> None:
        """A request with these parameters and fields is planned, and begins."""
        why = self.refusal()
        if why and not self.params and self.subject().takes_objects():
            passed_over(f"its parameters are no JSON, give them by `params`: {why}")
        require(not why, f"it refuses the requests to try: {why}; give other `params` or `sampling`")

    # -- state ---------------------------------------------------------------------------------------------------

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

    # -- the device ----------------------------------------------------------------------------------------------

    def ask_all(self, life: Life[G]) -> None:
        """All that the loop does between two ``begin``."""
        rig = life.rig
        rig.answers(list(rig.branches))

    def test_the_host_never_waits(self) -> None:
        """Device code brings no value to the host, and has no shape that depends on data."""
        if not self.on_device():
            passed_over("it is a host plugin")
        life = self.life(0)
        life.rig.watch = lambda _: no_waiting()
        try:
            self.ask_all(life)
            life.rig.commit({slot: life.tokens(1) for slot in life.rig.branches})
            life.rig.fork([(0, 1), (1, 0)])
            if self.speculates():
                life.rig.rewind(0, 1)
        except HostWait as wait:
            raise AssertionError(f"it is a device plugin, but {wait}") from wait

    def test_shapes_are_fixed(self) -> None:
        """What may be captured in a CUDA graph runs the same operations on the same shapes, whatever the data."""
        capabilities = self.subject().make().capabilities
        if not capabilities.graph_safe or not self.on_device():
            passed_over("it does not declare graph_safe")
        rig = (life := self.life(0)).rig
        traces: list[tuple[Hashable, list[Operation]]] = []
        for _ in range(4):
            trace: list[Operation] = []
            rig.watch = functools.partial(operations, trace)
            self.ask_all(life)
            rig.commit({slot: life.tokens(1) for slot in rig.branches})
            traces.append((rig.plugin.graph_key, trace))
        for (key, one), (other, two) in itertools.pairwise(traces):
            if key == other and one != two:
                raise AssertionError(f"it declares graph_safe, but two steps ran {_parting(one, two)}")

    def test_graph_key(self) -> None:
        """It is hashable, and changes where slots begin and end alone."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            key = rig.plugin.graph_key
            require(isinstance(key, Hashable), f"its graph_key {key!r} is not hashable")
            rig.answers(list(rig.branches))
            rig.commit(rig.possible({slot: life.tokens(1) for slot in rig.branches}))
            rig.fork([(0, 1), (1, 0)])
            require(rig.plugin.graph_key == key, "its graph_key changed, though no slot began or ended")

    @cuda
    def test_gpu_equals_cpu(self) -> None:
        """On a GPU it answers as on the CPU."""
        device = need_gpu()
        for seed in range(2):
            here, there = self.life(seed), self.life(seed, device=device)
            for life in (here, there):
                life.grow(3)
                life.fork()
            self.alike_on_gpu(here.rig, there.rig)

    def alike_on_gpu(self, here: G, there: G) -> None:
        """Two rigs that lived the same, one of them on a GPU, answer alike."""
        found = {s: a.cpu() if hasattr(a, "cpu") else a for s, a in there.answers(list(there.branches)).items()}
        self.same_answers(here, found, here.answers(list(here.branches)), "on a GPU it answers differently")

    @cuda
    def test_gpu_never_waits(self) -> None:
        """On a GPU, a step passes torch's sync debug mode."""
        device = need_gpu()
        if not self.on_device():
            passed_over("it is a host plugin")
        from trtllm_core.testing.gpu import sync_errors

        life = self.life(0, device=device)
        self.ask_all(life)  # once before: what is compiled or loaded at the first call may wait
        life.rig.watch = sync_errors
        self.ask_all(life)
        life.rig.commit({slot: life.tokens(1) for slot in life.rig.branches})
        life.rig.fork([(0, 1), (1, 0)])

    @cuda
    def test_gpu_graphs(self) -> None:
        """What declares ``graph_safe`` is captured once and replayed as the texts go on, with the same answers."""
        device = need_gpu()
        if not self.subject().make().capabilities.graph_safe or not self.on_device():
            passed_over("it does not declare graph_safe")
        from trtllm_core.testing.gpu import GraphedCommits, captured

        eager, life = self.life(1, device=device), self.life(1, device=device)
        slots = list(life.rig.branches)
        plain, again = self.question(eager.rig, slots), self.question(life.rig, slots)
        graph, answer = captured(again, warm=True)
        commits = GraphedCommits(life.rig, slots)
        for step in range(5):
            graph.replay()
            due = plain()
            same = torch.allclose(answer.float(), due.float(), rtol=1e-4, atol=1e-4)
            require(same, f"replayed from a CUDA graph, it answers differently after {step} steps")
            new = {slot: eager.tokens(1) for slot in slots}
            eager.rig.commit(new)
            commits.commit(new)

    def question(self, rig: G, slots: Sequence[int]) -> Callable[[], torch.Tensor]:
        """A call of the plugin on tensors that stay where they are; what it returns."""
        raise NotImplementedError

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


def _parting(one: Sequence[Operation], two: Sequence[Operation]) -> str:
    """Where two lists of operations first differ."""
    at, pair = next((i, pair) for i, pair in enumerate(itertools.zip_longest(one, two)) if pair[0] != pair[1])
    first, second = (
        "nothing" if each is None else f"{each[0]} on {[list(shape) for shape, _ in each[1]]}" for each in pair
    )
    return f"different operations: number {at} was {first}, and then {second}"
