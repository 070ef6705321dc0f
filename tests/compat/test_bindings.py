"""``GptDecoder``: tokens from logits that the caller brings, without an engine."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import SamplingConfig as CoreConfig
from trtllm_core.compat.tensorrt_llm import bindings
from trtllm_core.compat.tensorrt_llm.bindings import (
    DataType,
    DecodingInput,
    DecodingMode,
    DecodingOutput,
    GptDecoder,
    SamplingConfig,
)
from trtllm_core.decoding.words import to_word_list_format
from trtllm_core.errors import CapacityError, ConfigError

PROMPTS = [[5, 6], [11], [42, 17, 3]]
LENGTH = 16


def make(**changes):
    arguments = {"max_batch_size": 4, "max_beam_width": 1, "vocab_size": 97, "vocab_size_padded": 104} | changes
    return GptDecoder(DecodingMode.TOP_K_TOP_P, DataType.FLOAT, max_sequence_length=LENGTH, **arguments)


def output_for(prompts, beams=1):
    ids = torch.zeros(len(prompts), beams, LENGTH, dtype=torch.int32)
    for rows, prompt in zip(ids, prompts, strict=True):
        rows[:, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([[len(prompt)] * beams for prompt in prompts], dtype=torch.int32)
    return DecodingOutput(ids, lengths)


def drive(decoder, table, output, end_ids=(-1, -1, -1), **inputs):
    """Bring logits from a table of the last token, until all are finished; how many steps it took."""
    last = torch.tensor([[row[0, int(n[0]) - 1]] for row, n in zip(output.ids, output.lengths, strict=True)])
    last = last.expand(output.lengths.shape)
    for step in range(1, 2 * LENGTH):
        logits = torch.nn.functional.pad(table[last.long()], (0, 104 - 97), value=1e9)  # the padding is never chosen
        if decoder.forward(output, DecodingInput(logits, torch.tensor(end_ids), **inputs)):
            return step
        last = output.new_tokens
    return None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 5, "random_seed": 3}, {"temperature": [0.7], "top_k": [5], "random_seed": [3]}),
        (
            {"top_k": 0, "top_p": 0.9, "random_seed": 3, "repetition_penalty": 1.7, "presence_penalty": 0.3},
            {"top_p": [0.9], "random_seed": [3], "repetition_penalty": [1.7] * 3, "presence_penalty": [0.3]},
        ),
    ],
)
def test_it_chooses_what_a_session_would(runner, ours, theirs):
    table = runner.session.engine.table
    decoder = make()
    decoder.setup(SamplingConfig(**theirs), 3)
    output = output_for(PROMPTS)
    assert drive(decoder, table, output) == 15, "row 1 has the longest way to go"
    configs = [
        CoreConfig(**{"random_seed": 0} | ours, end_id=(), max_new_tokens=LENGTH - len(prompt), return_dict=True)
        for prompt in PROMPTS
    ]
    result = runner.generate(PROMPTS, [config.replace(output_log_probs=True) for config in configs])
    for row, expected in enumerate(result["outputs"]):
        start = len(PROMPTS[row])
        assert output.ids[row, 0].tolist() == [*expected.prompt, *expected.tokens]
        torch.testing.assert_close(output.log_probs[row, 0, start:], torch.tensor(expected.log_probs))
        assert float(output.cum_log_probs[row, 0]) == pytest.approx(sum(expected.log_probs), abs=1e-4)
    assert output.finished.all()
    assert output.finished_sum == 3
    assert output.lengths.tolist() == [[LENGTH]] * 3


def test_ends_words_limits_and_biases(runner, by_hand):
    table = runner.session.engine.table
    free = [by_hand(runner, prompt, lambda _, x: x) for prompt in PROMPTS]
    decoder = make()
    decoder.setup(SamplingConfig(), 3)
    output = output_for(PROMPTS)
    words = to_word_list_format([[[95]], [free[1][2:4]], [[95]]])
    limit = torch.tensor([LENGTH, LENGTH, 8])
    drive(decoder, table, output, (free[0][3], -1, -1), stop_words_list=words, sequence_limit_length=limit)
    assert output.ids[0, 0, 2:6].tolist() == free[0][:4]
    assert output.lengths[:, 0].tolist() == [5, 5, 8], "the end token does not count, a stop word does"
    assert output.ids[1, 0, 1:5].tolist() == free[1][:4]

    bias = torch.zeros(3, 97)
    bias[2, 9] = 1000
    bad = to_word_list_format([[[free[0][0]]], [[96]], [[96]]])
    decoder.setup(SamplingConfig(), 3, 12)
    output = output_for(PROMPTS)
    ngrams = torch.tensor([0, 1, 0])
    drive(decoder, table, output, embedding_bias=bias, bad_words_list=bad, no_repeat_ngram_size=ngrams)
    assert output.ids[2, 0, 3:12].tolist() == [9] * 9
    assert free[0][0] not in output.ids[0, 0].tolist()[2:]
    assert len(set(output.ids[1, 0, :12].tolist())) == 12


def test_a_new_setup_gives_up_what_was_there(runner, by_hand):
    table = runner.session.engine.table
    decoder = make()
    for _ in range(3):
        decoder.setup(config := SamplingConfig(), 3)
        output = output_for(PROMPTS)
        logits = torch.nn.functional.pad(table[torch.tensor([[6], [11], [3]])], (0, 7))
        assert not decoder.forward(output, DecodingInput(logits, torch.tensor([-1, -1, -1])))
        assert output.new_tokens[:, 0].tolist() == [int(table[i].argmax()) for i in (6, 11, 3)]
    assert decoder.get_sampling_config() is config


def test_refusals():
    with pytest.raises(ConfigError, match="medusa is not honoured"):
        GptDecoder(DecodingMode.MEDUSA, DataType.HALF, 1, 1, 10, 10, 10)
    with pytest.raises(ConfigError, match="vocab_size_padded 10 is less than vocab_size 11"):
        GptDecoder(DecodingMode.NONE, DataType.HALF, 1, 1, 11, 10, 10)
    decoder = make()
    output, ends = output_for(PROMPTS), torch.tensor([-1, -1, -1])
    with pytest.raises(ConfigError, match="call setup"):
        decoder.forward(output, DecodingInput(torch.zeros(3, 1, 104), ends))
    with pytest.raises(CapacityError, match="5 sequences of 16 tokens; the decoder was made for 4 of 16"):
        decoder.setup(SamplingConfig(), 5)
    decoder.setup(SamplingConfig(temperature=[-1.0]), 3)
    with pytest.raises(ConfigError, match=r"logits \[3, 1, 97\] are not \[3, beams, 104\]"):
        decoder.forward(output, DecodingInput(torch.zeros(3, 1, 97), ends))
    with pytest.raises(ConfigError, match="temperature = -1.0"):
        decoder.forward(output, DecodingInput(torch.zeros(3, 1, 104), ends))
    decoder.setup(SamplingConfig(top_k=[1], top_p_decay=[None, None, 0.5]), 3)
    for _ in range(2):  # the third is refused, and takes the first two with it
        with pytest.raises(ConfigError, match="top_p_decay"):
            decoder.forward(output, DecodingInput(torch.zeros(3, 1, 104), ends))
    decoder.setup(SamplingConfig(), 3)
    assert not decoder.forward(output, DecodingInput(torch.zeros(3, 1, 104), ends))


def test_names():
    assert all(hasattr(bindings, name) for name in bindings.__all__)
