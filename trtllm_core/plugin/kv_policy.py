"""Base class of KV allocation policies: pure Python and NumPy, no torch. A policy decides; the backend moves bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from trtllm_core.errors import CapacityError

if TYPE_CHECKING:
    import numpy as np
    from pydantic import BaseModel


class OutOfBlocksError(CapacityError):
    """There is no room now. Nothing was changed; ``needed`` blocks are missing, ``evictable`` could be given up."""

    def __init__(self, needed: int, evictable: int = 0) -> None:
        super().__init__(f"the KV pool is out of blocks: {needed} more needed, {evictable} could be evicted")
        self.needed = needed
        self.evictable = evictable


@dataclass(frozen=True, slots=True)
class KVModel:
    """What a policy knows about the model, on one rank."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    bytes_per_token: int
    """Keys and values of one token over all layers, in bytes."""
    sliding_window: int | None = None
    """Tokens that every layer sees at most, itself included: older ones may be overwritten. None: some layer sees all,
    or the backend has no cyclic caches."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """How much room a policy may plan for."""

    max_slots: int
    max_seq_len: int
    tokens_per_block: int
    max_tokens: int
    """Tokens of room in all, over all slots."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The pool that a backend allocates: ``num_blocks`` blocks of ``tokens_per_block`` tokens, for every layer."""

    num_blocks: int
    tokens_per_block: int
    max_blocks_per_slot: int
    model: KVModel
    window: int | None = None
    """Cache entries of a slot after which it is overwritten as a ring; None never is."""
    sink: int = 0
    """First entries of the cache that the ring leaves alone."""
    positions: Literal["token", "cache"] = "token"
    """What rotary embeddings and biases of distance count: the tokens of the text, or the entries of the cache from the
    oldest to the newest, as if nothing had ever been dropped or overwritten."""
    evicts: bool = False
    """Entries may be dropped: a slot takes more tokens than it holds."""
    rewindable: int | None = None
    """Tokens that can be taken back at any time; None: all of them."""
    scores: bool = False
    """Set by the core: the policy must be given attention scores."""
    host_blocks: int = 0
    """Places for blocks in the host's memory, beside the pool: see ``Edits.saves``."""

    @property
    def bytes(self) -> int:
        """Bytes of the pool on one rank."""
        return self.num_blocks * self.tokens_per_block * self.model.bytes_per_token

    def cache_index(self, position: Any) -> Any:
        """Entry of a slot's cache that holds its token number ``position``: ``S + (p − S) mod (W − S)`` in a ring.

        Takes a number, or an array of them.
        """
        if self.window is None:
            return position
        wrapped = self.sink + (position - self.sink) % (self.window - self.sink)
        return position * (position < self.window) + wrapped * (position >= self.window)


class Move(NamedTuple):
    """An entry of a slot's cache goes to another place in it."""

    slot: int
    source: int
    target: int
    layer: int | None = None
    """None: in all layers. Layers may hold different tokens in the same entry."""


@dataclass(frozen=True, slots=True)
class Edits:
    """What must happen to the pool before the next step, in this order: all saves, all copies, all loads, all moves,
    all drops."""

    copies: tuple[tuple[int, int], ...] = ()
    """(source block, destination block) over all layers, **simultaneous**: every source is read before any destination
    is written, so that 0←1, 1←0 swaps. No destination stands here twice."""
    moves: tuple[Move, ...] = ()
    """Simultaneous, too. Only ``after_prefill`` and ``after_step`` return any. Sources are where the tables were before
    the call, targets where they are after it; a block with more than one owner is no target."""
    drops: tuple[tuple[int, int], ...] = ()
    """(slot, how many entries at its end are dropped); as ``moves``. The slot's ``length`` is less by as many."""
    saves: tuple[tuple[int, int], ...] = ()
    """(block, place) over all layers: copies to the host, one after the other; of ``KVPlan.host_blocks`` places."""
    loads: tuple[tuple[int, int], ...] = ()
    """(place, block) over all layers: copies back from the host."""

    def __bool__(self) -> bool:
        return bool(self.copies or self.moves or self.drops or self.saves or self.loads)

    def __add__(self, later: Edits) -> Edits:
        """Both, one after the other, as one: what copies a copy reads the first source.

        Raises:
            ValueError: there are moves, drops or loads before something later, or something before saves. Run those
                first.
        """
        if ((self.moves or self.drops or self.loads) and later) or (self and later.saves):
            raise ValueError(
                "edits that move, drop or load must be run before later edits are added, and all before saves"
            )
        origin = {target: source for source, target in self.copies}
        copies = origin | {target: origin.get(source, source) for source, target in later.copies}
        pairs = tuple((source, target) for target, source in copies.items() if source != target)
        saves, loads = self.saves + later.saves, self.loads + later.loads
        return Edits(pairs, self.moves + later.moves, self.drops + later.drops, saves, loads)


@dataclass(frozen=True, slots=True)
class KVStatistics:
    """What a step tells a policy that asked for it. One entry a slot, in the order of the call."""

    attention: Sequence[np.ndarray]
    """float32 ``[layers, kv_heads, entries]``: how much the slot's queries of this step looked at each entry of its
    cache, new ones included: probabilities after the softmax, summed over the queries, and over the query heads that
    share a key/value head. Heads are this rank's."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request may start."""

    hit_length: int = 0
    """Tokens of its prompt that are in the cache already and need not be computed: fewer than there are."""
    edits: Edits = Edits()
    """Copies that must be done before anything is written (blocks of which a part is reused)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the next tokens of some slots go."""

    tables: np.ndarray
    """int32 ``[n, max_blocks_per_slot]``: block of each run of ``tokens_per_block`` entries; -1 where there is none."""
    room: np.ndarray
    """int64 ``[n]``: tokens after the committed ones that may be written before ``extend`` is called again."""
    edits: Edits = Edits()
    """Copies that must be done before anything is written (copy-on-write)."""


@dataclass(frozen=True, slots=True)
class KVUsage:
    """How full the pool is, in blocks."""

    total: int
    free: int
    """Blocks that no slot holds."""
    shared: int = 0
    """Blocks that more than one slot holds."""
    cached: int = 0
    """Of the free ones, those that are kept for reuse until their room is needed."""
    saved: int = 0
    """Blocks that lie in the host's memory, for reuse."""


class KVPolicy(ABC):
    """Decides which blocks hold which tokens. Slots and counts come as sequences of equal length.

    Invariants, which ``check_integrity`` verifies: every block is free or owned, never both; its reference count is
    the number of slots that list it; no block with more than one owner is inside anybody's writable room; free plus
    owned is the whole pool. **A call that fails changes nothing.**
    """

    Options: ClassVar[type[BaseModel] | None] = None
    """pydantic model of ``KVCacheConfig.options``; None takes none."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of ``tokens`` (see ``commit``), ``attention_scores``, ``keys``, ``access_statistics``; a backend without them is
    refused early."""
    honours_priority: bool = False
    """Whether ``admit`` takes ``priority``. Requests that set ``cache_priority`` are refused where it does not."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """Size the pool and forget all slots. Called once a session, before anything else.

        Raises:
            CapacityError: the budget cannot hold even one token for one slot.
        """

    @abstractmethod
    def admit(
        self, slot: int, tokens: Sequence[int], max_new_tokens: int, extra_key: tuple[Any, ...] = ()
    ) -> Admission | None:
        """May a request with this prompt start in ``slot``? None: not now, ask again after the next step.

        No ``tokens``: a branch that will become a copy of another slot; ``max_new_tokens`` is all that it may have.
        ``extra_key`` is all else that the cached values depend on (adapter, prompt table, salt). A policy that
        ``honours_priority`` also takes ``priority``: how much what it leaves in the cache is worth, 0 to 100.

        Raises:
            CapacityError: it could not start even in an empty pool.
        """

    @abstractmethod
    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> Placement:
        """Make room for ``counts[i]`` tokens after those committed; room that is there already is kept.

        Raises:
            OutOfBlocksError: for all of them or none.
            CapacityError: more tokens than a slot can ever hold.
        """

    @abstractmethod
    def commit(
        self, slots: Sequence[int], counts: Sequence[int], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """``counts[i]`` tokens were written and stay. They must lie within the room.

        ``tokens[i]`` are their ids, where ``needs`` names ``tokens``; a policy that does not may leave it out of its
        signature. Several steps may be told in one call, but always before a slot is forked, or another is admitted.
        """

    @abstractmethod
    def rewind(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Take back the last ``counts[i]`` committed tokens. Blocks without tokens are given back."""

    @abstractmethod
    def fork(self, src: Sequence[int], dst: Sequence[int]) -> Edits:
        """Slot ``dst[i]`` becomes a copy of slot ``src[i]``, **all at the same time**: 0←1, 1←0 swaps.

        A destination may be live (what it held is released) or new. Blocks are shared until one is written.

        Raises:
            OutOfBlocksError: only of policies that cannot share blocks.
        """

    @abstractmethod
    def release(self, slots: Sequence[int], keep: bool = False) -> None:
        """The slots are over. ``keep`` allows their blocks to stay for reuse by later requests: they ended well."""

    @abstractmethod
    def length(self, slot: int) -> int:
        """Committed tokens of a slot, less those that were dropped."""

    @abstractmethod
    def tables(self, slots: Sequence[int]) -> np.ndarray:
        """int32 ``[n, max_blocks_per_slot]``, as in ``Placement``."""

    @abstractmethod
    def usage(self) -> KVUsage:
        """How full the pool is."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where an invariant is broken. Cheap enough for tests and idle moments."""

    def after_prefill(self, slots: Sequence[int], statistics: KVStatistics | None = None) -> Edits | None:
        """The last tokens of these slots' prompts were written: a policy that compresses says what moves and goes.

        All that was written has been committed. ``statistics`` are of this step alone, None where ``needs`` names
        none; those of a prompt's earlier parts came with ``after_step``. Returns None where nothing is to be done.
        """
        return None

    def after_step(self, slots: Sequence[int], statistics: KVStatistics | None = None) -> Edits | None:
        """The same for slots that ran anything else: a part of a prompt, or a generated token."""
        return None

    def evict(self, blocks: int) -> int:
        """Give up to ``blocks`` cached, unowned blocks back to the pool. Returns how many. What must be saved of them
        comes with the edits of the next call that gives a slot a block."""
        return 0
