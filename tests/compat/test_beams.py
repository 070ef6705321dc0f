"""Beams through the old names: shapes, streams, callbacks, and a decoder without an engine."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner
from trtllm_core import SamplingConfig as CoreConfig
from trtllm_core.compat.tensorrt_llm import bindings, runtime
from trtllm_core.errors import CapacityError
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6], [11]]
WIDTH, NEW = 3, 7
BUILD = BuildConfig(
    max_batch_size=2, max_beam_width=WIDTH, max_input_len=31, max_seq_len=32, max_num_tokens=64, tokens_per_block=8
)


@pytest.fixture
def ours() -> list:
    """What our own runner finds, request by request."""
    runner = ModelRunner.from_engine(MarkovExecutable(build=BUILD))
    config = CoreConfig(end_id=96, num_beams=WIDTH, max_new_tokens=NEW, length_penalty=0.5, return_dict=True)
    outputs = runner.generate(PROMPTS, config)["outputs"]
    return [outputs[:WIDTH], outputs[WIDTH:]]


@pytest.fixture
def old() -> runtime.ModelRunner:
    session = runtime.Session.from_engine(MarkovExecutable(build=BUILD))
    return runtime.ModelRunner(runtime.GenerationSession(None, session), 2, 31, 32, WIDTH)


def config(**fields: object) -> runtime.SamplingConfig:
    made = runtime.SamplingConfig(96, 96, NEW, WIDTH, length_penalty=0.5, return_dict=True)
    made.update(output_sequence_lengths=True, **fields)
    return made


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(prompt) for prompt in PROMPTS]


def test_results_have_a_row_for_each_beam(old: runtime.ModelRunner, ours: list) -> None:
    result = old.generate(tensors(), config(output_cum_log_probs=True, output_log_probs=True))
    assert result["output_ids"].shape == (2, WIDTH, 2 + NEW)
    for i, found in enumerate(ours):
        for beam, one in enumerate(found):
            ids = result["output_ids"][i, beam].tolist()
            assert ids[: len(one.prompt) + len(one.tokens)] == [*one.prompt, *one.tokens]
            assert result["sequence_lengths"][i, beam] == one.length
            assert float(result["cum_log_probs"][i, beam]) == pytest.approx(one.cum_log_prob, abs=1e-4)
    assert result["log_probs"].shape == (2, WIDTH, 2 + NEW)
    *_, last = old.generate(tensors(), config(), streaming=True)
    assert torch.equal(last["output_ids"], result["output_ids"])
    assert torch.equal(last["sequence_lengths"], result["sequence_lengths"])
    with pytest.raises(CapacityError, match="num_beams 4 is more than the 3"):
        old.generate(tensors(), config(num_beams=4))


def test_callbacks_see_every_beam(old: runtime.ModelRunner, ours: list) -> None:
    """Each row's last token is the one that its scores come from, whichever beam took over from which."""
    steps = []
    starts = [len(prompt) for prompt in PROMPTS for _ in range(WIDTH)]

    class Look(runtime.LogitsProcessor):
        def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert input_ids.shape == (2 * WIDTH, 2 + NEW)
            table = old.generation.session.engine.table
            for row in range(2 * WIDTH) if step else (0, WIDTH):  # the prompt runs once
                assert torch.equal(scores[row], table[int(input_ids[row, starts[row] + step - 1])])
            steps.append(step)
            return scores

    found = old.generate(tensors(), config(), logits_processor=Look())
    assert steps == list(range(NEW))
    assert found["output_ids"][0, 0, 2:].tolist() == list(ours[0][0].tokens)

    class Third(runtime.StoppingCriteria):
        def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> bool:
            return step == 2

    cut = old.generate(tensors(), config(), stopping_criteria=Third())
    assert cut["sequence_lengths"].tolist() == [[5] * WIDTH, [4] * WIDTH]
    best = old.generate(tensors(), config(max_new_tokens=3))
    assert torch.equal(cut["output_ids"][:, 0, :4], best["output_ids"][:, 0, :4])


def test_a_session_is_set_up_for_its_beams(old: runtime.ModelRunner, ours: list) -> None:
    old.session.setup(2, 2, NEW, WIDTH)
    padded = torch.tensor([[5, 6], [11, 0]])
    result = old.session.decode(padded, torch.tensor([2, 1]), config(), return_dict=True)
    assert result["output_ids"][1, 0, 1 : 1 + NEW].tolist() == list(ours[1][0].tokens)


def test_a_decoder_without_an_engine_searches_too(ours: list) -> None:
    table = MarkovExecutable(build=BUILD).table
    mode, dtype = bindings.DecodingMode.BEAM_SEARCH, bindings.DataType.FLOAT
    decoder = bindings.GptDecoder(mode, dtype, 2, WIDTH, 97, 97, 32)
    decoder.setup(bindings.SamplingConfig(WIDTH, length_penalty=[0.5]), 2)
    ids = torch.zeros(2, WIDTH, 32, dtype=torch.int32)
    for rows, prompt in zip(ids, PROMPTS, strict=True):
        rows[:, : len(prompt)] = torch.tensor(prompt)
    output = bindings.DecodingOutput(ids, torch.tensor([[2] * WIDTH, [1] * WIDTH], dtype=torch.int32))
    limit, ends = torch.tensor([2 + NEW, 1 + NEW]), torch.tensor([96, 96])
    caches = [[prompt] * WIDTH for prompt in PROMPTS]  # what a model would have in its cache, by beam
    done = decoder.forward(output, bindings.DecodingInput(table[torch.tensor([[6] * 3, [11] * 3])], ends, limit))
    while not done:
        parents, tokens = output.parent_ids.tolist(), output.new_tokens.tolist()
        caches = [
            [[*cache[parent], token] for parent, token in zip(*row, strict=True)]
            for cache, *row in zip(caches, parents, tokens, strict=True)
        ]
        for i, cache in enumerate(caches):
            if not output.finished[i, 0]:
                assert cache == [row[: len(cache[0])].tolist() for row in output.ids[i]], (
                    "the caches follow the parents"
                )
        done = decoder.forward(output, bindings.DecodingInput(table[output.new_tokens.long()], ends, limit))
    for i, found in enumerate(ours):
        for beam, one in enumerate(found):
            start = len(one.prompt)
            assert output.ids[i, beam, start : start + len(one.tokens)].tolist() == list(one.tokens)
