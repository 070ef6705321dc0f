"""How many branches a request has, how many positions they may verify at once, and what stands against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.errors import CapacityError, ConfigError, PluginContractError, PluginError, PluginRuntimeError, listing
from trtllm_core.plugin import BranchPlan, BranchView, Decoder, HostLogitsProcessor, Sampler

if TYPE_CHECKING:
    from trtllm_core.decoding.plan import PlanItem

FORCED = 32
"""Most tokens that are forced in one step."""


def overrides(plugin: object, base: type, name: str) -> bool:
    """Whether a plugin of a kind has a method of its own in place of the kind's."""
    return isinstance(plugin, base) and getattr(type(plugin), name) is not getattr(base, name)


def branching_of(
    decoder: PlanItem, sampling: SamplingConfig, prompt: Sequence[int], build: BuildConfig | None
) -> BranchPlan:
    """What a request's decoder asks for, held against the engine's limits (None: not known).

    Raises:
        CapacityError: more branches than the engine was built for.
        ConfigError: the decoder refuses what the request asks of it.
        PluginError: it raised anything else, or asks for what makes no sense.
    """
    if isinstance(decoder.plugin, Sampler):
        count = sampling.num_return_sequences
        branching = BranchPlan(count, count, returns=count)
    else:
        branching = _asked_for(decoder, sampling, prompt)
    most = branching.max_branches
    if build is None:
        return branching
    if most > branching.branches and most > build.max_beam_width:
        raise CapacityError(
            f"decoder {decoder.name!r} searches with {most} branches, but the engine was built for max_beam_width "
            f"{build.max_beam_width}"
        )
    if most > build.max_branches:
        raise CapacityError(
            f"the request needs {most} branches, but the engine has {build.max_branches} slots (max_batch_size "
            f"{build.max_batch_size} times max_beam_width {build.max_beam_width})"
        )
    return branching


def _asked_for(decoder: PlanItem, sampling: SamplingConfig, prompt: Sequence[int]) -> BranchPlan:
    assert isinstance(decoder.plugin, Decoder)
    view = BranchView("", 0, -1, prompt, sampling, sampling.end_id or (), sampling.random_seed or 0)
    try:
        branching = decoder.plugin.plan(decoder.view(view))
    except (PluginError, ConfigError):
        raise
    except Exception as error:
        raise PluginRuntimeError(f"plugin {decoder.name!r} raised {type(error).__name__}: {error}") from error
    sane = isinstance(branching, BranchPlan) and 1 <= branching.branches <= branching.max_branches
    if not sane or min(branching.returns, branching.max_positions) < 1:
        raise PluginContractError(f"decoder {decoder.name!r} returned {branching!r} from plan")
    return branching


def positions_of(
    branching: BranchPlan,
    decoder: PlanItem,
    sampler: PlanItem | None,
    others: Sequence[PlanItem],
    offers: frozenset[str],
    rewindable: int | None = None,
    with_companions: frozenset[object] = frozenset(),
) -> tuple[int, tuple[str, ...]]:
    """How many positions a branch verifies at once, and notes where that is fewer than were asked for.

    Args:
        branching: what the decoder asks for.
        decoder: of the request.
        sampler: that takes its tokens, where the decoder is none itself.
        others: processors and criteria.
        offers: what backend, loop and engine can give.
        rewindable: how many tokens can leave the cache again; None: all.
        with_companions: keys of processors with companions, which run the tokens that were committed, and no drafts.
    """
    taker = decoder if isinstance(decoder.plugin, Sampler) else sampler
    forcing = [item for item in others if overrides(item.plugin, HostLogitsProcessor, "forced")]
    proposes = branching.max_positions > 1
    if not proposes and (taker is None or not forcing):
        return 1, ()
    against = [
        item.name
        for item in others
        if item.plugin.capabilities.speculation == "none" or item.key in with_companions  # type: ignore[attr-defined]
    ]
    if taker is not None and not taker.plugin.capabilities.per_position:  # type: ignore[attr-defined]
        against.append(taker.name)
    against += sorted({"multi_position", "kv_rewind"} - offers)
    who = decoder.name if proposes else listing(item.name for item in forcing)
    if against:
        return 1, (f"{who}: one token a step, because {listing(against)} cannot take part in verifying several",)
    positions = max(branching.max_positions, 1 + FORCED if forcing else 1)
    if rewindable is not None and positions > 1 + rewindable:
        return 1 + rewindable, (f"{who}: {rewindable} drafts a step, because the KV cache takes back no more",)
    return positions, ()
