"""Adapters by uid: who is there, who uses them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from trtllm_core import Plugins, Session
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.lora import LoraManager
from trtllm_core.testing.adapters import AdaptedModel
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.reference import LIMITS, ReferenceModel

pytest.importorskip("peft")

CONFIG = transformers.LlamaConfig(
    vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4
)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> ReferenceModel:
    limits = LIMITS.replace(max_lora_rank=4, max_loras=2)
    return ReferenceModel(CONFIG, tmp_path_factory.mktemp("lora"), plugins, limits=limits)


@pytest.fixture(scope="module")
def path(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return AdaptedModel(reference.model, tmp_path_factory.mktemp("adapters")).add("one", ["q_proj"])


@pytest.fixture
def manager(reference: ReferenceModel, plugins: Plugins) -> LoraManager:
    return LoraManager(reference.session(), plugins)


def test_uids_and_places(manager: LoraManager, path: Path) -> None:
    first, second = manager.add("0", path), manager.add("fr", path)
    assert manager.uids == ("0", "fr")
    assert (first.index, second.index, first.rank, first.path) == (0, 1, 4, path)
    assert manager.find("fr") is second
    assert manager.find(None) is manager.find("-1") is None
    manager.drop("0")
    again = manager.add("0", path)
    assert (again.index, manager.uids) == (0, ("fr", "0"))
    assert len({first.serial, second.serial, again.serial}) == 3, "the cache of the first is not that of the third"


def test_refusals(manager: LoraManager, path: Path) -> None:
    manager.add("0", path)
    for call, error, words in (
        (lambda: manager.add("0", path), ConfigError, "there is an adapter '0' already"),
        (lambda: manager.add("-1", path), ConfigError, "'-1' cannot be the uid"),
        (lambda: manager.add(1, path), ConfigError, "1 cannot be the uid"),  # type: ignore[arg-type]
        (lambda: manager.drop("7"), ConfigError, r"no adapter '7' \(loaded: '0'\)"),
        (lambda: manager.drop("-1"), ConfigError, "stands for no adapter"),
        (lambda: manager.find("7"), ConfigError, "no adapter '7'"),
    ):
        with pytest.raises(error, match=words):
            call()
    manager.add("1", path)
    with pytest.raises(CapacityError, match="2 adapters are loaded; .* max_loras 2"):
        manager.add("2", path)
    assert manager.uids == ("0", "1")


def test_a_failed_add_takes_no_place(manager: LoraManager, tmp_path: Path, path: Path) -> None:
    with pytest.raises(Exception, match="holds no adapter"):
        manager.add("0", tmp_path)
    assert manager.add("0", path).index == 0


def test_what_is_in_use_stays(manager: LoraManager, path: Path) -> None:
    one = manager.add("0", path)
    with manager.using([one, None, one]):
        with manager.using([one]), pytest.raises(ConfigError, match="'0' is used by 3 requests"):
            manager.drop("0")
        with pytest.raises(ConfigError, match="'0' is used by 2 requests that have not ended"):
            manager.drop("0")
    manager.drop("0")


def test_engines_that_take_none(reference: ReferenceModel, plugins: Plugins, path: Path) -> None:
    bare = Session.from_directory(reference.engine(max_lora_rank=0, max_loras=4), plugins=plugins)
    make: Callable[[Session], LoraManager] = lambda session: LoraManager(session, plugins)  # noqa: E731
    for session in (bare, Session(MarkovExecutable())):
        with pytest.raises(ConfigError, match="not built for LoRA adapters: build it with max_lora_rank"):
            make(session).add("0", path)
