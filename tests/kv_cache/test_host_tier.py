"""Blocks that go to the host when room is needed, and come back when they are found."""

from __future__ import annotations

import random

import pytest
import torch

from trtllm_core.backends.torch import host_blocks
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import KVCacheManager, PrefixOptions, PrefixPolicy
from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVModel, KVPlan
from trtllm_core.testing.papercache import PaperCache


def prefix(blocks: int, places: int, **options: object) -> PaperCache:
    policy = PrefixPolicy(PrefixOptions(host_tokens=4 * places, **options))  # type: ignore[arg-type]
    return PaperCache(policy, KVBudget(4, 40, 4, 4 * blocks))


def run(cache: PaperCache, tokens: list[int], slot: int = 0) -> int | None:
    """A request comes, computes its prompt and goes. Returns what it found."""
    hit = cache.admit(slot, tokens, 0)
    if hit is not None:
        cache.write([slot], [tokens[hit:]])
        cache.release([slot], keep=True)
    return hit


def text(number: int, length: int = 17) -> list[int]:
    return list(range(100 * number, 100 * number + length))


def test_what_was_given_up_is_found_again() -> None:
    with_host, without = prefix(6, 12), prefix(6, 0)
    for number in (1, 2, 3):
        assert run(with_host, text(number)) == run(without, text(number)) == 0
    assert [run(with_host, text(number)) for number in (1, 2, 3)] == [16, 16, 16]
    assert [run(without, text(number)) for number in (1, 2, 3)] == [0, 0, 0]
    assert with_host.policy.usage().saved > 0


def test_a_block_is_saved_once() -> None:
    cache = prefix(5, 12)
    for number in (1, 2, 1, 2, 1, 2):
        run(cache, text(number))
    saved: list[tuple[int, int]] = []
    admit = cache.policy.admit

    def watched(*arguments: object) -> object:
        admission = admit(*arguments)  # type: ignore[arg-type]
        assert admission is not None
        saved.extend(admission.edits.saves)
        return admission

    cache.policy.admit = watched  # type: ignore[method-assign, assignment]
    assert [run(cache, text(number)) for number in (1, 2)] == [16, 16]
    assert saved == [], "their places still hold them"


@pytest.mark.parametrize(("number", "found"), [(1, 0), (2, 16), (3, 16), (4, 16)])
def test_the_first_to_go_was_given_up_first(number: int, found: int) -> None:
    cache = prefix(5, 8)
    for other in (1, 2, 3, 4):
        run(cache, text(other))
    assert cache.policy.usage().saved == 8
    assert run(cache, text(number)) == found


def test_a_path_that_lies_in_both_is_taken_up_whole() -> None:
    cache = prefix(8, 8)
    long = text(1, 29)
    run(cache, long)
    run(cache, text(2, 13))  # what continues longest goes first
    usage = cache.policy.usage()
    assert usage.saved > 0
    assert usage.cached + usage.saved > 7
    assert run(cache, long) == 28


def test_who_loads_does_not_lose_what_he_loads() -> None:
    """Taking blocks for what comes back gives up others, which look for places in a full tier."""
    cache = prefix(5, 4)
    for _ in range(3):
        for number in (1, 2):
            run(cache, text(number))
            cache.check()
    assert run(cache, text(2)) == 16


def test_a_place_is_freed_with_its_tokens() -> None:
    """Without ``keep``, nothing is left, on the host either."""
    cache = prefix(6, 8)
    run(cache, text(1))
    cache.admit(0, text(2), 0)
    cache.write([0], [text(2)])
    cache.release([0], keep=False)
    assert run(cache, text(2)) == 0


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_those_of_a_larger_pool(seed: int) -> None:
    """With a place for each block that was ever there, nothing is ever lost."""
    small, large, random_ = (
        prefix(9, 200, partial_blocks=False),
        prefix(220, 0, partial_blocks=False),
        random.Random(seed),
    )
    for _ in range(30):
        start = random_.choice([text(1, 12), text(2, 20), text(3, 8)])
        tokens = [*start, *text(random_.randrange(4, 9), random_.randrange(1, 12))]
        assert run(small, tokens) == run(large, tokens)


def test_edits_that_cannot_be_one() -> None:
    with pytest.raises(ValueError, match="before saves"):
        Edits(copies=((0, 1),)) + Edits(saves=((1, 0),))
    with pytest.raises(ValueError, match="before later edits"):
        Edits(loads=((0, 1),)) + Edits(copies=((1, 2),))
    both = Edits(saves=((0, 0),)) + Edits(copies=((1, 0),), loads=((0, 3),))
    assert both == Edits(copies=((1, 0),), saves=((0, 0),), loads=((0, 3),))


def test_refusals() -> None:
    with pytest.raises(CapacityError, match="host_tokens=3 do not hold one block of 4 tokens"):
        PaperCache(PrefixPolicy(PrefixOptions(host_tokens=3)), KVBudget(4, 40, 4, 40))
    with pytest.raises(ConfigError, match="saves blocks to the host"):
        KVCacheManager(1, 8, 64, 4, 8, 100, 0, policy=PrefixPolicy(PrefixOptions(host_tokens=16)))


@pytest.mark.parametrize("kind", ["float32", "int8", "fp8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_pool_saves_before_and_loads_after_it_copies(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_blocks, "STAGED", 1)  # one block at a time
    plan = KVPlan(6, 4, 6, KVModel(2, 1, 8, kind, 0), host_blocks=3)
    pool = KVPool(plan, torch.float32, torch.device(device))
    every = torch.arange(24, device=device)
    for cache in pool.layers:
        cache.write(every, torch.randn(24, 2, 8, device=device))
    before = [cache.gather(every).view(6, 4, 2, 8).clone() for cache in pool.layers]
    pool.edit(Edits(copies=((1, 0), (0, 1)), saves=((0, 2), (3, 0), (4, 0)), loads=((2, 5), (0, 3))))
    for cache, was in zip(pool.layers, before, strict=True):
        now = cache.gather(every).view(6, 4, 2, 8)
        for block, source in enumerate((1, 0, 2, 4, 4, 0)):
            assert torch.equal(now[block], was[source])
    assert pool.host is not None
    assert pool.host.bytes * 2 == pool.bytes
