"""``trtllm-core conform``: packages that keep their promises, and packages that do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtllm_core.cli.app import app
from trtllm_core.testing import examine

ROOT = Path(__file__).parents[2]
BAD = ROOT / "tests" / "testing" / "bad_processors.py"
TOP_A = ROOT / "docs" / "examples" / "top_a.py"

Install = Callable[..., str]

HEADER = """
from trtllm_core.plugin import LogitsProcessorRegistrar, hookimpl

hook_api = "logits_processor>=1.0,<2"


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
"""
OBSERVER = """
from trtllm_core.plugin import StepStats, hookimpl

hook_api = "observer>=1.0,<2"
steps = []


@hookimpl
def trtllm_on_step_end(stats: StepStats) -> None:
    steps.append(stats.{field})
"""
BACKEND = """
from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.plugin import Availability, BackendRegistrar, hookimpl

hook_api = "backend>=1.0,<2"


class Mine(TorchBackend):
    name = "mine"
    contract = {contract!r}


@hookimpl
def trtllm_register_backends(registrar: BackendRegistrar) -> None:
    registrar.add("mine", Mine)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of one module, for this test."""

    def install(source: str, requires: str = "trtllm-core>=0.1,<0.2", name: str = "conform_me") -> str:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        distribution = name.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needs}")
        (info / "entry_points.txt").write_text(f"[trtllm_core]\n{name} = {name}\n")
        return distribution

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BAD.parent))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{BAD.parent}")
    monkeypatch.delitem(sys.modules, "conform_me", raising=False)
    return install


def conform(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["conform", *arguments])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


def failures(*arguments: str) -> dict[tuple[str, str], str]:
    """(plugin, check) and why, of the checks that failed."""
    done = CliRunner().invoke(app, ["conform", *arguments, "--json"])
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    failed = {(r["name"], c["check"]): c["why"] for r in reports for c in r["results"] if c["status"] == "failed"}
    assert done.exit_code == bool(failed)
    return failed


def test_a_sound_package(install: Install) -> None:
    package = install(TOP_A.read_text(encoding="utf-8"))
    printed = conform(package, "--params", 'top_a:{"a": 1.0}')
    assert "top_a logits processor forks are simultaneous pass" in printed
    assert "registering imports no torch pass" in printed
    assert " 0 failed," in printed


def test_a_broken_package(install: Install) -> None:
    lazy = f'{HEADER}    registrar.add("counting", "bad_processors:ForksOneByOne")\n'
    package = install(lazy)
    printed = conform(package, status=1)
    assert "counting logits processor forks are simultaneous FAIL after a fork, it answers differently" in printed
    failed = failures(package)
    assert ("counting", "test_forks_are_simultaneous") in failed
    assert ("counting", "test_everything_together") in failed
    assert ("counting", "test_rewinds") not in failed


PICKY = """
from pydantic import BaseModel

from trtllm_core.plugin import Example
from bad_processors import Counting


class Params(BaseModel):
    weight: float


class Picky(Counting):
    Params = Params
    {examples}
"""


def test_a_plugin_that_must_be_given_something(install: Install, tmp_path: Path) -> None:
    """It says itself what: else the kit asks for it with nothing, and is refused."""
    package = install(f'{HEADER}    registrar.add("picky", "picky:Picky")\n')
    (tmp_path / "picky.py").write_text(PICKY.format(examples=""), encoding="utf-8")
    assert "field 'weight' is required; give other `params`" in failures(package)["picky", "test_it_can_be_asked_for"]
    del sys.modules["picky"]
    examples = 'examples = (Example({"weight": 0.5}),)'
    (tmp_path / "picky.py").write_text(PICKY.format(examples=examples), encoding="utf-8")
    assert failures(package) == {}
    printed = conform(package, "--sampling", 'picky:{"temperature": 0.5}', status=1)
    assert "'weight' is required" in printed, "what is given by hand is tried instead"
    del sys.modules["picky"]


def test_a_package_that_imports_torch_and_fits_any_core(install: Install) -> None:
    eager = f'import bad_processors\n{HEADER}    registrar.add("counting", bad_processors.Counting)\n'
    package = install(eager, requires="trtllm-core>=0.1")
    assert failures(package) == {
        (package, "test_registering_imports_no_torch"): "its entry point imports torch: name the class by a string",
        (package, "test_it_says_which_core_it_fits"): (
            "conform-me requires trtllm-core>=0.1, which has no end: add the next version with <"
        ),
    }


def test_a_package_that_does_not_require_the_core(install: Install) -> None:
    package = install(f'{HEADER}    registrar.add("counting", "bad_processors:Counting")\n', requires="")
    assert "does not require trtllm-core" in failures(package)[package, "test_it_says_which_core_it_fits"]


def test_observers(install: Install) -> None:
    package = install(OBSERVER.format(field="rows"))
    assert failures(package) == {}


def test_an_observer_that_raises(install: Install) -> None:
    package = install(OBSERVER.format(field="tokens"))
    failed = failures(package)
    assert {check for _, check in failed} == {"test_it_raises_nothing", "test_it_takes_several_sessions"}
    assert "no attribute 'tokens'" in failed["conform_me", "test_it_raises_nothing"]


def test_backends(install: Install) -> None:
    package = install(BACKEND.format(contract="packed_paged"))
    assert set(failures(package)) == {(package, "test_registering_imports_no_torch")}


def test_a_backend_that_is_wrong(install: Install) -> None:
    package = install(BACKEND.format(contract="packed"))
    failed = failures(package)
    assert "its contract is 'packed'" in failed["mine", "test_declarations"]
    assert ("mine", "test_generation") in failed


def test_a_family_needs_a_config() -> None:
    printed = conform("trtllm-plugin-llama")
    assert "give the transformers config of a small model" in printed


@pytest.mark.slow
def test_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = f"{examine.FAMILY_TEST}    dtypes = ()\n    tensor_parallel = False\n"
    monkeypatch.setattr(examine, "FAMILY_TEST", quick)
    config = {
        "model_type": "llama",
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
    }
    printed = conform("trtllm-plugin-llama", "--params", f"llama:{json.dumps(config)}")
    assert "llama model family prefill pass" in printed


def test_a_family_of_which_no_model_can_be_made() -> None:
    failed = failures("trtllm-plugin-llama", "--params", 'llama:{"model_type": "no such model"}')
    assert [why for why in failed.values() if "no such model" in why]


def test_what_is_refused(install: Install) -> None:
    assert "'no-such-package' is not installed" in conform("no-such-package", status=2)
    package = install(TOP_A.read_text(encoding="utf-8"))
    assert "registers 'top_a', but not 'top_b'" in conform(package, "--params", "top_b:{}", status=2)
    assert "must be a JSON object" in conform(package, "--params", "top_a:[1]", status=2)
    assert "no parameter 'b'" in conform(package, "--params", 'top_a:{"b": 1}', status=1)
