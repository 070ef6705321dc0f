"""Examining a whole package: every plugin that it registers, each by the kit of its kind."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trtllm_core.errors import ConfigError, listing
from trtllm_core.plugin import HOOK_KINDS, Plugins, Source
from trtllm_core.plugin.loader import is_named
from trtllm_core.plugin.versions import CORE
from trtllm_core.testing.backends import BackendConformance
from trtllm_core.testing.criteria import StoppingCriterionConformance
from trtllm_core.testing.kit import Conformance, Result, run_kit
from trtllm_core.testing.kv_policy import KVPolicyConformance
from trtllm_core.testing.observers import ObserverConformance
from trtllm_core.testing.processors import LogitsProcessorConformance
from trtllm_core.testing.samplers import DecoderConformance

KITS: dict[str, tuple[str, type[Conformance]]] = {
    "logits_processor": ("logits_processors", LogitsProcessorConformance),
    "stopping_criterion": ("stopping_criteria", StoppingCriterionConformance),
    "decoder": ("decoders", DecoderConformance),
    "backend": ("backends", BackendConformance),
    "kv_policy": ("kv_policies", KVPolicyConformance),
}
"""Attribute of ``Plugins`` and kit, by kind."""


@dataclass(frozen=True)
class Wishes:
    """What to try things with, by the names under which they are registered."""

    params: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Parameters; of a KV policy, options; of a model family, the transformers config of a small model."""
    sampling: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Fields of SamplingConfig."""


@dataclass(frozen=True)
class Report:
    """What became of one plugin."""

    name: str
    kind: str
    results: Sequence[Result]


def examine(package: str, wishes: Wishes) -> Iterator[Report]:
    """Examine all plugins of a distribution, or of one of its entry points. Reports come as they are made.

    Raises:
        PluginLoadError: it is not installed, or cannot be loaded.
        ConfigError: ``wishes`` are for something that it does not register.
    """
    plugins = Plugins.load(require=[package])
    found = _registered(plugins, package)
    unknown = {*wishes.params, *wishes.sampling} - {name for _, name in found}
    if unknown:
        raise ConfigError(f"{package} registers {listing(name for _, name in found)}, but not {listing(unknown)}")
    yield Report(package, "package", run_kit(_kit(PackageConformance, package)))
    for kind, name in found:
        if kind == "model_family":
            yield Report(name, kind, examine_family(name, wishes.params.get(name, ())))
        elif kind in KITS:
            given = {"params": wishes.params.get(name), "sampling": wishes.sampling.get(name)}
            attributes = {what: tried for what, tried in given.items() if tried is not None}
            yield Report(name, kind, run_kit(_kit(KITS[kind][1], name, **attributes)))
        else:
            yield Report(name, kind, run_kit(_kit(ObserverConformance, name)))


def _kit(kit: type[Conformance], plugin: str, **attributes: Any) -> type[Conformance]:
    return type(kit.__name__, (kit,), {"plugin": plugin, **attributes})


def _registered(plugins: Plugins, package: str) -> list[tuple[str, str]]:
    """(kind, name) of all that a package registers. Observers are named by their entry points."""
    registries = {kind: getattr(plugins, attribute) for kind, (attribute, _) in KITS.items()}
    registries |= {"model_family": plugins.model_families}
    found = [(k, e.name) for k, registry in registries.items() for e in registry if is_named(e.source, (package,))]
    for report in plugins.report():
        watches = any(HOOK_KINDS[hook] == "observer" for hook in report.hooks)
        if watches and is_named(Source(report.plugin, report.distribution, report.version), (package,)):
            found.append(("observer", report.plugin))
    return found


class PackageConformance(Conformance):
    """What holds for a distribution with plugins, whatever they are."""

    def distributions(self) -> set[str]:
        """The distributions that are meant."""
        name = self.given()
        reports = Plugins.load().report()
        return {r.distribution for r in reports if is_named(Source(r.plugin, r.distribution, r.version), (name,))}

    def test_registering_imports_no_torch(self) -> None:
        """Entry points name light modules: what needs torch is registered by the name of its module."""
        code = (
            "import sys; from trtllm_core.plugin import Plugins; "
            f"Plugins.load(allow=[{self.given()!r}], require=[{self.given()!r}]); sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["its entry point imports torch: name the class by a string"]
            raise AssertionError(why[0])

    def test_it_says_which_core_it_fits(self) -> None:
        """Its metadata name trtllm-core with a range that ends."""
        for name in self.distributions() - {CORE}:
            lines = [Requirement(line) for line in importlib.metadata.distribution(name).requires or ()]
            always = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
            cores = [line for line in always if canonicalize_name(line.name) == CORE]
            if not cores:
                raise AssertionError(f"{name} does not require {CORE} in its metadata: add {CORE}>=X,<Y")
            if any("1000" in line.specifier for line in cores):
                raise AssertionError(f"{name} requires {cores[0]}, which has no end: add the next version with <")


def examine_family(name: str, configs: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Run the kit of model families, which needs pytest and transformers, in a process of its own."""
    if not configs:
        hint = f"give the transformers config of a small model: --params '{name}:{{\"model_type\": …}}'"
        return [Result("test_family", "skipped", hint)]
    results: list[Result] = []
    for config in configs:
        with tempfile.TemporaryDirectory() as directory:
            results += _run_family(Path(directory), config)
    return results


FAMILY_TEST = """
import json
import transformers
from trtllm_core.testing import ModelFamilyConformance


class TestFamily(ModelFamilyConformance):
    config = transformers.AutoConfig.for_model(**json.loads({config!r}))
"""


def _run_family(directory: Path, config: Mapping[str, Any]) -> list[Result]:
    (directory / "test_family.py").write_text(FAMILY_TEST.format(config=json.dumps(dict(config))), encoding="utf-8")
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n    cuda: needs a CUDA GPU\n    slow: takes its time\n")
    options = ("-q", "-p", "no:cacheprovider", "-m", "not cuda", "--junit-xml=results.xml")
    command = [sys.executable, "-m", "pytest", *options, "test_family.py"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    path = directory / "results.xml"
    if not path.exists():
        return [Result("test_family", "failed", (done.stderr or done.stdout).strip().splitlines()[-1])]
    return [_of_case(case) for case in ElementTree.parse(path).iter("testcase")]


def _of_case(case: ElementTree.Element) -> Result:
    """A test of pytest's report."""
    name, seconds = case.get("name", ""), float(case.get("time", 0))
    for tag, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            said = [line[1:].strip() for line in (found.text or "").splitlines() if line.startswith("E ")]
            lines = said[-1:] if status == "failed" else (found.get("message") or "").strip().splitlines()
            why = lines[0] if lines else ""
            return Result(name or "test_family", status, why, seconds)  # type: ignore[arg-type]
    return Result(name, "passed", "", seconds)
