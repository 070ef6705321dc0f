"""Registrars: what hooks are given to register things with, and where registered things are looked up."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from trtllm_core.config import SamplingConfig
from trtllm_core.errors import (
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
    PluginNotFoundError,
    listing,
)
from trtllm_core.plugin.backend import Backend
from trtllm_core.plugin.decoder import Decoder, Sampler
from trtllm_core.plugin.family import ModelFamily
from trtllm_core.plugin.kv_policy import KVPolicy
from trtllm_core.plugin.logits import LogitsProcessor
from trtllm_core.plugin.stopping import StoppingCriterion

T = TypeVar("T")
Factory = Callable[..., T] | str
"""A callable that makes the thing, or ``"package.module:name"`` of one, imported when it is first needed."""

_REFERENCE = re.compile(r"[\w.]+:\w+")


@dataclass(frozen=True, slots=True)
class Source:
    """Where an entry comes from."""

    plugin: str
    """Name of the entry point, or of the module or object that was passed in."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.plugin})"


class AnyOf:
    """Several values of a field at which a plugin is not needed: ``consumes={"top_p": AnyOf(0.0, 1.0)}``."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"AnyOf({', '.join(map(repr, self.values))})"


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One registered thing, with where it came from."""

    name: str
    factory: Factory[T]
    source: Source
    consumes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SamplingConfig that it honours, each with the value, or ``AnyOf`` some, at which it is not needed."""
    aliases: tuple[str, ...] = ()

    def needed(self, name: str, value: Any) -> bool:
        """Whether ``value`` of the field ``name``, which it honours, is one that needs it."""
        off = self.consumes[name]
        return value not in off.values if isinstance(off, AnyOf) else value != off

    def load(self) -> Callable[..., T]:
        """The factory itself.

        Raises:
            PluginLoadError: importing it failed.
        """
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except Exception as error:
            raise PluginLoadError(
                f"{self.name!r} of {self.source} could not be loaded from {self.factory!r}: "
                f"{type(error).__name__}: {error}"
            ) from error


class Registry(Generic[T]):
    """All entries of one hook kind, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._aliases: dict[str, str] = {}

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._aliases

    def get(self, name: str, hint: str | Callable[[], str] = "") -> Entry[T]:
        """The entry under a name or alias.

        Raises:
            PluginNotFoundError: with near names, and ``hint``: what to install, or what finds that out.
        """
        name = self._aliases.get(name, name)
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, [*self._entries, *self._aliases], n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        told = hint() if callable(hint) else hint
        raise PluginNotFoundError(
            f"no {self.kind.replace('_', ' ')} is registered as {name!r}{guess} "
            f"(registered: {listing(self._entries)}){'. ' + told if told else ''}"
        )

    def add(self, entry: Entry[T], replace: str | None = None) -> None:
        """Register an entry.

        Raises:
            PluginConflictError: a name is taken, and ``replace`` does not say that it should be replaced.
        """
        if replace is not None:
            replace = self._aliases.get(replace, replace)
        for name in (entry.name, *entry.aliases):
            taken = self._entries.get(self._aliases.get(name, name))
            if taken is not None and taken.name != replace:
                raise PluginConflictError(
                    f"{self.kind.replace('_', ' ')} {name!r} is registered by both {taken.source} and "
                    f"{entry.source}; disable one of them, let one say replace={taken.name!r}, or choose with "
                    f"Plugins.load(replace={{'{self.kind}:{name}': '{entry.source.distribution}'}})"
                )
        # A replacement stands where the replaced one stood: the order settles ties between processors.
        place = list(self._entries).index(replace) if replace in self._entries else len(self._entries)
        if replace is not None:
            self.remove(replace)
        entries = list(self._entries.values())
        self._entries = {each.name: each for each in (*entries[:place], entry, *entries[place:])}
        self._aliases.update(dict.fromkeys(entry.aliases, entry.name))

    def remove(self, name: str) -> None:
        """Forget an entry and its aliases, if it is there."""
        self._entries.pop(name, None)
        self._aliases = {alias: target for alias, target in self._aliases.items() if target != name}


class Registrar(Generic[T]):
    """What one plugin registers with, in one hook. It records the plugin of each entry by itself."""

    def __init__(self, registry: Registry[T], source: Source) -> None:
        self._registry = registry
        self._source = source

    def _add(self, name: str, factory: Factory[T], replace: str | None, **rest: Any) -> None:
        """Check what can be checked without importing the factory, and register it."""
        if not name:
            raise PluginContractError("a name to register must not be empty")
        if not callable(factory) and not (isinstance(factory, str) and _REFERENCE.fullmatch(factory)):
            raise PluginContractError(f"factory of {name!r} is {factory!r}; give a callable or 'package.module:name'")
        for unknown in set(rest.get("consumes", ())) - set(SamplingConfig.model_fields):
            near = difflib.get_close_matches(unknown, SamplingConfig.model_fields, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise PluginContractError(f"{name!r} consumes {unknown!r}, which is no field of SamplingConfig{guess}")
        self._registry.add(Entry(name, factory, self._source, **rest), replace)


class ModelFamilyRegistrar(Registrar[ModelFamily]):
    """Given to ``trtllm_register_model_families``."""

    def add(
        self, name: str, factory: Factory[ModelFamily], *, architectures: Sequence[str] = (), replace: str | None = None
    ) -> None:
        """Register a family. ``architectures`` are the names in checkpoints that it claims, HF's and GGUF's
        (the latter written ``gguf:llama``)."""
        self._add(name, factory, replace, aliases=tuple(architectures))


class DecoderRegistrar(Registrar[Sampler | Decoder]):
    """Given to ``trtllm_register_decoders``."""

    def add(
        self,
        name: str,
        factory: Factory[Sampler | Decoder],
        *,
        consumes: Sequence[str] = (),
        replace: str | None = None,
    ) -> None:
        """Register a sampler or decoder, and the SamplingConfig fields that it honours."""
        self._add(name, factory, replace, consumes=dict.fromkeys(consumes))


class LogitsProcessorRegistrar(Registrar[LogitsProcessor]):
    """Given to ``trtllm_register_logits_processors``."""

    def add(
        self,
        name: str,
        factory: Factory[LogitsProcessor],
        *,
        consumes: Mapping[str, Any] | None = None,
        replace: str | None = None,
    ) -> None:
        """Register a processor.

        ``consumes`` maps SamplingConfig fields to the value at which the processor does nothing, or ``AnyOf`` several:
        a request with another value gets it by itself, without naming it, unless its decoder honours the field.
        """
        self._add(name, factory, replace, consumes=dict(consumes or {}))


class StoppingCriterionRegistrar(Registrar[StoppingCriterion]):
    """Given to ``trtllm_register_stopping_criteria``."""

    def add(
        self,
        name: str,
        factory: Factory[StoppingCriterion],
        *,
        consumes: Mapping[str, Any] | None = None,
        replace: str | None = None,
    ) -> None:
        """Register a criterion; ``consumes`` as for logits processors."""
        self._add(name, factory, replace, consumes=dict(consumes or {}))


class KVPolicyRegistrar(Registrar[KVPolicy]):
    """Given to ``trtllm_register_kv_policies``."""

    def add(self, name: str, factory: Factory[KVPolicy], *, replace: str | None = None) -> None:
        """Register a policy."""
        self._add(name, factory, replace)


class BackendRegistrar(Registrar[Backend]):
    """Given to ``trtllm_register_backends``."""

    def add(self, name: str, factory: Factory[Backend], *, replace: str | None = None) -> None:
        """Register a backend."""
        self._add(name, factory, replace)
