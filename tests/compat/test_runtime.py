"""The classic runtime API over our engine: signatures, mutable configs, result shapes, and what is refused."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from trtllm_core import BuildConfig, build_engine
from trtllm_core import SamplingConfig as CoreConfig
from trtllm_core.compat.tensorrt_llm import runtime
from trtllm_core.compat.tensorrt_llm.builder import Engine, get_engine_version
from trtllm_core.compat.tensorrt_llm.logger import logger
from trtllm_core.compat.tensorrt_llm.mapping import Mapping
from trtllm_core.compat.tensorrt_llm.runtime import (
    GenerationSession,
    LogitsProcessor,
    LogitsProcessorList,
    ModelConfig,
    ModelRunner,
    ModelRunnerCpp,
    SamplingConfig,
    Session,
    StoppingCriteria,
    StoppingCriteriaList,
    TensorInfo,
    decode_words_list,
    to_word_list_format,
)
from trtllm_core.compat.tensorrt_llm.runtime.sampling import core_configs
from trtllm_core.errors import CapacityError, ConfigError, PluginRuntimeError
from trtllm_core.plugin import DeviceLogitsProcessor
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [torch.tensor([5, 6]), torch.tensor([11]), torch.tensor([42, 17, 3])]
LISTS = [prompt.tolist() for prompt in PROMPTS]
END = 96


def session() -> GenerationSession:
    return GenerationSession(None, Session.from_engine(MarkovExecutable()))


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner(session(), 8, 127, 128, 1)


@pytest.fixture
def cpp() -> ModelRunnerCpp:
    return ModelRunnerCpp(session(), 8, 127, 128, 1)


@pytest.fixture
def greedy(runner, by_hand):
    """The first 12 tokens of each prompt."""
    return [by_hand(runner, prompt, lambda _, logits: logits) for prompt in LISTS]


# -- signatures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (SamplingConfig, "end_id pad_id max_new_tokens num_beams max_attention_window_size sink_token_length"),
        (ModelRunner, "session max_batch_size max_input_len max_seq_len max_beam_width lora_manager"),
        (ModelRunner.from_dir, "engine_dir lora_dir rank debug_mode lora_ckpt_source medusa_choices stream"),
        (ModelRunner.from_engine, "engine lora_dir rank debug_mode lora_ckpt_source medusa_choices stream"),
        (
            ModelRunner.generate,
            "self batch_input_ids sampling_config prompt_table prompt_tasks lora_uids streaming stopping_criteria "
            "logits_processor medusa_choices",
        ),
        (
            GenerationSession,
            "model_config engine_buffer mapping debug_mode debug_tensors_to_save cuda_graph_mode stream",
        ),
        (
            GenerationSession.setup,
            "self batch_size max_context_length max_new_tokens beam_width max_attention_window_size sink_token_length "
            "encoder_max_input_length lora_manager lora_uids medusa_choices",
        ),
        (
            GenerationSession.decode,
            "self input_ids context_lengths sampling_config prompt_embedding_table tasks prompt_vocab_size "
            "stop_words_list bad_words_list no_repeat_ngram_size streaming output_sequence_lengths return_dict "
            "encoder_output encoder_input_lengths stopping_criteria logits_processor cross_attention_mask",
        ),
        (
            ModelConfig,
            "max_batch_size max_beam_width vocab_size num_layers num_heads num_kv_heads hidden_size "
            "gpt_attention_plugin remove_input_padding",
        ),
        (Session.run, "self inputs outputs stream context"),
        (Session.infer_shapes, "self inputs context"),
        (Session.set_shapes, "self tensors context"),
        (TensorInfo, "name dtype shape"),
        (Mapping, "world_size rank gpus_per_node tp_size pp_size"),
        (
            runtime.KVCacheManager,
            "num_layers num_blocks block_size tokens_per_block max_blocks_per_seq max_attention_window_size "
            "sink_token_len beam_width use_one_more_block",
        ),
        (to_word_list_format, "word_dict tokenizer add_special_tokens"),
        (decode_words_list, "word_dict tokenizer add_special_tokens"),
    ],
)
def test_positions_are_the_classic_ones(function, names):
    names = names.split()
    assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_everything_that_was_exported_is():
    classic = """ModelConfig GenerationSession GenerationSequence KVCacheManager SamplingConfig Session TensorInfo
        ChatGLMGenerationSession QWenForCausalLMGenerationSession to_word_list_format LogitsProcessorList
        LogitsProcessor StoppingCriteriaList StoppingCriteria ModelRunner ModelRunnerCpp PYTHON_BINDINGS
        MambaLMHeadModelGenerationSession EncDecModelRunner MultimodalModelRunner decode_words_list"""
    assert set(classic.split()) <= set(runtime.__all__)
    assert all(hasattr(runtime, name) for name in runtime.__all__)
    with pytest.raises(ConfigError, match=r"^tensorrt_llm.runtime.EncDecModelRunner: trtllm-core runs decoder-only"):
        runtime.EncDecModelRunner("engine", 0)


# -- SamplingConfig ----------------------------------------------------------------------------------------------------


def test_the_config_is_mutable_and_has_the_classic_defaults():
    config = SamplingConfig(50256, 50255)
    defaults = (config.max_new_tokens, config.top_k, config.top_p, config.length_penalty, config.early_stopping)
    assert defaults == (20, 1, 0.0, 1.0, 1)
    config.temperature = 0.5
    config.random_seed = torch.tensor([1, 2])
    assert config.update(top_k=4, output_log_probs=True, tpo_p=0.9) == {"tpo_p": 0.9}
    assert (config.temperature, config.top_k, config.output_log_probs) == (0.5, 4, True)
    with pytest.raises(TypeError):
        SamplingConfig(1, 2, random_seed=3)
    with pytest.raises(TypeError):
        SamplingConfig()


def test_defaults_ask_for_nothing():
    """Whoever sets nothing asks our own config for nothing but what was always there."""
    (ours,) = core_configs(SamplingConfig(7, 7), [[1, 2]])
    assert ours == CoreConfig(end_id=7, random_seed=0)
    assert ours.asked() == {"end_id", "random_seed"}


def test_numbers_may_be_given_for_each_request():
    config = SamplingConfig(7, 7, temperature=torch.tensor([0.5, 2.0]), top_k=[3, 4], min_length=np.array([2]))
    config.random_seed = torch.tensor([[11], [12]])
    first, second = core_configs(config, [[1], [2]])
    assert (first.temperature, first.top_k, first.min_length, first.random_seed) == (0.5, 3, 2, 11)
    assert (second.temperature, second.top_k, second.min_length, second.random_seed) == (2.0, 4, 2, 12)
    with pytest.raises(ConfigError, match="has 2 values for a batch of 3"):
        core_configs(config, [[1], [2], [3]])


def test_later_fields_are_there_too():
    config = SamplingConfig(7, 7, embedding_bias=torch.tensor([[0.0, 1.0], [2.0, 0.0]]), beam_width_array=[2, 3])
    config.update(min_p=0.1, no_repeat_ngram_size=2, num_return_sequences=3, normalize_log_probs=True, num_beams=3)
    first, second = core_configs(config, [[1], [2]])
    assert (first.embedding_bias, second.embedding_bias) == ((0.0, 1.0), (2.0, 0.0))
    assert (first.min_p, first.no_repeat_ngram_size, first.num_return_sequences) == (0.1, 2, 3)
    assert (first.beam_width_array, first.normalize_log_probs) == ((2, 3), True)


def test_ends(caplog):
    (none,) = core_configs(SamplingConfig(-1, 3), [[1]])
    assert (none.end_id, none.pad_id) == ((), 3)
    (engine,) = core_configs(SamplingConfig(None, None), [[1]])
    assert engine.end_id is None
    logger.set_level("warning")
    with caplog.at_level("WARNING", "tensorrt_llm"):
        (cut,) = core_configs(SamplingConfig(7, 7, top_k=5000, top_p=1.5), [[1]])
    assert (cut.top_k, cut.top_p) == (1024, 1.0)
    assert "top_k 5000 is out of range, 1024 is used" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        to_word_list_format([[[5, 7, 3], [9, 2]], [[8]]]),
        torch.from_numpy(to_word_list_format([[[5, 7, 3], [9, 2]], [[8]]])),
        torch.Tensor(to_word_list_format([[[5, 7, 3], [9, 2]], [[8]]])),
        [[[5, 7, 3], [9, 2]], [[8]]],
    ],
)
def test_words_come_in_every_form(words):
    config = SamplingConfig(1, 1, stop_words_list=words, bad_words_list=[[[4]]])
    first, second = core_configs(config, [[1], [2]])
    assert (first.stop_words_list, second.stop_words_list) == (((5, 7, 3), (9, 2)), ((8,),))
    assert first.bad_words_list == second.bad_words_list == ((4,),)
    with pytest.raises(ConfigError, match="stop_words_list has 2 values for a batch of 3"):
        core_configs(config, [[1], [2], [3]])


def test_a_window_that_holds_everything_is_none():
    config = SamplingConfig(1, 1, max_new_tokens=4)
    for window in (6, [6, 9], torch.tensor([6, 6], dtype=torch.int32)):
        config.max_attention_window_size = window
        assert core_configs(config, [[1, 2]])[0].max_attention_window_size is None
    config.max_attention_window_size = torch.tensor([5, 5])
    assert core_configs(config, [[1, 2]])[0].max_attention_window_size == 5


def test_fields_of_beams_mean_nothing_to_one_beam():
    config = SamplingConfig(1, 1, length_penalty=2.0, early_stopping=0, use_beam_hyps=False)
    config.beam_search_diversity_rate = 0.5
    assert core_configs(config, [[1]])[0].asked() == {"end_id", "random_seed"}
    config.num_beams = 3
    asked = core_configs(config, [[1]])[0].asked() - {"end_id", "random_seed"}
    names = {"num_beams", "length_penalty", "early_stopping", "use_beam_hyps", "beam_search_diversity_rate"}
    assert asked == names


def test_word_lists_have_the_classic_form():
    words = [[[5, 7, 3], [9, 2], [6, 2, 4, 1]], [[8]]]
    golden = [
        [[5, 7, 3, 9, 2, 6, 2, 4, 1], [3, 5, 9, -1, -1, -1, -1, -1, -1]],
        [[8, 0, 0, 0, 0, 0, 0, 0, 0], [1, -1, -1, -1, -1, -1, -1, -1, -1]],
    ]
    assert to_word_list_format(words).tolist() == golden
    assert to_word_list_format([words[0]]).tolist() == golden[:1]

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(letter) for letter in text if letter != " "]

    assert to_word_list_format([['ab,"c,d"']], Tokenizer()).tolist() == [[[97, 98, 99, 44, 100], [2, 5, -1, -1, -1]]]
    assert decode_words_list([["ab", b"c,d", " "], []], Tokenizer()) == [[[97, 98], [99, 44, 100]], []]
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        decode_words_list([["a"]])


# -- ModelRunner -------------------------------------------------------------------------------------------------------


def test_ids_are_the_classic_tensor(runner, greedy):
    end = greedy[1][4]
    ids = runner.generate(PROMPTS, SamplingConfig(end, 3), max_new_tokens=12)
    assert ids.dtype == torch.int32
    assert ids.shape == (3, 1, 15)
    for row, prompt, tokens in zip(ids[:, 0].tolist(), LISTS, greedy, strict=True):
        new = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert row == [*prompt, *new] + [end] * (15 - len(prompt) - len(new))


def test_the_dictionary_has_what_was_asked_for(runner, greedy):
    config = SamplingConfig(greedy[1][4], 3, max_new_tokens=12, return_dict=True, output_sequence_lengths=True)
    config.output_log_probs = config.output_cum_log_probs = True
    result = runner.generate(PROMPTS, config)
    assert result["output_ids"].shape == (3, 1, 15)
    ends = [tokens.index(greedy[1][4]) if greedy[1][4] in tokens else 12 for tokens in greedy]
    assert result["sequence_lengths"].tolist() == [[len(p) + n] for p, n in zip(LISTS, ends, strict=True)]
    assert result["log_probs"].shape == (3, 1, 15)
    assert torch.allclose(result["log_probs"].sum(-1), result["cum_log_probs"])
    assert config.return_dict, "the config is left as it was"
    assert set(runner.generate(PROMPTS, config, output_log_probs=False)) >= {"output_ids", "cum_log_probs"}


def test_arguments_by_position(runner, greedy):
    class Ban(LogitsProcessor):
        def __call__(self, step, input_ids, scores):
            scores[:, greedy[0][2]] = -float("inf")
            return scores

    class Third(StoppingCriteria):
        def __call__(self, step, input_ids, scores):
            return step == 2

    stream = runner.generate(PROMPTS, SamplingConfig(END, END), None, None, None, True, Third(), Ban(), None)
    steps = list(stream)
    assert len(steps) == 3
    assert steps[-1][0, 0, 2:4].tolist() == greedy[0][:2]
    assert steps[-1][0, 0, 4] != greedy[0][2]


def test_callbacks_in_lists_and_plugins_of_ours(runner, greedy):
    calls = []

    class Log(LogitsProcessor):
        def __call__(self, step, input_ids, scores):
            calls.append(step)
            return scores

    class Never(StoppingCriteria):
        def __call__(self, step, input_ids, scores):
            calls.append("never")
            return False

    class After(StoppingCriteria):
        def __call__(self, step, input_ids, scores):
            return step == 1

    class Plain(DeviceLogitsProcessor):
        def apply(self, logits, batch):
            logits[:, 7] += 100

    runner.generate(
        PROMPTS,
        SamplingConfig(END, END),
        stopping_criteria=StoppingCriteriaList([Never(), After(), Never()]),
        logits_processor=LogitsProcessorList([Log(), Log()]),
    )
    assert calls == [0, 0, "never", "never", 1, 1, "never"], "any() asks no further"
    ids = runner.generate(PROMPTS, SamplingConfig(END, END), max_new_tokens=3, logits_processor=[Log(), Plain()])
    assert ids[1, 0, 1:4].tolist() == [7, 7, 7]
    with pytest.raises(NotImplementedError):
        LogitsProcessor()(0, None, None)
    with pytest.raises(NotImplementedError):
        StoppingCriteria()(0, None, None)


def test_what_a_callback_raises_reaches_the_caller(runner):
    def wrong(step, input_ids, scores):
        raise KeyError("mine")

    for fields in ({}, {"return_dict": True}):
        with pytest.raises(PluginRuntimeError, match="mine") as caught:
            runner.generate(PROMPTS, SamplingConfig(END, END), logits_processor=wrong, **fields)
        assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_token": 3}, ConfigError, r"no argument 'max_new_token' \(did you mean 'max_new_tokens'\?\)"),
        ({"max_new_tokens": 126}, CapacityError, "input length . max_new_tokens 129 is more than the 128"),
        ({"num_beams": 2}, CapacityError, "num_beams 2 is more than the 1"),
        ({"medusa_choices": [[0]]}, ConfigError, "has no Medusa heads; for speculation choose a decoder; leave it out"),
        ({"benchmark_profiler": object()}, ConfigError, "no argument 'benchmark_profiler'"),
        ({"temperature": -1.0}, ConfigError, "temperature = -1.0"),
        ({"output_sequence_lengths": True}, ConfigError, "no place for it; ask for return_dict=True"),
    ],
)
def test_refusals(runner, options, error, words):
    with pytest.raises(error, match=words):
        runner.generate(PROMPTS, SamplingConfig(END, END), **options)
    assert runner.session.core.session.engine.calls == 0


def test_more_refusals(runner):
    with pytest.raises(CapacityError, match="batch size 9 is more than the 8") as caught:
        runner.generate(PROMPTS * 3, SamplingConfig(END, END))
    assert isinstance(caught.value, RuntimeError), "as it was"
    with pytest.raises(ConfigError, match="no prompt"):
        runner.generate([], SamplingConfig(END, END))
    with pytest.raises(ConfigError, match="made by from_dir"):
        runner.serialize_engine()


def test_an_engine_directory(tiny):
    runner = ModelRunner.from_dir(str(tiny / "engine"), None, 0)
    assert (runner.max_batch_size, runner.max_seq_len, runner.max_beam_width) == (4, 128, 1)
    assert (runner.vocab_size, runner.num_heads, runner.num_layers) == (256, 4, 2)
    assert (runner.dtype, runner.remove_input_padding, runner.use_lora_plugin) == (torch.float32, True, False)
    assert runner.session.num_heads_kv == 2
    engine = Engine.from_dir(tiny / "engine")
    other = ModelRunner.from_engine(engine)
    prompts = [torch.tensor([5, 9, 13])]
    assert torch.equal(*(each.generate(prompts, max_new_tokens=4, end_id=255) for each in (runner, other)))
    assert runner.serialize_engine() == engine.engine.read_bytes()
    assert get_engine_version(tiny / "engine") == engine.config.core_version
    with pytest.raises(ConfigError, match="rank 1 is not one of them"):
        Engine.from_dir(tiny / "engine", 1)
    with pytest.raises(ConfigError, match="not built for LoRA adapters"):
        ModelRunner.from_dir(tiny / "engine", ["adapter"])
    model = runner.session.config.model
    data = GenerationSession(None, engine.engine.read_bytes(), Mapping())
    assert data.config.model == model


# -- ModelRunnerCpp ----------------------------------------------------------------------------------------------------


def test_the_executor_s_runner_has_its_defaults(cpp, by_hand):
    assert cpp.generate(PROMPTS, end_id=END).shape == (3, 1, 4), "one new token"
    assert torch.equal(
        cpp.generate(PROMPTS, end_id=END, max_new_tokens=9, top_p=0.9),
        cpp.generate(PROMPTS, SamplingConfig(END, END, 9, top_k=0, top_p=0.9)),
    ), "top_p alone samples"
    greedy = cpp.generate(PROMPTS, end_id=END, max_new_tokens=9)
    assert greedy[0, 0, 2:].tolist()[:9] == by_hand(cpp, LISTS[0], lambda _, x: x, 9)


def test_limits_hints_and_post_processors(tiny):
    calls = []

    def ban(req_id, logits, ids, stream_ptr, client_id):
        calls.append((req_id, ids))
        logits[:] = -1.0
        logits[..., 7] = 1.0

    runner = ModelRunnerCpp.from_dir(
        engine_dir=str(tiny / "engine"),
        rank=0,
        max_batch_size=2,
        max_input_len=4,
        max_output_len=5,
        max_beam_width=1,
        max_attention_window_size=[256],
        max_tokens_in_paged_kv_cache=64,
        kv_cache_free_gpu_memory_fraction=0.5,
        enable_chunked_context=True,
        kv_cache_enable_block_reuse=False,
        medusa_choices=None,
        logits_processor_map={"ban": ban},
    )
    assert (runner.max_batch_size, runner.max_input_len, runner.max_seq_len) == (2, 4, 9)
    assert runner.generation.loop.cache.plan.num_blocks == 4
    prompts = [torch.tensor([5, 9]), torch.tensor([8])]
    ids = runner.generate(prompts, max_new_tokens=3, end_id=255, logits_processor_names=[None, "ban"])
    assert ids[1, 0, 1:4].tolist() == [7, 7, 7]
    assert ids[0, 0, 2:].tolist() == runner.generate(prompts, max_new_tokens=3, end_id=255)[0, 0, 2:].tolist()
    assert calls == [(1, [[8]]), (1, [[8, 7]]), (1, [[8, 7, 7]])]
    with pytest.raises(ConfigError, match="has 1 entries, but there are 2 prompts"):
        runner.generate(prompts, end_id=255, logits_processor_names=["ban"])
    with pytest.raises(CapacityError, match="max_new_tokens 10 is more than the 9"):
        runner.generate(prompts, max_new_tokens=8, end_id=255)
    with pytest.raises(ConfigError, match="generate: encoder_input_ids is not honoured by trtllm-core, which runs dec"):
        runner.generate(prompts, encoder_input_ids=[1], end_id=255)
    with pytest.raises(CapacityError, match="max_batch_size 5 is more than the 4"):
        ModelRunnerCpp.from_dir(tiny / "engine", max_batch_size=5)
    with pytest.raises(ConfigError, match="eagle_choices is not honoured by trtllm-core, which has no EAGLE heads"):
        ModelRunnerCpp.from_dir(tiny / "engine", eagle_choices=[[0]])


def test_block_reuse(tiny):
    runner = ModelRunnerCpp.from_dir(tiny / "engine", kv_cache_enable_block_reuse=True)
    prompts = [torch.arange(40)]
    cached = [
        runner.generate(prompts, max_new_tokens=2, end_id=255, return_dict=True)["outputs"][0].cached_prompt_tokens
        for _ in range(2)
    ]
    assert cached == [0, 32], "its full blocks"


def test_gathered_logits(tiny, tmp_path):
    with pytest.raises(ConfigError, match="gather_generation_logits: the engine was not built with it"):
        ModelRunnerCpp.from_dir(tiny / "engine", gather_generation_logits=True)
    build = BuildConfig(max_batch_size=2, max_seq_len=32, gather_context_logits=True, gather_generation_logits=True)
    build_engine(str(tiny / "checkpoint"), tmp_path / "engine", build)
    runner = ModelRunnerCpp.from_dir(tmp_path / "engine", gather_generation_logits=True)
    assert runner.gather_context_logits
    prompts = [torch.tensor([5, 9, 13]), torch.tensor([8])]
    result = runner.generate(prompts, max_new_tokens=4, end_id=-1, return_dict=True)
    assert [tuple(logits.shape) for logits in result["context_logits"]] == [(3, 256), (1, 256)]
    assert result["generation_logits"].shape == (2, 1, 4, 256)
    ids = result["output_ids"]
    assert ids[0, 0, 3:7].tolist() == result["generation_logits"][0, 0].argmax(-1).tolist()
    assert int(result["context_logits"][1][-1].argmax()) == ids[1, 0, 1]


# -- GenerationSession -------------------------------------------------------------------------------------------------


def test_decode_takes_padded_and_packed_batches(greedy):
    s = session()
    s.setup(3, 3, 12)
    lengths = torch.tensor([2, 1, 3])
    padded = torch.tensor([[5, 6, 0], [11, 0, 0], [42, 17, 3]], dtype=torch.int32)
    packed = torch.cat(PROMPTS).int()
    config = SamplingConfig(END, END, max_new_tokens=12)
    expected = s.decode(padded, lengths, config)
    assert expected[2, 0].tolist() == LISTS[2] + greedy[2]
    for ids in (packed, packed[None]):
        assert torch.equal(s.decode(ids, lengths, config), expected)
    assert torch.equal(s.decode_batch(PROMPTS, config), expected)
    result = s.decode(padded, lengths, config, None, None, None, None, [[[greedy[0][1]]]], None, False, True, True)
    assert result["sequence_lengths"].shape == (3, 1)
    assert greedy[0][1] not in result["output_ids"][0, 0].tolist()[2:]
    steps = list(s.decode(padded, lengths, config, streaming=True))
    assert torch.equal(steps[-1], expected)
    assert len(steps) == 12
    for wrong, words in ((packed[:-1], "has 5 tokens; context_lengths add up to 6"), (padded[:2], "does not fit")):
        with pytest.raises(ConfigError, match=words):
            s.decode(wrong, lengths, config)


def test_decode_is_held_against_setup():
    s = session()
    config = SamplingConfig(END, END, max_new_tokens=4)
    ids, lengths = torch.tensor([[1, 2]]), torch.tensor([2])
    with pytest.raises(ConfigError, match="call setup"):
        s.decode(ids, lengths, config)
    s.setup(1, 2, 3)
    with pytest.raises(ConfigError, match=r"setup was for 1 sequences of up to 2 \+ 3 tokens and 1 beams"):
        s.decode(ids, lengths, config)
    for arguments, words in (
        ((9, 2, 3), "batch_size is 9"),
        ((1, 2, 3, 4), "beam_width is 4"),
        ((1, 2, 999), "is 1001"),
    ):
        with pytest.raises(CapacityError, match=words):
            s.setup(*arguments)
    with pytest.raises(ConfigError, match="setup: medusa_choices is not honoured"):
        s.setup(1, 2, 4, medusa_choices=[[0]])
    s.setup(1, 2, 4)
    with pytest.raises(ConfigError, match="decode: encoder_output is not honoured"):
        s.decode(ids, lengths, config, encoder_output=torch.zeros(1))


def test_what_is_gone_says_what_stands_in_its_place():
    with pytest.raises(AttributeError, match="find_best_medusa_path is not carried on: there are no Medusa heads"):
        session().find_best_medusa_path()
    with pytest.raises(AttributeError, match="handle_per_step is not carried on: the loop is .*StepLoop"):
        session().handle_per_step()
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        session().nonsense()
    with pytest.raises(ConfigError, match="without debug_mode"):
        session().dump_debug_buffers(0)


def test_dump_debug_buffers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = GenerationSession(None, Session.from_engine(MarkovExecutable()), None, True, ["logits"])
    s.setup(1, 2, 4)
    s.decode(
        torch.tensor([[3, 4]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        SamplingConfig(96, 0, max_new_tokens=4),
    )
    assert list(s.debug_buffer) == ["logits"]
    s.dump_debug_buffers(5)
    (path,) = tmp_path.rglob("*.npy")
    assert str(path.relative_to(tmp_path)) == "tllm_debug/PP_0/TP_0/logits-step5.npy"


def model_config(**changes):
    fields = {
        "max_batch_size": 8,
        "max_beam_width": 1,
        "vocab_size": 97,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "hidden_size": 8,
        "gpt_attention_plugin": True,
        "dtype": "float32",
        **changes,
    }
    return ModelConfig(**fields)


def test_a_model_config_is_held_against_the_engine():
    engine = MarkovExecutable()
    assert GenerationSession(model_config(head_size=8), Session.from_engine(engine)).head_size == 8
    for changes, words in (
        ({"vocab_size": 98}, r"vocab_size 98 \(the engine has 97\)"),
        ({"num_layers": 2, "dtype": "float16"}, r"dtype float16 .*, num_layers 2"),
        ({"max_batch_size": 9}, r"max_batch_size 9 \(the engine has 8\)"),
        ({"gather_context_logits": True}, r"gather_context_logits \(the engine has none\)"),
        ({"cross_attention": True}, "cross_attention is not honoured"),
    ):
        with pytest.raises(ConfigError, match=words):
            GenerationSession(model_config(**changes), Session.from_engine(engine))


# -- Session -----------------------------------------------------------------------------------------------------------


def test_a_session_takes_its_context_and_refuses_addresses(tiny):
    s = Session.from_serialized_engine(Engine.from_dir(tiny / "engine").engine)
    assert isinstance(s, Session)
    assert s.context is s.runtime
    infos = [
        TensorInfo("input_ids", torch.int32, (2,)),
        TensorInfo("logits_indices", torch.int64, (1,)),
    ]
    (logits,) = s.infer_shapes(infos, s.context)
    assert logits.shape == (1, 256)
    s.set_shapes({"input_ids": torch.zeros(2, dtype=torch.int32)}, context=None)
    with pytest.raises(ValueError, match="outside the engine's"):
        s.set_shapes({"input_ids": torch.zeros(100_000, dtype=torch.int32)})
    with pytest.raises(ConfigError, match="'input_ids' is a int; give a tensor"):
        s.run({"input_ids": 0x7F0000}, {}, 0)
    with pytest.raises(ConfigError, match="context is not honoured"):
        s.set_shapes({}, object())
    s._print_engine_info()


def test_engines_with_other_limits():
    build = BuildConfig(max_batch_size=2, max_input_len=7, max_seq_len=8, max_num_tokens=8, tokens_per_block=8)
    s = GenerationSession(None, Session.from_engine(MarkovExecutable(build=build)), Mapping())
    assert s.vocab_size_padded == 97
    assert s.mapping.rank == 0
