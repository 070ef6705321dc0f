"""Finding plugins: list entry points, filter, check requirements without importing, import, check what was imported.

Nothing here registers anything, and nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pluggy
from packaging.utils import canonicalize_name

from trtllm_core.errors import PluginLoadError
from trtllm_core.plugin.markers import PROJECT
from trtllm_core.plugin.registrar import Source
from trtllm_core.plugin.specs import HOOK_KINDS
from trtllm_core.plugin.versions import CORE, LOCAL, check_hook_api, check_requires, refusal


@dataclass(frozen=True, slots=True)
class PluginReport:
    """What became of one plugin. ``trtllm-core plugins`` prints these."""

    plugin: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    """Hooks that it implements; empty where it was never imported."""
    status: Literal["loaded", "disabled", "failed"]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that was listed, before anything of it was imported."""

    source: Source
    load: Callable[[], object]
    requires: tuple[str, ...] = ()
    """The distribution's Requires-Dist lines."""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin that was imported and passed every check."""

    source: Source
    plugin: object
    hooks: tuple[str, ...]
    required: bool


def is_named(source: Source, names: Iterable[str]) -> bool:
    """Whether ``names`` holds the plugin's own name or, however it is spelt, that of its distribution."""
    names = set(names)
    return source.plugin in names or canonicalize_name(source.distribution) in {canonicalize_name(n) for n in names}


def list_candidates(
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
    require: Collection[str] = (),
    extra: Sequence[object] = (),
) -> list[Candidate]:
    """All plugins that there are, importing none: the core's own, then by distribution, then what was passed in.

    ``entry_points`` stands in for those that are installed.
    """
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=PROJECT)
    listed = [_installed(point, require) for point in entry_points]
    listed.sort(key=_place)
    listed += [_passed(plugin) for plugin in {id(plugin): plugin for plugin in extra}.values()]
    return _unique(listed)


def _place(candidate: Candidate) -> tuple[bool, str, str]:
    distribution = canonicalize_name(candidate.source.distribution)
    return distribution != CORE, distribution, candidate.source.plugin


def _installed(point: importlib.metadata.EntryPoint, require: Collection[str]) -> Candidate:
    name, version, requires = "unknown", "unknown", None
    if (dist := point.dist) is not None:
        # The metadata of a damaged installation may lack any of them.
        name, version, requires = dist.metadata["Name"] or name, dist.metadata["Version"] or version, dist.requires
    source = Source(point.name, name, version)
    return Candidate(source, point.load, tuple(requires or ()), is_named(source, require))


def _passed(plugin: object) -> Candidate:
    name = getattr(plugin, "__name__", None) or type(plugin).__name__
    source = Source(name, LOCAL, str(getattr(plugin, "__version__", "0")))
    return Candidate(source, lambda: plugin, required=True)


def _unique(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Number those that share all names: two instances of one class, passed in."""
    seen: dict[Source, int] = {}
    result = []
    for candidate in candidates:
        source = candidate.source
        count = seen[source] = seen.get(source, 0) + 1
        if count > 1:
            candidate = replace(candidate, source=replace(source, plugin=f"{source.plugin}#{count}"))
        result.append(candidate)
    return result


def why_disabled(source: Source, allow: Collection[str] | None, deny: Collection[str]) -> str:
    """Why the allow and deny lists keep a plugin out; empty when they do not.

    The allow list concerns neither the core's own plugins nor those that the caller passed in.
    """
    if source.distribution == LOCAL:
        return ""
    if is_named(source, deny):
        return "it is on the deny list"
    if allow is not None and not is_named(source, allow) and canonicalize_name(source.distribution) != CORE:
        return "it is not on the allow list"
    return ""


def admit(candidate: Candidate, core: str) -> Found:
    """Import a plugin and check it, registering nothing.

    Raises:
        PluginLoadError: it cannot be used; the message names it, the cause, and what mends it.
    """
    source = candidate.source
    try:
        check_requires(source, candidate.requires, core)
        plugin = _import(candidate)
        hooks = _check_plugin(plugin, source)
        check_hook_api(getattr(plugin, "hook_api", None), {HOOK_KINDS[hook] for hook in hooks}, source, core)
    except PluginLoadError:
        raise
    except Exception as error:  # metadata that cannot be evaluated, attributes that raise
        raise refusal(source, f"could not be examined: {type(error).__name__}: {error}") from error
    return Found(source, plugin, hooks, candidate.required)


def _import(candidate: Candidate) -> object:
    try:
        return candidate.load()
    except (Exception, SystemExit) as error:
        mend = f"pip install --upgrade --force-reinstall {candidate.source.distribution}"
        cause = f"could not be imported: {type(error).__name__}: {error}"
        raise refusal(candidate.source, cause, mend) from error


def _check_plugin(plugin: Any, source: Source) -> tuple[str, ...]:
    """The known hooks that a plugin implements.

    Raises:
        PluginLoadError: it is not a module or an instance, or an implementation is malformed.
    """
    if inspect.isclass(plugin):
        name = plugin.__name__
        raise refusal(source, f"is the class {name}; name an instance instead: plugin = {name}()")
    if not isinstance(plugin, types.ModuleType):
        if callable(plugin) and hasattr(plugin, "__code__"):
            raise refusal(source, f"is the function {plugin!r}; name the module or an instance instead")
        _check_hashable(plugin, source)
    hooks: list[str] = []
    manager = pluggy.PluginManager(PROJECT)  # reads markers; nothing is registered with it
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in HOOK_KINDS and manager.parse_hookspec_opts(plugin, name) is None:
                raise refusal(source, f"has {name} without a marker; decorate it with @trtllm_core.plugin.hookimpl")
            continue
        hook = options.get("specname") or name
        if hook in HOOK_KINDS:
            wrapper = bool(options.get("wrapper") or options.get("hookwrapper"))
            _check_function(getattr(plugin, name), hook, wrapper, source)
            hooks.append(hook)
        elif not options.get("optionalhook"):
            near = difflib.get_close_matches(hook, HOOK_KINDS, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise refusal(source, f"implements {hook!r}, which is no hook of this {CORE}{guess}")
    if not hooks:
        raise refusal(source, "implements no hook; decorate functions or methods with @trtllm_core.plugin.hookimpl")
    if twice := {hook for hook in hooks if hooks.count(hook) > 1}:
        raise refusal(source, f"implements {min(twice)} more than once; make it one function")
    return tuple(sorted(hooks))


def _check_hashable(plugin: object, source: Source) -> None:
    try:
        hash(plugin)
    except TypeError:
        raise refusal(source, "is an instance that cannot be hashed; a dataclass needs @dataclass(eq=False)") from None


def _check_function(function: Callable[..., Any], hook: str, wrapper: bool, source: Source) -> None:
    """pluggy accepts these shapes and then calls them with something else than their author meant, or not at all."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            raise refusal(source, f"gives argument {parameter.name!r} of {hook} a default; remove the default")
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise refusal(
                source, f"declares {str(parameter)!r} in {hook}; name plain arguments, as the hook's spec does"
            )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise refusal(source, f"implements {hook} as a coroutine; hooks are called synchronously")
    if inspect.isgeneratorfunction(function) and not wrapper:
        raise refusal(source, f"implements {hook} as a generator; remove the yield, or mark it hookimpl(wrapper=True)")
