"""Settling who gets which name: what plugins registered becomes one registry for each kind, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtllm_core.errors import ConfigError, PluginConflictError, PluginError, listing
from trtllm_core.plugin.loader import is_named
from trtllm_core.plugin.registrar import Entry, Registry, Source


@dataclass(frozen=True, slots=True)
class Offer:
    """One call of ``registrar.add``."""

    kind: str
    entry: Entry[Any]
    replace: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases that are claimed."""
        return (self.entry.name, *self.entry.aliases)


class Recorder(Registry[Any]):
    """Stands in for a registry while a plugin registers: nothing counts until the whole plugin has worked."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.offers: list[Offer] = []
        self.open = True

    def add(self, entry: Entry[Any], replace: str | None = None) -> None:
        """Keep the entry for later.

        Raises:
            PluginError: the hook has returned; nobody would look at the entry any more.
        """
        if not self.open:
            raise PluginError(f"{entry.source} registers {entry.name!r} after its hook has returned; do it in the hook")
        self.offers.append(Offer(self.kind, entry, replace))


def merge(
    offers: Sequence[Offer], kinds: Sequence[str]
) -> tuple[dict[str, Registry[Any]], dict[Source, PluginConflictError]]:
    """Registries of all offers that fit together, and the plugins refused because theirs do not.

    A plugin is refused whole, and what it would have replaced is back: the merge starts again without it. Offers that
    replace something come last, so that it does not matter in which order plugins are installed.
    """
    ordered = sorted(offers, key=lambda offer: offer.replace is not None)
    refused: dict[Source, PluginConflictError] = {}
    while True:
        registries: dict[str, Registry[Any]] = {kind: Registry(kind) for kind in kinds}
        replaced: dict[tuple[str, str], Offer] = {}
        for offer in ordered:
            if offer.entry.source in refused:
                continue
            try:
                _add(offer, registries[offer.kind], replaced)
            except PluginConflictError as error:
                refused[offer.entry.source] = error
                break
        else:
            return registries, refused


def _add(offer: Offer, registry: Registry[Any], replaced: dict[tuple[str, str], Offer]) -> None:
    if offer.replace is not None:
        first = replaced.setdefault((offer.kind, offer.replace), offer)
        if first is not offer:
            raise PluginConflictError(
                f"{offer.kind.replace('_', ' ')} {offer.replace!r} is replaced by both {first.entry.source} and "
                f"{offer.entry.source}; disable one of them, or choose with "
                f"Plugins.load(replace={{'{offer.kind}:{offer.replace}': '{offer.entry.source.distribution}'}})"
            )
    registry.add(offer.entry, offer.replace)


def choose(offers: Sequence[Offer], choices: Mapping[str, str], kinds: Sequence[str]) -> list[Offer]:
    """Apply the user's choices, ``{"decoder:greedy": "my-dist"}``: everybody else gives that name up.

    Raises:
        ConfigError: a choice names a kind that does not exist, or a plugin that does not register the name.
    """
    remaining = list(offers)
    for key, owner in choices.items():
        kind, _, name = key.partition(":")
        if kind not in kinds or not name:
            raise ConfigError(f"replace={{{key!r}: …}}: write '<kind>:<name>', with a kind of {listing(kinds)}")
        claims = [offer for offer in remaining if offer.kind == kind and name in offer.names]
        if not any(is_named(offer.entry.source, (owner,)) for offer in claims):
            raise ConfigError(
                f"replace={{{key!r}: {owner!r}}}: {owner!r} registers no {kind.replace('_', ' ')} {name!r} "
                f"(those who do: {listing({offer.entry.source.distribution for offer in claims})})"
            )
        remaining = [kept for offer in remaining if (kept := _give_up(offer, kind, name, owner)) is not None]
    return remaining


def _give_up(offer: Offer, kind: str, name: str, owner: str) -> Offer | None:
    """What is left of an offer when ``owner`` gets ``name``: an alias is dropped alone, a name with its entry."""
    if offer.kind != kind or is_named(offer.entry.source, (owner,)):
        return offer
    if offer.entry.name == name:
        return None
    aliases = tuple(alias for alias in offer.entry.aliases if alias != name)
    kept = None if offer.replace == name else offer.replace
    return replace(offer, entry=replace(offer.entry, aliases=aliases), replace=kept)
