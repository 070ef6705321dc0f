"""``Plugins``: loads plugins, asks them what they register, and tells observers. The only place that calls hooks."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any, Literal

import pluggy
from packaging.utils import canonicalize_name

from trtllm_core.errors import ConfigError, PluginError, PluginLoadError, listing
from trtllm_core.plugin.backend import Backend
from trtllm_core.plugin.decoder import Decoder, Sampler
from trtllm_core.plugin.family import ModelFamily
from trtllm_core.plugin.kv_policy import KVPolicy
from trtllm_core.plugin.loader import (
    Candidate,
    Found,
    PluginReport,
    admit,
    is_named,
    list_candidates,
    why_disabled,
)
from trtllm_core.plugin.logits import LogitsProcessor
from trtllm_core.plugin.markers import PROJECT
from trtllm_core.plugin.merge import Offer, Recorder, choose, merge
from trtllm_core.plugin.observer import RequestStats, SessionStats, StepStats
from trtllm_core.plugin.registrar import (
    BackendRegistrar,
    DecoderRegistrar,
    KVPolicyRegistrar,
    LogitsProcessorRegistrar,
    ModelFamilyRegistrar,
    Registrar,
    Registry,
    Source,
    StoppingCriterionRegistrar,
)
from trtllm_core.plugin.specs import HOOK_KINDS, SPECS
from trtllm_core.plugin.stopping import StoppingCriterion
from trtllm_core.plugin.versions import LOCAL, refusal
from trtllm_core.version import __version__

log = logging.getLogger(__name__)

REGISTRARS: dict[str, type[Registrar[Any]]] = {
    "trtllm_register_model_families": ModelFamilyRegistrar,
    "trtllm_register_decoders": DecoderRegistrar,
    "trtllm_register_logits_processors": LogitsProcessorRegistrar,
    "trtllm_register_stopping_criteria": StoppingCriterionRegistrar,
    "trtllm_register_kv_policies": KVPolicyRegistrar,
    "trtllm_register_backends": BackendRegistrar,
}
"""What each registering hook is given. All other hooks notify observers."""

KINDS = tuple(HOOK_KINDS[hook] for hook in REGISTRARS)


class Plugins:
    """The plugins of one user of the core, and what they registered. ``Plugins()`` has none; see ``load``."""

    model_families: Registry[ModelFamily]
    decoders: Registry[Sampler | Decoder]
    logits_processors: Registry[LogitsProcessor]
    stopping_criteria: Registry[StoppingCriterion]
    kv_policies: Registry[KVPolicy]
    backends: Registry[Backend]

    def __init__(self) -> None:
        self._pm = pluggy.PluginManager(PROJECT)
        for spec in SPECS.values():
            self._pm.add_hookspecs(spec)
        self._found: dict[str, Found] = {}
        self._reports: dict[Source, PluginReport] = {}
        self._observers: dict[str, list[tuple[Source, Callable[..., Any]]]] = {}
        self._observer_errors: dict[tuple[Source, str], int] = {}
        self._set_registries({kind: Registry(kind) for kind in KINDS})

    @classmethod
    def load(
        cls,
        *,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        require: Sequence[str] = (),
        extra: Sequence[object] = (),
        replace: Mapping[str, str] | None = None,
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
        version: str = __version__,
    ) -> Plugins:
        """Load the installed plugins and those in ``extra``. A plugin that fails is recorded; see ``report``.

        Args:
            allow: the only plugins to load, by entry point or distribution; None allows all. The core's own plugins
                and ``extra`` need not be listed.
            deny: plugins not to import, by entry point or distribution.
            require: plugins that must load, by entry point or distribution.
            extra: modules or instances that are not installed; all of them must load.
            replace: who gets a name that several claim: ``{"decoder:greedy": "my-distribution"}``.
            entry_points: stands in for the installed entry points of group ``trtllm_core``.
            version: stands in for the version of trtllm-core.

        Raises:
            PluginLoadError: a required plugin is not there, or cannot be loaded.
            PluginConflictError: a required plugin claims a name that another plugin has.
            ConfigError: the arguments contradict each other.
        """
        for argument, value in {"allow": allow, "deny": deny, "require": require}.items():
            if isinstance(value, str):
                raise ConfigError(f"{argument}={value!r}: give a sequence of names, such as [{value!r}]")
        plugins = cls()
        plugins._find(list_candidates(entry_points, require, extra), allow, deny, require, version)
        # pluggy calls what was registered last first; we mean the order of discovery.
        for found in reversed(list(plugins._found.values())):
            plugins._register(found)
        plugins._pm.check_pending()
        plugins._merge(plugins._collect(), replace or {})
        plugins._observers = {
            hook: [(found.source, call) for found, call in plugins._callers(hook)]
            for hook in HOOK_KINDS
            if hook not in REGISTRARS
        }
        return plugins

    @property
    def observes_steps(self) -> bool:
        """Whether anybody listens to ``on_step_end``: if not, its statistics need not be made."""
        return bool(self._observers.get("trtllm_on_step_end"))

    def on_session_start(self, stats: SessionStats) -> None:
        """Tell observers that a session is ready."""
        self._notify("trtllm_on_session_start", stats)

    def on_step_end(self, stats: StepStats) -> None:
        """Tell observers that a step is over."""
        self._notify("trtllm_on_step_end", stats)

    def on_request_end(self, stats: RequestStats) -> None:
        """Tell observers that a request is over."""
        self._notify("trtllm_on_request_end", stats)

    def on_session_end(self, stats: SessionStats) -> None:
        """Tell observers that a session is closed."""
        self._notify("trtllm_on_session_end", stats)

    def report(self) -> tuple[PluginReport, ...]:
        """What became of each plugin, in the order of discovery."""
        return tuple(self._reports.values())

    def missing_hint(self, kind: str, name: str, distribution: str | None = None) -> str:
        """What to do when nothing of ``kind`` is registered as ``name``: a sentence for an error message.

        ``distribution`` is who provided it when it was there, where that is known, as in an engine's ``config.json``;
        else the naming convention ``trtllm-plugin-<name>`` is followed.
        """
        if distribution == LOCAL:
            return f"It came from a plugin that was passed to Plugins.load(extra=…): pass it again to have {name!r}"
        wanted = distribution or _conventional(name)
        names = (wanted,) if distribution else (wanted, name)
        here = [report for source, report in self._reports.items() if is_named(source, names)]
        for report in here:
            if report.status != "loaded":
                verb = "was not loaded" if report.status == "failed" else "is disabled"
                return f"{report.distribution} {report.version} is installed, but {verb}: {report.why}"
        if here:
            wanted, version = here[0].distribution, here[0].version
            what = f"{kind.replace('_', ' ')} {name!r}"
            return f"{wanted} {version} is loaded, but has no {what}; try: pip install --upgrade {wanted}"
        return f"To install it: pip install {wanted}"

    def _find(
        self,
        candidates: Sequence[Candidate],
        allow: Sequence[str] | None,
        deny: Sequence[str],
        require: Sequence[str],
        core: str,
    ) -> None:
        """Import and check all candidates that the lists let through."""
        for name in require:
            if not any(is_named(candidate.source, (name,)) for candidate in candidates):
                known = listing({candidate.source.plugin for candidate in candidates})
                wanted = name if name.startswith("trtllm-") else _conventional(name)
                raise PluginLoadError(f"plugin {name!r} is not installed (installed: {known}); pip install {wanted}")
        for candidate in candidates:
            if why := why_disabled(candidate.source, allow, deny):
                if candidate.required:
                    raise ConfigError(f"plugin {candidate.source} is required, but {why}")
                self._record(candidate.source, (), "disabled", why)
                continue
            try:
                found = admit(candidate, core)
            except PluginLoadError as error:
                self._refuse(candidate, error)
                continue
            if same := next((other for other in self._found.values() if other.plugin is found.plugin), None):
                # Listed twice, or installed and passed in as well: once is enough, and required if either was.
                self._found[str(same.source)] = changed(same, required=same.required or found.required)
                self._record(found.source, found.hooks, "disabled", f"it is the same object as plugin {same.source}")
                continue
            self._found[str(found.source)] = found
            self._record(found.source, found.hooks, "loaded")

    def _register(self, found: Found) -> None:
        try:
            self._pm.register(found.plugin, name=str(found.source))
        except (pluggy.PluginValidationError, ValueError) as error:
            self._refuse(found, refusal(found.source, f"does not fit its hooks: {error}"))

    def _callers(self, hook: str) -> Iterator[tuple[Found, Callable[..., Any]]]:
        """One caller for each plugin that implements ``hook``, in pluggy's order.

        Plugins are called one by one, so that each has its own registrar, and its own failure. Wrappers are called
        around every one of them.
        """
        implementations = getattr(self._pm.hook, hook).get_hookimpls()
        wrappers = {impl.plugin for impl in implementations if impl.wrapper or impl.hookwrapper}
        for impl in reversed(implementations):
            if impl.plugin not in wrappers:
                others = self._pm.get_plugins() - wrappers - {impl.plugin}
                yield self._found[impl.plugin_name], self._pm.subset_hook_caller(hook, others)

    def _collect(self) -> list[Offer]:
        """Call the registering hooks. A plugin that raises in one of them is out with all that it registered."""
        offers: list[Offer] = []
        for hook, registrar in REGISTRARS.items():
            for found, call in list(self._callers(hook)):
                recorder = Recorder(HOOK_KINDS[hook])
                try:
                    call(registrar=registrar(recorder, found.source))
                except Exception as error:
                    cause = f"failed in {hook}: {type(error).__name__}: {error}"
                    failure = refusal(found.source, cause)
                    failure.__cause__ = error
                    self._refuse(found, failure)
                recorder.open = False
                offers += recorder.offers
        return [offer for offer in offers if self._reports[offer.entry.source].status == "loaded"]

    def _merge(self, offers: Sequence[Offer], choices: Mapping[str, str]) -> None:
        registries, refused = merge(choose(offers, choices, KINDS), KINDS)
        by_source = {found.source: found for found in self._found.values()}
        for source, conflict in refused.items():
            self._refuse(by_source[source], conflict)
        self._set_registries(registries)

    def _set_registries(self, registries: Mapping[str, Registry[Any]]) -> None:
        self.model_families = registries["model_family"]
        self.decoders = registries["decoder"]
        self.logits_processors = registries["logits_processor"]
        self.stopping_criteria = registries["stopping_criterion"]
        self.kv_policies = registries["kv_policy"]
        self.backends = registries["backend"]

    def _refuse(self, plugin: Candidate | Found, error: PluginError) -> None:
        """Record a failure, or raise it where the plugin was asked for. Nothing of the plugin stays registered."""
        if plugin.required:
            raise error
        if self._pm.has_plugin(str(plugin.source)):
            self._pm.unregister(name=str(plugin.source))
        self._record(plugin.source, plugin.hooks if isinstance(plugin, Found) else (), "failed", str(error))

    def _record(
        self, source: Source, hooks: tuple[str, ...], status: Literal["loaded", "disabled", "failed"], why: str = ""
    ) -> None:
        self._reports[source] = PluginReport(source.plugin, source.distribution, source.version, hooks, status, why)

    def _notify(self, hook: str, stats: SessionStats | StepStats | RequestStats) -> None:
        for source, call in self._observers.get(hook, ()):
            try:
                call(stats=stats)
            except Exception as error:  # observers must not break generation
                count = self._observer_errors[source, hook] = self._observer_errors.get((source, hook), 0) + 1
                why = f"{hook} raised {type(error).__name__}: {error} ({count} time{'s' if count > 1 else ''})"
                self._reports[source] = changed(self._reports[source], why=why)
                if count == 1:
                    log.warning("observer %s: %s; further errors are counted, not logged", source, why, exc_info=error)


def _conventional(name: str) -> str:
    """Distribution that by convention provides ``name``: ``LlamaForCausalLM`` is of ``trtllm-plugin-llama``."""
    stem = re.sub(r"(?<=.)(ForCausalLM|LMHeadModel|Model)$", "", name.removeprefix("gguf:"))
    return f"trtllm-plugin-{canonicalize_name(_SHARED.get(stem.lower(), stem.lower()))}"


_SHARED = {
    **dict.fromkeys(("mistral", "phi3", "qwen2", "qwen3"), "llama"),
    **dict.fromkeys(("gpt2", "gptj", "gptneox", "gpt_neox"), "gpt"),
}
"""Architectures whose package has the name of a relative."""
