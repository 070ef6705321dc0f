"""H2O: the kit, what it keeps, and generations on a tiny LLaMA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trtllm_contrib_h2o.policy import H2OOptions, H2OPolicy
from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, build_engine
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import KVBudget, KVModel, KVStatistics
from trtllm_core.testing import KVPolicyConformance
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(max_batch_size=2, max_input_len=60, max_seq_len=128, tokens_per_block=8)


class TestH2O(KVPolicyConformance):
    plugin = "h2o"
    params = ({"heavy": 2, "recent": 3},)
    wrong_params = ({"recent": 0},)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS)
    return folder / "engine"


def test_heavy_hitters_and_the_newest_stay() -> None:
    policy = H2OPolicy(H2OOptions(heavy=2, recent=2))
    policy.plan(KVModel(2, 1, 4, "float32", 64), KVBudget(1, 16, 4, 16))
    policy.admit(0, range(6), 99)
    policy.extend([0], [6])
    policy.commit([0], [6])
    looked = np.array([[[9, 1, 8, 1, 1, 1]], [[1, 1, 1, 9, 0, 0]]], np.float32)
    edits = policy.after_prefill([0], KVStatistics([looked]))
    assert edits is not None
    assert edits.drops == ((0, 2),)
    entries = [list(range(6)), list(range(6))]
    for move in edits.moves:
        assert move.layer is not None
        entries[move.layer][move.target] = move.source
    assert [sorted(layer[:4]) for layer in entries] == [[0, 2, 4, 5], [0, 3, 4, 5]]
    assert policy.length(0) == 4


def test_nothing_is_lost_while_all_fits(engine: Path) -> None:
    prompts = [[5, 6, 7], [11] * 20]
    plain = ModelRunner.from_dir(engine).generate(prompts, max_new_tokens=20, end_id=())
    cache = KVCacheConfig(policy="h2o", options={"heavy": 40, "recent": 20})
    kept = ModelRunner.from_dir(engine, kv_cache=cache).generate(prompts, max_new_tokens=20, end_id=())
    assert kept.tolist() == plain.tolist()


def test_long_texts_in_little_room(engine: Path) -> None:
    cache = KVCacheConfig(policy="h2o", options={"heavy": 8, "recent": 8}, max_tokens=2 * 32)
    runner = ModelRunner.from_dir(engine, kv_cache=cache)
    outputs = runner.generate([[5, 6, 7], [11] * 20], max_new_tokens=90, end_id=(), return_dict=True)["outputs"]
    assert [len(output.tokens) for output in outputs] == [90, 90]
    assert runner.generation.loop.cache.usage().free == 8


def test_it_is_refused_where_scores_are_not_there(engine: Path) -> None:
    cache = KVCacheConfig(policy="h2o", options={"heavy": 8, "recent": 8})
    with pytest.raises(ConfigError, match="H2OPolicy needs attention scores"):
        ModelRunner.from_dir(engine, kv_cache=cache, batch_invariant=True)
    with pytest.raises(ConfigError, match="h2o keeps 200 entries, but a slot has 128"):
        ModelRunner.from_dir(engine, kv_cache=KVCacheConfig(policy="h2o", options={"heavy": 100, "recent": 100}))
