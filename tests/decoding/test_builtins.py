"""The built-ins as plugins: how they register, and what they promise."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding import plugin, ranking
from trtllm_core.plugin import HostStoppingCriterion
from trtllm_core.plugin.registrar import (
    DecoderRegistrar,
    LogitsProcessorRegistrar,
    Registry,
    Source,
    StoppingCriterionRegistrar,
)

KINDS = {
    "decoder": (DecoderRegistrar, plugin.trtllm_register_decoders),
    "logits processor": (LogitsProcessorRegistrar, plugin.trtllm_register_logits_processors),
    "stopping criterion": (StoppingCriterionRegistrar, plugin.trtllm_register_stopping_criteria),
}


def registered(kind):
    registry = Registry(kind)
    registrar, hook = KINDS[kind]
    hook(registrar(registry, Source("decoding", "trtllm-core", "0")))
    return list(registry)


ENTRIES = [entry for kind in KINDS for entry in registered(kind)]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entries_load_and_consume_fields_that_exist(entry):
    assert entry.load()() is not None
    assert set(entry.consumes) <= set(SamplingConfig.model_fields)


@pytest.mark.parametrize("entry", registered("logits processor"), ids=lambda entry: entry.name)
def test_orders_name_processors_that_exist(entry):
    names = {other.name for other in registered("logits processor")}
    thing = entry.load()()
    assert {*thing.before, *thing.after} <= names
    assert thing.capabilities.graph_safe


def test_a_request_without_wishes_gets_only_what_it_needs():
    sampling = SamplingConfig()
    chosen = [
        entry.name
        for entry in ENTRIES
        if any(entry.needed(f, getattr(sampling, f)) for f, v in entry.consumes.items() if v is not None)
    ]
    assert chosen == ["min_length", "end_id"]


def test_registering_imports_no_torch():
    code = "import sys, trtllm_core.decoding.plugin; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


ASKED = {
    "embedding_bias": {5: 1.0},
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "min_length": 4,
    "no_repeat_ngram_size": 3,
    "bad_words_list": [[1, 2, 3], [4]],
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "top_p_decay": 0.9,
    "top_p_reset_ids": 3,
    "stop_words_list": [[1, 2, 3], [4, 5]],
    "max_new_tokens": 100,
    "max_time": 1e9,
    "top_k": 50,
    "top_p": 0.9,
}


PARAMS = {"confidence": {"above": 0.9}, "repetition": {"max_size": 3}, "diverse_beam_search": {"groups": 1}}
NEED_AN_ENGINE = {"draft_model", "contrastive_search"}
"""Decoders that run one, or look at its hidden states, on the host."""
DEVICE = [
    entry
    for entry in ENTRIES
    if not issubclass(entry.load(), HostStoppingCriterion) and entry.name not in NEED_AN_ENGINE
]


def view_of(entry, floor, slot, prompt, **asked):
    """A branch begins in ``slot``, with the plugin's own parameters."""
    params = entry.load().Params
    return floor.view(slot, prompt, (2,), None if params is None else params(**PARAMS.get(entry.name, {})), **asked)


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a GPU, or give a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entry", DEVICE, ids=lambda entry: entry.name)
def test_a_step_never_waits_for_the_device(entry, new_floor, monkeypatch):
    monkeypatch.setattr(ranking, "_on_host", lambda tensor: False)
    floor = new_floor(slots=8, vocab=600, padded=640)
    for wish in ({"top_k": 0, "top_p": 1.0}, {"top_k": 5}, {"top_k": 0}):
        thing = entry.load()()
        thing.setup(floor.context)
        for slot in range(8):
            thing.begin(slot, view_of(entry, floor, slot, range(10), **{**ASKED, **wish}))
            floor.append(slot, [3])
        draft = np.zeros((8, 3))
        seen = [floor.logits_batch(range(8)), floor.logits_batch([1] * 4, offsets=range(4), draft=draft)]
        logits, a, b = torch.randn(8, 640), torch.tensor([0, 1]), torch.tensor([1, 0])
        new = floor.commit_batch(range(8), [[7, 8]] * 8, logits=logits, source=[[i, i] for i in range(8)])
        with NoSync():
            for batch in seen:
                for name in {"apply", "sample"} & set(dir(thing)):
                    getattr(thing, name)(logits[: len(batch.slot)], batch)
            if hasattr(thing, "check"):
                thing.check(new)
            thing.commit(new)
            thing.fork(a, b)
            thing.rewind(0, 1)


@pytest.mark.parametrize("entry", DEVICE, ids=lambda entry: entry.name)
def test_time_of_a_step(entry, new_floor, capsys):
    """Printed, not asserted: eight rows, 49152 tokens, 2048 positions."""
    floor = new_floor(slots=8, vocab=49152, padded=49152, max_seq_len=2048)
    thing = entry.load()()
    thing.setup(floor.context)
    for slot in range(8):
        thing.begin(slot, view_of(entry, floor, slot, range(1000), **ASKED))
    source, logits = torch.randn(8, 49152) * 3, torch.empty(8, 49152)
    seen = floor.logits_batch(range(8))
    new = floor.commit_batch(range(8), [[7]] * 8, logits=source, source=[[i] for i in range(8)])
    calls = {
        name: call
        for name, call in {
            "apply": lambda: thing.apply(logits, seen),
            "sample": lambda: thing.sample(logits, seen),
            "check": lambda: thing.check(new),
            "commit": lambda: thing.commit(new),
        }.items()
        if hasattr(thing, name)
    }
    for name, call in calls.items():
        times = []
        for _ in range(12):
            logits.copy_(source)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        with capsys.disabled():
            print(f"\n{entry.name:>16} {name:7} {sorted(times)[5] * 1e6:8.0f} us", end="")
