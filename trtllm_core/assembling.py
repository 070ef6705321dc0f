"""How a session's parts are put together: planner, branches, cache and loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.config import KVCacheConfig
from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.decoding.planner import Planner, offers
from trtllm_core.kv_cache.making import make_cache
from trtllm_core.loop import StepLoop
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session


def make_loop(
    session: Session,
    plugins: Plugins,
    kv_cache: KVCacheConfig,
    tokenizer: Tokenizer | None,
    end_ids: Sequence[int] | None,
    debug: bool,
    clock: Callable[[], float],
    look_ahead: bool | None,
) -> StepLoop:
    """A loop over a loaded engine, with nobody in it. Arguments as for ``GenerationSession``.

    Raises:
        CapacityError, ConfigError: the cache that is asked for does not fit, or not to the engine.
    """
    engine, config = session.engine, session.config
    ends = tokenizer.eos_ids if end_ids is None and tokenizer is not None else end_ids or ()
    token_bytes = None if tokenizer is None else TokenBytes.of(tokenizer)
    able = engine.capabilities
    offered = offers(token_bytes is not None, able.multi_position, hidden_states=able.hidden_states)
    planner = Planner(plugins, offered, config.build)
    if look_ahead is None:
        look_ahead = session.device.type == "cuda"
    look_ahead &= able.contract == "packed_paged" and not debug
    # All ranks go by the clock of the first.
    branches = BranchTable(
        config,
        session.device,
        planner,
        tuple(ends),
        token_bytes,
        debug,
        lambda: engine.broadcast(clock()),
        look_ahead,
    )
    cache = make_cache(kv_cache, engine, plugins, branches.slots.tokens)
    planner.follow(cache.plan.rewindable)
    return StepLoop(session, cache, branches, plugins, look_ahead)
