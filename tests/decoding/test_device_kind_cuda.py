"""Device processors and samplers on a GPU: no step waits for the host, and the results are those of the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from trtllm_core import Plugins, SamplingConfig
from trtllm_core.decoding.choosing import Choosers
from trtllm_core.decoding.companions import Companions
from trtllm_core.decoding.hosting import Host, Samplers
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.planner import Planner
from trtllm_core.plugin import DeviceLogitsProcessor, LogitsBatch, Sampler

pytestmark = pytest.mark.cuda

WISHES = [
    {"top_k": 0, "top_p": 1.0, "embedding_bias": {5: 1.0}, "min_length": 4},
    {"top_k": 5, "repetition_penalty": 1.2, "presence_penalty": 0.1, "prompt_ignore_length": 2},
    {"top_k": 0, "top_p": 0.9, "top_p_decay": 0.9, "top_p_reset_ids": 3, "temperature": 0.7},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9, "no_repeat_ngram_size": 3},
    {"epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "bad_words_list": [[1, 2, 3], [4]], "top_k": 1},
]
ROWS, VOCAB = 10, 6000


@contextmanager
def no_waiting():
    """What would wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(thing):
    """A context or batch with its tensors on the GPU."""
    moved = {}
    for field in fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.cuda()
    if hasattr(thing, "device"):
        moved["device"] = torch.device("cuda")
    return replace(thing, **moved)


def device_entries():
    plugins = Plugins.load()
    for registry in (plugins.decoders, plugins.logits_processors):
        for entry in registry:
            if entry.source.distribution == "trtllm-core" and issubclass(
                entry.load(), (Sampler, DeviceLogitsProcessor)
            ):
                yield entry


@pytest.mark.parametrize("entry", list(device_entries()), ids=lambda entry: entry.name)
def test_a_step_never_waits_and_is_that_of_the_cpu(entry, new_floor, rng):
    floor = new_floor(slots=ROWS, vocab=VOCAB - 10, padded=VOCAB, max_seq_len=64)
    here, there = entry.load()(), entry.load()()
    contexts = floor.context, on_gpu(floor.context)
    params = None if here.Params is None else here.Params()
    here.setup(contexts[0])
    there.setup(contexts[1])
    for slot in range(ROWS):
        prompt = rng.integers(0, 6, 12).tolist()
        view = floor.view(slot, prompt, (2,), params, **WISHES[slot % len(WISHES)])
        here.begin(slot, view)
        there.begin(slot, view)
    contexts[1].tokens.copy_(contexts[0].tokens)
    for name in ("lengths", "prompt_lengths"):
        getattr(contexts[1], name).copy_(getattr(contexts[0], name))
    raw = torch.from_numpy(rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32))
    raw[:, VOCAB - 10 :] = torch.finfo(torch.float32).min
    draft = rng.integers(0, 6, (ROWS, 3))
    batches = [floor.logits_batch(range(ROWS))]
    if isinstance(here, DeviceLogitsProcessor):
        batches.append(floor.logits_batch([1] * 4, offsets=range(4), draft=draft))
    for batch in batches:
        n = len(batch.slot)
        moved = replace(on_gpu(batch), context=contexts[1])
        ours, theirs = raw[:n].clone(), raw[:n].cuda()
        call = "sample" if isinstance(here, Sampler) else "apply"
        want = getattr(here, call)(ours, batch)
        with no_waiting():
            got = getattr(there, call)(theirs, moved)
        if call == "sample":
            assert got.tolist() == want.tolist()
        else:
            torch.testing.assert_close(theirs.cpu() if got is None else got.cpu(), ours, rtol=1e-5, atol=1e-4)
    committed = floor.commit_batch(range(ROWS), [[7, 8]] * ROWS, logits=raw, source=[[row] * 2 for row in range(ROWS)])
    new = replace(on_gpu(committed), context=contexts[1])
    a, b = torch.tensor([0, 1, 2], device="cuda"), torch.tensor([1, 2, 0], device="cuda")
    with no_waiting():
        there.commit(new)
        there.fork(a, b)
        there.rewind(0, 1)


def test_a_pipeline_of_both_presets_never_waits(new_floor, rng):
    """From raw logits to tokens, with log-probabilities asked for."""
    floor = new_floor(slots=ROWS, vocab=VOCAB, padded=VOCAB)
    context = on_gpu(floor.context)
    planner = Planner(Plugins.load())
    pipeline = LogitsPipeline(context, ROWS, lambda slot: floor.histories[slot])
    choosers = Choosers(context, Host(pipeline, Samplers(context), Companions(ROWS, context.device)))
    for slot in range(ROWS):
        sampling = SamplingConfig(preset=("trtllm", "hf")[slot % 2], **{**WISHES[slot % 4], "top_p_decay": None})
        plan = planner.plan(sampling, beside=pipeline.beside(sampling.preset))
        view = replace(floor.view(slot, [1, 2, 3]), sampling=sampling)
        pipeline.begin(plan.processors, view)
        choosers.begin((plan.decoder,), view)
    raw = torch.from_numpy(rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)).cuda()
    slot, offset = torch.arange(ROWS, device="cuda"), torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    with no_waiting():
        logits, _ = pipeline.apply(raw, slot, offset, scored=True)
        for stage in choosers.live:
            batch = LogitsBatch(context, slot, offset, stage.flags[slot])
            stage.call(stage.plugin.select, logits.clone(), batch)
    assert not pipeline.take_failures()
