"""``LoraManager``: the adapters of a session, by the uids that requests name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from trtllm_core.checkpoint.peft import read_peft
from trtllm_core.engine.lora import place_adapter
from trtllm_core.errors import CapacityError, ConfigError, listing
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import ModelFamily, Plugins
from trtllm_core.session import Session

Directories = Path | str | Sequence[Path | str]
"""One adapter's directory, or those of several."""

NO_ADAPTER = "-1"
"""The classic uid of a request that uses none."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that is loaded."""

    uid: str
    index: int
    """Its place on the backend: what ``lora_ids`` says."""
    serial: int
    """No other adapter of the session has or had this number: its cached keys and values are its own."""
    path: Path
    rank: int


class LoraManager:
    """Loads, finds and drops adapters. Every rank must be told the same.

    Args:
        session: the engine.
        plugins: where its family is looked up, which says how an adapter's tensors become the rank's.
        parallel: whose rank this is.
    """

    def __init__(self, session: Session, plugins: Plugins, parallel: TensorParallel | None = None) -> None:
        self._session = session
        self._plugins = plugins
        self._parallel = parallel or TensorParallel()
        self._adapters: dict[str, Adapter] = {}
        self._users: Counter[Adapter] = Counter()
        self._serials = count()

    @property
    def uids(self) -> tuple[str, ...]:
        """Of the loaded adapters, in the order in which they came."""
        return tuple(self._adapters)

    def load_from_ckpt(self, directories: Directories | None, ckpt_source: str = "hf") -> None:
        """Load adapters under the uids "0", "1", … in order.

        Raises:
            ConfigError, CheckpointError, CapacityError: as ``add``; or they are of another kind than "hf".
        """
        if ckpt_source != "hf":
            raise ConfigError(
                f"lora_ckpt_source is {ckpt_source!r}: only adapters of Hugging Face PEFT, 'hf', are read"
            )
        several = [directories] if isinstance(directories, (str, Path)) else directories or ()
        for number, directory in enumerate(several):
            self.add(str(number), directory)

    def add(self, uid: str, directory: Path | str) -> Adapter:
        """Load a Hugging Face PEFT adapter. Requests may run meanwhile.

        Raises:
            ConfigError: the engine was not built for it, or the uid is taken.
            CheckpointError: the adapter cannot be read, or was made for another model.
            CapacityError: ``max_loras`` are loaded.
        """
        build = self._session.config.build
        if uid == NO_ADAPTER or not isinstance(uid, str):
            raise ConfigError(f"{uid!r} cannot be the uid of an adapter: choose a text other than {NO_ADAPTER!r}")
        if uid in self._adapters:
            raise ConfigError(f"there is an adapter {uid!r} already: drop it first")
        if not (build.max_lora_rank and self._session.engine.capabilities.lora):
            raise ConfigError("the engine was not built for LoRA adapters: build it with max_lora_rank")
        free = set(range(build.max_loras)) - {adapter.index for adapter in self._adapters.values()}
        if not free:
            raise CapacityError(
                f"{len(self._adapters)} adapters are loaded; the engine was built for max_loras {build.max_loras}"
            )
        peft = read_peft(directory)
        factors = place_adapter(peft, self._family(), self._session.config, self._parallel)
        adapter = Adapter(uid, min(free), next(self._serials), Path(directory), peft.rank)
        self._session.engine.put_adapter(adapter.index, factors)
        self._adapters[uid] = adapter
        return adapter

    def drop(self, uid: str) -> None:
        """Unload an adapter.

        Raises:
            ConfigError: there is none of this uid, or requests that have not ended use it.
        """
        adapter = self.find(uid)
        if adapter is None:
            raise ConfigError(f"{uid!r} stands for no adapter: there is nothing to drop")
        if users := self._users[adapter]:
            raise ConfigError(f"adapter {uid!r} is used by {users} requests that have not ended: drop it afterwards")
        del self._adapters[uid]
        self._session.engine.put_adapter(adapter.index, {})

    def find(self, uid: str | None) -> Adapter | None:
        """The adapter that a request names; None and ``"-1"`` are none.

        Raises:
            ConfigError: nothing is loaded under the uid.
        """
        if uid is None or uid == NO_ADAPTER:
            return None
        if uid not in self._adapters:
            raise ConfigError(f"there is no adapter {uid!r} (loaded: {listing(self._adapters)})")
        return self._adapters[uid]

    @contextmanager
    def using(self, adapters: Iterable[Adapter | None]) -> Iterator[None]:
        """While this lasts, the adapters cannot be dropped."""
        used = Counter(adapter for adapter in adapters if adapter is not None)
        self._users += used
        try:
            yield
        finally:
            self._users -= used

    def _family(self) -> ModelFamily:
        provider = self._session.config.family
        hint = self._plugins.missing_hint("model_family", provider.name, provider.distribution)
        family: ModelFamily = self._plugins.model_families.get(provider.name, hint).load()()
        return family
