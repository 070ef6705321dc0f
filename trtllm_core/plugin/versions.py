"""Versions of hooks: what a plugin declares in ``hook_api``, what this core offers, and what to install."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from trtllm_core.errors import PluginLoadError, PluginVersionError, listing
from trtllm_core.plugin.markers import HOOK_VERSIONS
from trtllm_core.plugin.registrar import Source
from trtllm_core.version import __version__

CORE = "trtllm-core"
"""Name of this distribution."""
LOCAL = "local"
"""Stands for the distribution of a plugin that the caller passed in."""

_DECLARATION = re.compile(r"\s*([A-Za-z_]\w*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class HookRange:
    """The versions of one hook kind that a plugin implements."""

    kind: str
    versions: SpecifierSet
    text: str
    """As the plugin's author wrote it."""


def parse(declaration: str) -> HookRange:
    """Read a declaration such as ``"logits_processor>=1.0,<2"``.

    Raises:
        ValueError: saying what is wrong with it.
    """
    match = _DECLARATION.fullmatch(declaration)
    if match is None:
        raise ValueError(f"{declaration!r} does not begin with a hook kind")
    kind, versions = match.groups()
    try:
        specifiers = SpecifierSet(versions)
    except InvalidSpecifier:
        raise ValueError(f"{versions!r} in {declaration!r} is no version range") from None
    if not specifiers:
        raise ValueError(f"{declaration!r} has no version range")
    return HookRange(kind, specifiers, declaration.strip())


def suggest(kinds: Iterable[str], offered: Mapping[str, str] = HOOK_VERSIONS) -> str:
    """The line that a plugin of these kinds should have: ``hook_api = "decoder>=1.0,<2"``."""
    ranges = [f'"{kind}>={offered[kind]},<{Version(offered[kind]).major + 1}"' for kind in sorted(kinds)]
    return f"hook_api = {ranges[0] if len(ranges) == 1 else '(' + ', '.join(ranges) + ')'}"


def check_hook_api(
    hook_api: object,
    implemented: Collection[str],
    source: Source,
    core: str = __version__,
    offered: Mapping[str, str] = HOOK_VERSIONS,
) -> None:
    """Hold what a plugin declares against the kinds that it implements and the versions that are offered.

    Raises:
        PluginLoadError: the declaration is missing, incomplete or unreadable.
        PluginVersionError: a version does not fit.
    """
    line = f"add the line {suggest(implemented, offered)}"
    declarations = (hook_api,) if isinstance(hook_api, str) else hook_api
    if declarations is None:
        raise refusal(source, f"does not say which hook versions it implements; {line}")
    if not isinstance(declarations, (tuple, list)) or not all(isinstance(item, str) for item in declarations):
        raise refusal(source, f"has hook_api = {hook_api!r}, which is no string and no sequence of strings; {line}")
    try:
        ranges = [parse(item) for item in declarations]
    except ValueError as error:
        raise refusal(source, f"has a hook_api that cannot be read: {error}; {line}") from None
    for declared in ranges:
        _check_range(declared, source, core, offered)
    missing = set(implemented) - {declared.kind for declared in ranges}
    if missing:
        raise refusal(source, f"implements hooks of kind {listing(missing)}, which hook_api does not declare; {line}")


def _check_range(declared: HookRange, source: Source, core: str, offered: Mapping[str, str]) -> None:
    if declared.kind not in offered:
        near = difflib.get_close_matches(declared.kind, offered, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        what = f"this {CORE} {core} has no hook kind {declared.kind!r} (it has {listing(offered)}){guess}"
        newer = not near
    else:
        version = offered[declared.kind]
        if declared.versions.contains(version, prereleases=True):
            return
        what = f"this {CORE} {core} offers {declared.kind} {version}"
        newer = wants_newer(declared.versions, version)
    raise refusal(source, f"implements {declared.text}, but {what}", _upgrade(source, newer), PluginVersionError)


def check_requires(source: Source, requires: Iterable[str], core: str = __version__) -> None:
    """Hold a distribution's own requirement on the core (``Requires-Dist``) against the running version.

    Raises:
        PluginVersionError: it requires another version.
    """
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # not ours to judge; pip accepted it
        if canonicalize_name(requirement.name) != CORE:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(core, prereleases=True):
            newer = wants_newer(requirement.specifier, core)
            mend = f"pip install '{CORE}{requirement.specifier}'" if newer else _upgrade(source, newer=False)
            raise refusal(
                source, f"requires {CORE}{requirement.specifier}, but this is {CORE} {core}", mend, PluginVersionError
            )


def wants_newer(versions: SpecifierSet, offered: str) -> bool:
    """Whether a range that excludes ``offered`` lies above it, rather than below."""
    have = Version(offered)
    for specifier in versions:
        try:
            version = Version(specifier.version.removesuffix(".*"))
        except InvalidVersion:
            continue
        if specifier.operator in {">=", "==", "~=", "==="} and version > have:
            return True
        if specifier.operator == ">" and version >= have:
            return True
    return False


def refusal(
    source: Source, cause: str, mend: str | None = None, error: type[PluginLoadError] = PluginLoadError
) -> PluginLoadError:
    """The error for a plugin that is not let in: plugin, distribution, version, cause, and what mends it."""
    if mend is None:
        mend = _upgrade(source, newer=False)
    who = f"plugin {source.plugin!r} of {source.distribution} {source.version}"
    if source.distribution == LOCAL:
        who = f"plugin {source.plugin!r}"
    return error(f"{who} {cause}" + (f". To mend it: {mend}" if mend else ""))


def _upgrade(source: Source, newer: bool) -> str:
    """What to install: a newer core, or another release of the plugin."""
    if newer:
        return f"pip install --upgrade {CORE}"
    return "" if source.distribution == LOCAL else f"pip install --upgrade {source.distribution}"
