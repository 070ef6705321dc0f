"""What a kit examines: one registered thing, found by its name, its class or the module that registers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.errors import PydanticInvalidForJsonSchema

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.planner import Planner
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import (
    DecoderRegistrar,
    Entry,
    KVPolicyRegistrar,
    LogitsProcessorRegistrar,
    Plugins,
    Registry,
    Source,
    StoppingCriterionRegistrar,
    hookimpl,
)
from trtllm_core.plugin.lifecycle import SlotPlugin

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of plugin that is registered by name."""

    name: str
    """As in ``HOOK_VERSIONS``."""
    hook: str
    registrar: type[Any]
    registry: str
    """Attribute of ``Plugins``."""
    field: str
    """Field of SamplingConfig that names one; empty where none does."""


LOGITS_PROCESSOR = Kind(
    "logits_processor",
    "trtllm_register_logits_processors",
    LogitsProcessorRegistrar,
    "logits_processors",
    "logits_processors",
)
STOPPING_CRITERION = Kind(
    "stopping_criterion",
    "trtllm_register_stopping_criteria",
    StoppingCriterionRegistrar,
    "stopping_criteria",
    "stopping_criteria",
)
KV_POLICY = Kind("kv_policy", "trtllm_register_kv_policies", KVPolicyRegistrar, "kv_policies", "")
DECODER = Kind("decoder", "trtllm_register_decoders", DecoderRegistrar, "decoders", "decoder")

KINDS = {kind.name: kind for kind in (LOGITS_PROCESSOR, STOPPING_CRITERION, DECODER)}


@dataclass(frozen=True)
class Case:
    """A request that is tried: what it asks for, and the plugin's parameters as its ``Params`` made them."""

    sampling: SamplingConfig
    params: Any
    label: str

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Subject:
    """A registered plugin, and the plugins that it is registered with."""

    kind: Kind
    name: str
    plugins: Plugins

    @property
    def entry(self) -> Entry[Any]:
        """Where and how it is registered."""
        registry: Registry[Any] = getattr(self.plugins, self.kind.registry)
        return registry.get(self.name)

    def make(self) -> Any:
        """A new object of it, as a session makes one."""
        return self.entry.load()()

    def takes_objects(self) -> bool:
        """Whether some of its parameters are no JSON, such as an engine, so that they cannot be written down."""
        model = self.make().Params
        try:
            if model is not None:
                model.model_json_schema()
        except PydanticInvalidForJsonSchema:
            return True
        return False

    def request(
        self, params: Mapping[str, Any], sampling: Mapping[str, Any], end_ids: tuple[int, ...] = ()
    ) -> SamplingConfig:
        """A request that asks for the plugin by name. It samples, unless ``sampling`` or a decoder says otherwise.

        Raises:
            ConfigError: ``sampling`` is no SamplingConfig.
        """
        use: Any = {"name": self.name, "params": dict(params)}
        fields = {"end_id": end_ids, "max_new_tokens": 24, **sampling}
        if self.kind is DECODER:
            return SamplingConfig(**{**fields, "decoder": use})
        return SamplingConfig(**{"top_k": 0, "top_p": 1.0, **fields, self.kind.field: (use,)})

    def case(self, params: Mapping[str, Any], sampling: Mapping[str, Any], end_ids: tuple[int, ...]) -> Case:
        """The request as the core plans it.

        Raises:
            ConfigError: the plugin, or the rest of the plan, refuses it.
        """
        request = self.request(params, sampling, end_ids)
        said = [f"{name}={value!r}" for name, value in {**sampling, **params}.items()]
        return Case(request, self.planned(request).params, ", ".join(said) or "its defaults")

    def planned(self, request: SamplingConfig) -> PlanItem:
        """The plugin's place in the plan of a request that names it.

        Raises:
            ConfigError: the plugin, or the rest of the plan, refuses the request.
        """
        needs = getattr(self.make(), "capabilities", None)
        plan = Planner(self.plugins, frozenset({"text", "companions"}) | getattr(needs, "needs", frozenset())).plan(
            request
        )
        return next(item for item in plan.items if item.name == self.name)


def resolve(kind: Kind, plugin: object, name: str | None) -> Subject:
    """Find what is meant.

    Args:
        plugin: the name under which an installed plugin registered it; a class or another factory of it; or a module
            or instance with hooks.
        name: which of several things that a module registers.

    Raises:
        ConfigError: a module registers nothing of the kind, or several things and ``name`` is None.
    """
    if isinstance(plugin, str):
        plugins = Plugins.load()
        registry: Registry[Any] = getattr(plugins, kind.registry)
        return Subject(kind, registry.get(plugin).name, plugins)
    if hasattr(plugin, "hook_api"):
        names = _registered(kind, plugin)
        if name is None and len(names) != 1:
            raise ConfigError(f"{plugin!r} registers {len(names)} things of kind {kind.name}: say which by `name`")
        return Subject(kind, names[0] if name is None else name, Plugins.load(extra=[plugin]))
    if not callable(plugin):
        raise ConfigError(f"`plugin` is {plugin!r}: give a class, a module that registers one, or a registered name")
    called = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    return Subject(kind, called, Plugins.load(extra=[_Local(kind, called, plugin)]))


def _registered(kind: Kind, plugin: object) -> list[str]:
    registry: Registry[Any] = Registry(kind.name)
    hook = getattr(plugin, kind.hook, None)
    if hook is not None:
        hook(kind.registrar(registry, Source("kit", "kit", "0")))
    return [entry.name for entry in registry]


class _Local:
    """Registers one class, as a plugin module would."""

    def __init__(self, kind: Kind, name: str, factory: Any) -> None:
        self.hook_api = f"{kind.name}>=1.0,<2"
        self.__name__ = name
        setattr(self, kind.hook, hookimpl(_adds(kind, name, factory)))


def _adds(kind: Kind, name: str, factory: Any) -> Any:
    def register(registrar: Any) -> None:
        registrar.add(name, factory, **({"consumes": ("random_seed",)} if kind is DECODER else {}))

    return register


def needs_of(plugin: SlotPlugin) -> frozenset[str]:
    """What a plugin must be given."""
    found: frozenset[str] = getattr(plugin, "capabilities").needs  # noqa: B009 (each kind has its own class of them)
    return found
