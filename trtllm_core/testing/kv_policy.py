"""``KVPolicyConformance``: what KV allocation policies must do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from trtllm_core.config import KVCacheConfig, SamplingConfig
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache.making import make_policy
from trtllm_core.plugin.kv_policy import KVBudget, KVPolicy
from trtllm_core.testing.kit import Conformance, passed_over, require
from trtllm_core.testing.kv_lives import CacheLife
from trtllm_core.testing.papercache import EVERYTHING, PaperCache
from trtllm_core.testing.subject import KV_POLICY, Subject, resolve

NEEDS = frozenset({"tokens", "attention_scores", "keys", "access_statistics"})


class KVPolicyConformance(Conformance):
    """Subclass it and set ``plugin``; ``params`` are options (``KVCacheConfig.options``) to try.

    A cache on paper runs the policy: it knows the text that each slot was given, and looks after every verb whether
    the slot reads it back. No model and no tensor is involved.
    """

    sizes: ClassVar[Sequence[KVBudget]] = (
        KVBudget(max_slots=5, max_seq_len=24, tokens_per_block=4, max_tokens=120),
        KVBudget(max_slots=5, max_seq_len=24, tokens_per_block=4, max_tokens=44),
        KVBudget(max_slots=4, max_seq_len=24, tokens_per_block=1, max_tokens=40),
        KVBudget(max_slots=3, max_seq_len=24, tokens_per_block=24, max_tokens=72),
    )
    """Pools to try: ample, tight, of small and of large blocks."""
    lives: ClassVar[int] = 12
    """How many random lives each check tries, at least one in each pool."""
    keeps_promises: ClassVar[bool] = True
    """Whether who was admitted can always write its prompt and ``max_new_tokens``. False: extend may run out, and the
    request is put off."""

    _subject: ClassVar[Subject]

    @classmethod
    def subject(cls) -> Subject:
        """What is examined, found once for each kit."""
        if "_subject" not in vars(cls):
            cls._subject = resolve(KV_POLICY, cls.given(), cls.name)
        return cls._subject

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> KVPolicy:
        """A new policy."""
        return make_policy(cls.subject().name, options, cls.subject().plugins)

    @classmethod
    def policies(cls) -> Iterator[tuple[KVPolicy, KVBudget]]:
        """A new policy for each choice of options and size."""
        for options, budget in itertools.product(cls.params, cls.sizes):
            yield cls.make(options), budget

    @classmethod
    def caches(cls) -> Iterator[PaperCache]:
        """The same, planned."""
        for policy, budget in cls.policies():
            yield PaperCache(policy, budget)

    def run_lives(self, looks: Collection[str], gentle: bool = False, steps: int = 40) -> list[CacheLife]:
        """Random lives, to their ends."""
        lives: list[CacheLife] = []
        while len(lives) < self.lives:
            for policy, budget in self.policies():
                life = CacheLife(policy, budget, len(lives), looks, gentle)
                life.live(steps)
                life.end()
                lives.append(life)
        return lives

    def begun(self, *lengths: int) -> Iterator[PaperCache]:
        """New caches, whose slots 0, 1, … have texts of these lengths; only those that have room for them."""
        found = False
        for cache in self.caches():
            tokens = [list(range(100 * slot, 100 * slot + length)) for slot, length in enumerate(lengths)]
            if all(self.starts(cache, slot, prompt) for slot, prompt in enumerate(tokens)):
                found = True
                yield cache
        if not found:
            passed_over(f"none of the pools in `sizes` has room for texts of {lengths} tokens")

    @staticmethod
    def admits(cache: PaperCache, slot: int, prompt: Sequence[int], new: int) -> bool:
        """Whether there is room for a request."""
        try:
            return cache.admit(slot, prompt, new) is not None
        except CapacityError:
            return False

    def starts(self, cache: PaperCache, slot: int, prompt: list[int]) -> bool:
        """Whether there is room for a request, which then has computed its prompt."""
        if not self.admits(cache, slot, prompt, 1):
            return False
        cache.write([slot], [prompt[len(cache.texts[slot].tokens) :]])
        return True

    # -- what it says --------------------------------------------------------------------------------------------

    def test_declarations(self) -> None:
        """``needs`` names what there is."""
        for policy, _ in self.policies():
            unknown = policy.needs - NEEDS
            require(not unknown, f"it needs {sorted(unknown)}, which nothing can give it: of {sorted(NEEDS)}")

    def test_wrong_options_are_refused(self) -> None:
        """``wrong_params``, and options that it does not have, are refused when a session is made."""
        for options in (*self.wrong_params, {"no_such_option": 1}):
            try:
                self.make(options)
            except ConfigError:
                continue
            raise AssertionError(f"it takes the options {dict(options)}")

    def test_the_plan_fits_the_budget(self) -> None:
        """The pool is no larger than the budget, and a table no longer than the pool."""
        for policy, budget in self.policies():
            plan = PaperCache(policy, budget).plan
            size = plan.num_blocks * plan.tokens_per_block
            require(plan.tokens_per_block == budget.tokens_per_block, "it plans blocks of another size")
            require(0 < size <= budget.max_tokens, f"it plans {size} tokens of room, the budget is {budget.max_tokens}")
            table = plan.max_blocks_per_slot
            require(0 < table <= plan.num_blocks, f"a slot may have {table} of {plan.num_blocks} blocks")
            ring = plan.window is None or plan.sink < plan.window <= table * plan.tokens_per_block
            require(ring, f"a ring of {plan.window} with {plan.sink} sinks does not fit {table} blocks")

    def test_planning_forgets_everything(self) -> None:
        """``plan`` begins anew."""
        for policy, budget in self.policies():
            life = CacheLife(policy, budget, 0)
            while not life.texts:
                life.live(5)
            usage = PaperCache(policy, budget).policy.usage()
            require(usage.free == usage.total, f"after another plan() {usage.total - usage.free} blocks are in use")
            CacheLife(policy, budget, 1).live(20)

    # -- what always holds ---------------------------------------------------------------------------------------

    def test_slots_read_back_their_text(self) -> None:
        """Whatever happens, and whatever was found in the cache."""
        self.run_lives({"contents"})

    def test_an_entry_has_one_writer(self) -> None:
        """Where a slot may write, no other writes or reads."""
        self.run_lives({"writers"})

    def test_blocks_are_free_or_used(self) -> None:
        """And all of them are counted, once."""
        self.run_lives({"counts"})

    def test_its_own_check_holds(self) -> None:
        """``check_integrity`` is silent."""
        self.run_lives({"integrity"})

    def test_everything_is_given_back(self) -> None:
        """When all slots are over all blocks are free, and what is kept can be evicted."""
        for life in self.run_lives({"counts"}):
            usage = life.policy.usage()
            require(usage.free == usage.total, f"nobody lives, but {usage.total - usage.free} blocks are in use")
            given = life.policy.evict(usage.total)
            left = life.policy.usage().cached
            require(given == usage.cached and not left, f"evict gave up {given} of {usage.cached}, {left} are left")

    # -- verbs ---------------------------------------------------------------------------------------------------

    def test_forks_are_simultaneous(self) -> None:
        """0←1, 1←0 changes places; so does a cycle of three, and one slot may go to several."""
        for source, target in (([1, 0], [0, 1]), ([1, 2, 0], [0, 1, 2]), ([0, 0, 1], [1, 2, 0])):
            for cache in self.begun(5, 3, 6):
                self.unless_full(cache, partial(cache.fork, source, target))

    def test_forks_are_independent(self) -> None:
        """Whoever writes after a fork, the other one does not see it."""
        for length in (3, 4, 5, 8):
            for cache in self.begun(length):
                self.unless_full(cache, partial(cache.fork, [0], [1]))
                for slots, tokens in (([0], [[50]]), ([1], [[60, 61]]), ([1, 0], [[62], [51]])):
                    if len(cache.texts) == 2:
                        self.unless_full(cache, partial(cache.write, slots, tokens))

    def test_branches_find_room(self) -> None:
        """A branch that was admitted without a prompt, and forked later, finds the room that it was admitted for."""
        if not self.keeps_promises or any(cache.plan.evicts for cache in self.caches()):
            passed_over("keeps_promises is False, or its plan evicts")
        for cache in self.begun(5):
            if not self.admits(cache, 1, (), 9):
                continue
            cache.fork([0], [1])
            for slot, new in itertools.product(range(2, cache.budget.max_slots), (18, 8, 3, 0)):  # take all the rest
                if slot not in cache.texts and self.admits(cache, slot, [slot], new):
                    cache.write([slot], [[slot] * (new + 1)])
            for tokens in ([1], [2, 3], [4]):
                cache.write([1], [tokens])

    def test_rewinds(self) -> None:
        """What was taken back can be written anew, with equal lengths. A ring that has wrapped may refuse."""
        for length, back in itertools.product((4, 5, 9), (1, 2, 4)):
            for cache in self.begun(length):
                if cache.plan.evicts:
                    passed_over("its plan evicts: what it has moved, it cannot take back")
                try:
                    cache.rewind([0], [back])
                except ConfigError:
                    wrapped = cache.plan.window is not None and length > cache.plan.window
                    require(wrapped, f"rewind refuses to take {back} of {length} tokens back")
                else:
                    cache.write([0], [list(range(70, 70 + back))])

    def test_what_fails_changes_nothing(self) -> None:
        """Who asks for room that is not there finds everything as it was."""
        for cache in self.begun(3, 3):
            before, most = cache.state(), cache.budget.max_seq_len
            for counts in ([1, most], [most, 1]):
                try:
                    cache.extend([0, 1], counts)
                except CapacityError:
                    require(cache.state() == before, "extend failed, and left something changed")
                else:
                    raise AssertionError(f"extend gives room for {3 + most} tokens, where max_seq_len is {most}")
        self.run_lives(EVERYTHING)

    def test_who_is_admitted_does_not_run_out(self) -> None:
        """Slots that write what their requests asked for find room for it."""
        if not self.keeps_promises or any(cache.plan.evicts for cache in self.caches()):
            passed_over("keeps_promises is False, or its plan evicts")
        self.run_lives(EVERYTHING, gentle=True, steps=60)

    def test_nobody_waits_for_ever(self) -> None:
        """In an empty pool a request starts, or is refused for good."""
        for cache in self.caches():
            longest = cache.budget.max_seq_len
            for prompt, new in itertools.product((1, 5, longest // 2, longest), (0, 1, longest // 2)):
                try:
                    hit = cache.admit(0, list(range(prompt)), new)
                except CapacityError:
                    continue
                require(hit is not None, f"{prompt} + {new} tokens wait in an empty pool: raise CapacityError")
                cache.release([0])
            require(cache.admit(0, [1], 0) is not None, "a request of one token waits in an empty pool")

    def test_what_is_found_was_computed(self) -> None:
        """What is found of a prompt is what computing it would give, under another key too."""
        found = 0
        for cache in self.begun(13):
            cache.release([0])
            prompt = [7] * 13
            for extra in (("a",), ("a",), ("b",)):
                hit = cache.admit(0, prompt, 1, extra)
                require(hit is not None, "a request waits in a pool where nothing runs")
                cache.write([0], [prompt[hit or 0 :]])
                cache.release([0], keep=True)
                found += hit or 0
        if not found:
            passed_over("it reuses nothing")

    def test_generation(self) -> None:
        """The loop gets the tokens that a model without weights must give."""
        from trtllm_core.runner import ModelRunner
        from trtllm_core.testing.markov import MarkovExecutable

        if any(cache.plan.positions == "cache" for cache in self.caches()):
            passed_over("it wants positions within the cache, which a model without weights does not have")
        prompts = [[5, 6, 7], [11], [3] * 20, [3] * 20, [3] * 13 + [4], [42, 17]]
        asked = SamplingConfig(max_new_tokens=30, end_id=(), return_dict=True)
        model = MarkovExecutable()
        successor = model.table.argmax(1).tolist()
        for options, room in itertools.product(self.params, (None, 8 * 56)):
            kv = KVCacheConfig(policy=self.subject().name, options=dict(options), max_tokens=room)
            runner = ModelRunner.from_engine(model, plugins=self.subject().plugins, kv_cache=kv)
            for prompt, output in zip(prompts, runner.generate(prompts, asked)["outputs"], strict=True):
                due = list(itertools.accumulate(range(30), lambda last, _: successor[last], initial=prompt[-1]))[1:31]
                require(list(output.tokens) == due, f"{prompt} goes on {list(output.tokens)}, not {due}")

    # -- helpers -------------------------------------------------------------------------------------------------

    @staticmethod
    def unless_full(cache: PaperCache, verb: Callable[[], None]) -> None:
        """Call a verb that may find no room, and must change nothing then."""
        before = cache.state()
        try:
            verb()
        except CapacityError:
            require(cache.state() == before, "a call that failed changed something")
