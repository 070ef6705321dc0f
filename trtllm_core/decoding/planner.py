"""The planner: resolves what a request asks for to a plan, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_core.config import BuildConfig, PluginUse, SamplingConfig
from trtllm_core.decoding.branching import branching_of, overrides, positions_of
from trtllm_core.decoding.companion_prompts import check_slots, companions_of
from trtllm_core.decoding.idle import asks_greedy, idle_of
from trtllm_core.decoding.making import check_kind, made, parameters
from trtllm_core.decoding.order import PRESETS, ordered
from trtllm_core.decoding.plan import Plan, PlanItem
from trtllm_core.decoding.planned import LastPlan
from trtllm_core.errors import ConfigError, listing
from trtllm_core.plugin import (
    Decoder,
    DecoderCapabilities,
    DeviceStoppingCriterion,
    LogitsProcessor,
    Plugins,
    Sampler,
    StoppingCriterion,
)
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.plugin.registrar import Registry

CORE_FIELDS = frozenset(
    {
        "pad_id",
        "output_sequence_lengths",
        "return_dict",
        "output_cum_log_probs",
        "output_log_probs",
        "num_logprobs",
        "prompt_logprobs",
        "max_attention_window_size",
        "sink_token_length",
        "cache_salt",
        "cache_priority",
        "preset",
        "decoder",
        "logits_processors",
        "stopping_criteria",
    }
)
"""Fields of SamplingConfig that the generation loop honours itself."""

SAMPLER_FIELDS = frozenset({"num_return_sequences", "normalize_log_probs"})
"""Fields that it honours for requests whose decoder is a sampler."""


SHOWN_LOGITS = (Sampler, Decoder, DeviceStoppingCriterion)
"""Kinds whose ``commit`` is shown the logits that tokens were chosen from, where they need them."""


def offers(
    text: bool, multi_position: bool = True, kv_rewind: bool = True, hidden_states: bool = False
) -> frozenset[str]:
    """What this loop can give a plugin that ``needs`` something.

    Args:
        text: the engine has a tokenizer.
        multi_position: the backend runs several positions of a row in one call.
        kv_rewind: tokens can leave the cache again. See ``Planner.follow``.
        hidden_states: the backend gives them.
    """
    wanted = {
        "text": text,
        "multi_position": multi_position,
        "kv_rewind": kv_rewind,
        "hidden_states": hidden_states,
    }
    return frozenset(
        {"kv_fork", "companions", "sampler", "distribution"} | {name for name, there in wanted.items() if there}
    )


@dataclass
class Planner:
    """Resolves plans for one session, whose plugin objects it owns: one of a kind and name, for all requests."""

    plugins: Plugins
    offers: frozenset[str] = frozenset()
    """What backend, loop and engine can give a plugin: see the plugins' ``needs``."""
    build: BuildConfig | None = None
    """The engine's limits; None: not known."""
    _objects: dict[tuple[str, str], SlotPlugin] = field(default_factory=dict)
    _rewindable: int | None = None
    _last: LastPlan = field(default_factory=LastPlan)

    def follow(self, rewindable: int | None) -> None:
        """The cache is one that can take back so many tokens; None: all. None can leave an attention window's ring."""
        self._rewindable = rewindable
        self._last.forget()
        self.offers = self.offers - {"kv_rewind"} if rewindable == 0 else self.offers | {"kv_rewind"}

    def plan(
        self,
        sampling: SamplingConfig,
        processors: Sequence[LogitsProcessor] = (),
        criteria: Sequence[StoppingCriterion] = (),
        beside: Iterable[PlanItem] = (),
        prompt: Sequence[int] = (),
    ) -> Plan:
        """The plan of a request; ``processors`` and ``criteria`` are objects that the user passed in.

        ``beside`` are the processors of requests of its preset that it will run together with: there is one order for
        all of them.
        ``prompt`` is what its decoder is shown to say how many branches it needs, and its processors, to say what is
        to run beside them.

        Raises:
            ConfigError: a field that nobody honours, a wish that this session cannot meet, an order that
                contradicts itself or that of other requests, or parameters that a plugin refuses.
            CapacityError: more branches than the engine was built for.
            PluginError: a plugin that is not there or cannot be made, or that declares what its kind cannot do.
        """
        last = None if processors or criteria else self._last.of(sampling)
        if last is not None and {item.key for item in beside} <= {item.key for item in last.processors}:
            return last
        plan = self._plan(sampling, processors, criteria, beside, prompt)
        if isinstance(plan.decoder.plugin, Sampler) and not (processors or criteria or plan.companions):
            self._last.keep(sampling, plan)
        return plan

    def _plan(
        self,
        sampling: SamplingConfig,
        processors: Sequence[LogitsProcessor],
        criteria: Sequence[StoppingCriterion],
        beside: Iterable[PlanItem],
        prompt: Sequence[int],
    ) -> Plan:
        decoder = self._decoder(sampling)
        sampler = self._sampler(sampling, decoder)
        own = decoder.consumes if sampler is None else decoder.consumes | sampler.consumes
        named = {use.name for use in sampling.logits_processors}
        wanted = getattr(decoder.plugin, "processors", ())
        uses = (*(PluginUse(name=name) for name in wanted if name not in named), *sampling.logits_processors)
        chosen = self._chosen("logits_processor", sampling, uses, processors, LogitsProcessor, own)
        stops = self._chosen("stopping_criterion", sampling, sampling.stopping_criteria, criteria, StoppingCriterion)
        taker = sampler or decoder
        consumers = _consumers(sampling, [*chosen, *({decoder.name: decoder, taker.name: taker}.values()), *stops])
        self._check_honoured(sampling, consumers)
        log_probs = sampling.output_log_probs or sampling.output_cum_log_probs or sampling.num_logprobs > 0
        seers = (decoder, taker, *stops)
        looks = any("logits" in item.plugin.capabilities.needs for item in seers)  # type: ignore[attr-defined]
        idle = idle_of(sampling, taker, sampling.decoder is None or sampler is not None, chosen, log_probs, looks)
        chosen = [item for item in chosen if item.key not in idle]
        notes = tuple(idle.values())
        for item in (decoder, taker, *chosen, *stops):
            offers = self.offers | {"logits"} if isinstance(item.plugin, SHOWN_LOGITS) else self.offers
            missing = item.plugin.capabilities.needs - offers  # type: ignore[attr-defined]
            if missing:
                raise ConfigError(f"plugin {item.name!r} needs {listing(missing)}, which this session cannot give it")
        chosen = ordered(chosen, sampling.preset)
        _check_beside(chosen, beside, sampling.preset)
        asked = sampling.model_dump(mode="json", include=set(sampling.asked()), fallback=_kind)
        branching = branching_of(decoder, sampling, prompt, self.build)
        companions = companions_of(chosen, sampling, prompt)
        if companions and "companions" not in self.offers:
            names = listing(one.name for one in companions)
            raise ConfigError(f"plugin {names} needs companions, which this session cannot give it")
        check_slots(branching.max_branches, companions, self.build)
        others, beside_it = [*chosen, *stops], frozenset(one.key for one in companions)
        positions, why = positions_of(branching, decoder, sampler, others, self.offers, self._rewindable, beside_it)
        return Plan(
            decoder,
            tuple(chosen),
            tuple(stops),
            consumers,
            (*notes, *why),
            log_probs,
            asked,
            branching,
            sampler,
            positions,
            companions,
        )

    def _sampler(self, sampling: SamplingConfig, decoder: PlanItem) -> PlanItem | None:
        """The sampler that a decoder which is none itself asks for: an object of its own, with a state of its own."""
        capabilities: DecoderCapabilities = decoder.plugin.capabilities  # type: ignore[attr-defined]
        needs = capabilities.needs & {"sampler", "distribution"}
        if not needs:
            return None
        use = PluginUse(name="greedy" if asks_greedy(sampling) else PRESETS[sampling.preset].sampler)
        item = self._item("sampler", self.plugins.decoders, use, (Sampler,))
        if "distribution" in needs and not overrides(item.plugin, Sampler, "distribution"):
            raise ConfigError(f"decoder {decoder.name!r} needs probabilities, which sampler {item.name!r} cannot tell")
        return item

    def _decoder(self, sampling: SamplingConfig) -> PlanItem:
        use = sampling.decoder
        if use is None:
            greedy = asks_greedy(sampling)
            name = "greedy" if greedy else PRESETS[sampling.preset].sampler
            if sampling.num_beams > 1 or sampling.beam_width_array:
                hf = "hf_beam_search" if greedy else "hf_beam_sample"
                classic = "beam_search" if sampling.use_beam_hyps else "plain_beam_search"
                name = hf if sampling.preset == "hf" else classic
            use = PluginUse(name=name)
        return self._item("decoder", self.plugins.decoders, use, (Sampler, Decoder))

    def _chosen(
        self,
        kind: str,
        sampling: SamplingConfig,
        uses: Sequence[PluginUse],
        objects: Sequence[Any],
        base: type,
        honoured: frozenset[str] = frozenset(),
    ) -> list[PlanItem]:
        """What the fields bring by themselves (those that are ``honoured`` do not), ``uses`` and ``objects``."""
        registry: Registry[Any] = getattr(
            self.plugins, {"logits_processor": "logits_processors"}.get(kind, "stopping_criteria")
        )
        named = {use.name for use in uses}
        automatic = [
            PluginUse(name=entry.name)
            for entry in registry
            if entry.name not in named
            and any(entry.needed(field, getattr(sampling, field)) for field in entry.consumes.keys() - honoured)
        ]
        items = [self._item(kind, registry, use, (base,)) for use in (*automatic, *uses)]
        for number, thing in enumerate(objects):
            check_kind(type(thing).__name__, thing, (base,), kind)
            rank = len(list(registry)) + number
            items.append(PlanItem(type(thing).__name__, thing, "passed to generate", id(thing), rank, passed=True))
        keys = [item.key for item in items]
        for item in items:
            if keys.count(item.key) > 1:
                raise ConfigError(f"{kind.replace('_', ' ')} {item.name!r} is there twice in one request; use it once")
        return items

    def _item(self, kind: str, registry: Registry[Any], use: PluginUse, bases: tuple[type, ...]) -> PlanItem:
        entry = registry.get(use.name, lambda: self.plugins.missing_hint(kind, use.name))
        key = (kind, entry.name)
        if key not in self._objects:
            self._objects[key] = made(entry, bases, kind)
        plugin = self._objects[key]
        rank = [other.name for other in registry].index(entry.name)
        return PlanItem(
            entry.name, plugin, str(entry.source), key, rank, frozenset(entry.consumes), parameters(plugin, use)
        )

    def _check_honoured(self, sampling: SamplingConfig, consumers: Mapping[str, tuple[str, ...]]) -> None:
        """Nothing is dropped silently: every field that was set needs somebody who honours it."""
        registries = (self.plugins.decoders, self.plugins.logits_processors, self.plugins.stopping_criteria)
        ignored = []
        for name in sorted(sampling.asked() - consumers.keys()):
            value = getattr(sampling, name)
            able = [entry for registry in registries for entry in registry if name in entry.consumes]
            if any(not entry.needed(name, value) for entry in able if entry.consumes[name] is not None):
                continue  # set to the value that turns its plugin off
            who = f"plugin {listing(entry.name for entry in able)} would" if able else "no installed plugin does"
            ignored.append(f"{name}={value!r} ({who})")
        if ignored:
            raise ConfigError(f"nothing in this request's plan honours {'; '.join(ignored)}")


def _kind(thing: object) -> str:
    """What stands for an object, such as a draft engine, among a request's wishes."""
    return type(thing).__name__


def _check_beside(chosen: Sequence[PlanItem], beside: Iterable[PlanItem], preset: str) -> None:
    keys = {item.key for item in chosen}
    others = {item.key: item for item in beside if item.key not in keys}
    try:
        ordered([*others.values(), *chosen], preset)
    except ConfigError as error:
        raise ConfigError(f"this request cannot run together with others of its session: {error}") from error


def _consumers(sampling: SamplingConfig, items: Iterable[PlanItem]) -> dict[str, tuple[str, ...]]:
    """Who honours each field that was set or that a plugin of the plan reads."""
    consumers: dict[str, tuple[str, ...]] = dict.fromkeys(sampling.asked() & CORE_FIELDS, ("core",))
    items = list(items)
    # What a processor cuts to top_k before a decoder scores it is normalised among those.
    if sampling.normalize_log_probs and any(item.name == "top_k" for item in items):
        consumers["normalize_log_probs"] = ("core",)
    for item in items:
        if isinstance(item.plugin, Sampler):
            consumers |= dict.fromkeys(sampling.asked() & SAMPLER_FIELDS, ("core",))
        for name in item.consumes:
            consumers[name] = (*consumers.get(name, ()), item.name)
    return consumers
