"""SamplingConfig: what is refused, vectors of a batch, and what others call its fields."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from trtllm_core.config import SamplingConfig, use
from trtllm_core.config.dialects import WHOLE_PROMPT
from trtllm_core.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 1025}, "top_k = 1025"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf"),
        ({"top_p_decay": 0.0}, "top_p_decay = 0.0"),
        ({"top_p_min": 2.0}, "top_p_min = 2.0"),
        ({"typical_p": 0.0}, "typical_p = 0.0"),
        ({"preset": "vllm"}, "preset = 'vllm'"),
        ({"embedding_bias": "much"}, "embedding_bias"),
        ({"num_logprobs": -1}, "num_logprobs = -1"),
        ({"temprature": 1.0}, "no field 'temprature'"),
    ],
)
def test_out_of_range_is_an_error_and_never_clamped(fields, words):
    """The classic runtime clamped with a warning, and its ``update`` handed unknown names back."""
    with pytest.raises(ConfigError, match=words):
        SamplingConfig(**fields)


def test_a_config_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        SamplingConfig().top_k = 5


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_embedding_bias_as_one_number_for_each_token(make):
    assert SamplingConfig(embedding_bias=make([0.0, 1.5, -2.0])).embedding_bias == (0.0, 1.5, -2.0)


# -- vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_vectors_give_each_sequence_its_own(make):
    configs = SamplingConfig.for_batch(2, temperature=make([0.5, 1.5]), top_k=make([3, 4]), top_p=0.5)
    assert [(c.temperature, c.top_k, c.top_p) for c in configs] == [(0.5, 3, 0.5), (1.5, 4, 0.5)]


@pytest.mark.parametrize("value", [7, [7], np.array(7), torch.tensor([7])])
def test_one_value_is_everybodys(value):
    assert [c.random_seed for c in SamplingConfig.for_batch(3, random_seed=value)] == [7, 7, 7]


def test_none_in_a_vector_leaves_the_field_out():
    configs = SamplingConfig.for_batch(2, random_seed=[None, 5], top_k=[None, 5])
    assert [(c.random_seed, c.top_k) for c in configs] == [(None, 1), (5, 5)]
    assert "top_k" not in configs[0].model_fields_set


@pytest.mark.parametrize(
    ("field", "one", "each"),
    [
        ("end_id", [1, 2], [[1, 2], 3]),
        ("stop_words_list", [[1, 2], [3]], [[[1, 2]], [[3]]]),
        ("bad_words_list", [[5]], [[[5]], []]),
        ("stop_strings", ["a", "b"], [["a"], ["b", "c"]]),
        ("embedding_bias", {1: 2.0}, [{1: 2.0}, {3: -1.0}]),
        ("embedding_bias", [0.0, 1.0, 2.0], torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])),
        ("logits_processors", ["a", "b"], None),
    ],
)
def test_fields_that_are_sequences_are_vectors_one_level_deeper(field, one, each):
    alike = SamplingConfig.for_batch(2, **{field: one})
    assert alike == (SamplingConfig(**{field: one}),) * 2
    if each is not None:
        rows = each.tolist() if isinstance(each, torch.Tensor) else each
        assert SamplingConfig.for_batch(2, **{field: each}) == tuple(SamplingConfig(**{field: row}) for row in rows)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_word_lists_of_the_classic_form_are_vectors(make):
    classic = make([[[5, 7, 3, 9, 2], [3, 5, -1, -1, -1]], [[8, 0, 0, 0, 0], [1, -1, -1, -1, -1]]])
    rows = SamplingConfig.for_batch(2, stop_words_list=classic)
    assert [config.stop_words_list for config in rows] == [((5, 7, 3), (9, 2)), ((8,),)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": [0.1, 0.2]}, "temperature has 2 values for a batch of 3: give one value, or one for each"),
        ({"random_seed": torch.arange(4)}, "random_seed has 4 values for a batch of 3"),
        ({"stop_words_list": [[[1]], [[2]]]}, "stop_words_list has 2 values for a batch of 3"),
        ({"top_k": [1, 2, 5000]}, "top_k = 5000"),
    ],
)
def test_vectors_of_the_wrong_length(fields, words):
    with pytest.raises(ConfigError, match=words):
        SamplingConfig.for_batch(3, **fields)


# -- OpenAI ------------------------------------------------------------------------------------------------------------


def test_openai_defaults_are_openais():
    config = SamplingConfig.from_openai({"model": "m", "messages": [], "stream": True})
    assert (config.preset, config.temperature, config.top_k, config.top_p) == ("hf", 1.0, 0, 1.0)
    assert config.min_length == 0


def test_openai_chat():
    body = {
        "max_completion_tokens": 9,
        "temperature": 0.2,
        "n": 3,
        "seed": 5,
        "stop": ["a", "b"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"50": -100, "7": 1.5},
        "logprobs": True,
        "top_logprobs": 4,
        "response_format": {"type": "text"},
        "user": "u",
        "top_p": None,
    }
    config = SamplingConfig.from_openai(body, return_dict=True)
    assert config == SamplingConfig(
        preset="hf",
        max_new_tokens=9,
        min_length=0,
        temperature=0.2,
        top_k=0,
        top_p=1.0,
        num_return_sequences=3,
        random_seed=5,
        stop_strings=("a", "b"),
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        prompt_ignore_length=WHOLE_PROMPT,
        embedding_bias={50: -100.0, 7: 1.5},
        output_log_probs=True,
        num_logprobs=4,
        return_dict=True,
    )


def test_openai_completions_and_extensions():
    body = {"max_tokens": 5, "logprobs": 2, "top_k": -1, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True}
    config = SamplingConfig.from_openai({**body, "stop_token_ids": [4, 5], "repetition_penalty": 1.1, "echo": False})
    assert (config.num_logprobs, config.output_log_probs, config.top_k, config.min_p) == (2, True, 0, 0.1)
    assert (config.min_length, config.end_id, config.stop_words_list) == (2, (), ((4,), (5,)))
    assert (config.repetition_penalty, config.prompt_ignore_length) == (1.1, 0)
    assert not SamplingConfig.from_openai({"logprobs": False}).output_log_probs


def test_openai_refuses_by_name():
    with pytest.raises(
        ConfigError, match="cannot take 'response_format', 'tools', 'topp' from the request: unknown, or not"
    ):
        SamplingConfig.from_openai({"tools": [{}], "topp": 1, "response_format": {"type": "json_object"}, "n": 2})


# -- transformers ------------------------------------------------------------------------------------------------------


def test_hf_defaults_are_those_of_generate():
    greedy = SamplingConfig.from_hf(GenerationConfig(max_new_tokens=4))
    assert (greedy.preset, greedy.top_k, greedy.min_length) == ("hf", 1, 0)
    drawn = SamplingConfig.from_hf({"do_sample": True, "max_new_tokens": 4})
    assert (drawn.top_k, drawn.top_p, drawn.temperature) == (50, 1.0, 1.0)
    assert SamplingConfig.from_hf({"num_beams": 4, "max_new_tokens": 4}).early_stopping == 0
    assert "early_stopping" not in drawn.asked()


def test_hf_fields():
    theirs = GenerationConfig(
        do_sample=True,
        max_new_tokens=30,
        max_length=900,
        min_new_tokens=3,
        min_length=10,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.95,
        epsilon_cutoff=1e-4,
        eta_cutoff=2e-4,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        bad_words_ids=[[1, 2], [3]],
        sequence_bias=[[[9], 2.5]],
        suppress_tokens=[11],
        eos_token_id=[2, 3],
        pad_token_id=0,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.5,
        early_stopping="never",
        max_time=3.0,
        stop_strings=["x"],
        return_dict_in_generate=True,
        renormalize_logits=False,
        use_cache=True,
    )
    assert SamplingConfig.from_hf(theirs) == SamplingConfig(
        preset="hf",
        max_new_tokens=30,
        min_length=3,
        min_sequence_length=10,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.95,
        epsilon_cutoff=1e-4,
        eta_cutoff=2e-4,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        bad_words_list=((1, 2), (3,)),
        embedding_bias={9: 2.5, 11: -math.inf},
        end_id=(2, 3),
        pad_id=0,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.5,
        early_stopping=2,
        max_time=3.0,
        stop_strings=("x",),
        return_dict=True,
    )


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"guidance_scale": 1.5, "penalty_alpha": 0.6}, "'guidance_scale', 'penalty_alpha'"),
        ({"watermarking_config": {}}, "'watermarking_config'"),
        ({"max_length": 20}, "max_length, which counts the prompt: give max_new_tokens"),
        ({"sequence_bias": [[[1, 2], 1.0]]}, "sequence_bias of several tokens"),
        ({"output_scores": True}, "'output_scores'"),
    ],
)
def test_hf_refuses_by_name(theirs, words):
    with pytest.raises(ConfigError, match=words):
        SamplingConfig.from_hf(theirs)


def test_hf_beam_groups_are_a_decoder():
    theirs = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 4}
    assert SamplingConfig.from_hf(theirs).decoder == use("diverse_beam_search", groups=2, penalty=0.5)
    with pytest.raises(ConfigError, match="'diversity_penalty'"):
        SamplingConfig.from_hf({**theirs, "num_beam_groups": 1})


def test_hf_max_length_gives_way():
    assert SamplingConfig.from_hf({"max_length": 20}, max_new_tokens=6).max_new_tokens == 6


# -- TensorRT-LLM ------------------------------------------------------------------------------------------------------


def test_trtllm_defaults():
    assert SamplingConfig.from_trtllm({}) == SamplingConfig()
    assert SamplingConfig.from_trtllm({}, executor=True).top_k == 0
    beams = SamplingConfig.from_trtllm({"beamWidth": 4}, executor=True)
    assert (beams.num_beams, beams.length_penalty) == (4, 0.0)
    assert SamplingConfig.from_trtllm({"beam_width": 4}).length_penalty == 1.0


def test_trtllm_names_of_both_columns():
    cpp = types.SimpleNamespace(
        beamWidth=1,
        topK=[5],
        topP=[0.9],
        topPMin=[0.1],
        topPResetIds=[-1],
        topPDecay=[0.5],
        randomSeed=[7],
        temperature=[0.5],
        minLength=[2],
        beamSearchDiversityRate=None,
        repetitionPenalty=[1.1],
        promptIgnoreLength=[4],
        noRepeatNgramSize=None,
        minP=[0.1],
        normalizeLogProbs=True,
        outputLogProbs=[True],
        cumLogProbs=None,
        originalTemperature=None,
    )
    wanted = SamplingConfig(
        num_beams=1,
        top_k=5,
        top_p=0.9,
        top_p_min=0.1,
        top_p_reset_ids=-1,
        top_p_decay=0.5,
        random_seed=7,
        temperature=0.5,
        min_length=2,
        repetition_penalty=1.1,
        prompt_ignore_length=4,
        min_p=0.1,
        normalize_log_probs=True,
        output_log_probs=True,
    )
    assert SamplingConfig.from_trtllm(cpp) == wanted
    later = {"seed": 7, "min_tokens": 2, "max_tokens": 11, "logprobs": 3, "n": 2, "stop": "x", "detokenize": True}
    config = SamplingConfig.from_trtllm(later)
    assert (config.random_seed, config.min_length, config.max_new_tokens) == (7, 2, 11)
    assert (config.num_logprobs, config.output_log_probs, config.num_return_sequences) == (3, True, 2)
    assert config.stop_strings == ("x",)


class Bound:
    """As objects of the C++ bindings are: attributes without a ``__dict__``."""

    __slots__ = ("__dict__",)
    top_k = property(lambda self: 3)
    top_p = property(lambda self: None)

    def method(self):
        """Passed over."""


def test_trtllm_objects_of_the_bindings():
    assert SamplingConfig.from_trtllm(Bound()).top_k == 3


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            {"topKMedusaHeads": [[1]], "topK": 2},
            "'topKMedusaHeads' from the TensorRT-LLM config: unknown, or not supported",
        ),
        ({"temperature": [0.1, 0.2]}, "temperature has 2 values: SamplingConfig.for_batch"),
        ({"best_of": 4, "use_beam_search": True}, "'best_of', 'use_beam_search'"),
    ],
)
def test_trtllm_refuses_by_name(theirs, words):
    with pytest.raises(ConfigError, match=words):
        SamplingConfig.from_trtllm(theirs)
