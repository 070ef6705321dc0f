"""What others call the fields of SamplingConfig: OpenAI's requests, transformers' and TensorRT-LLM's configs.

Each function returns fields of ours, and refuses by name what it does not know: a wish is translated or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from trtllm_core.errors import ConfigError, listing

Fields = dict[str, Any]
Translation = str | Callable[[Any], Fields]
"""Our name of a field that means the same, or what makes our fields of its value."""

WHOLE_PROMPT = 2**31 - 1
"""``prompt_ignore_length`` of penalties that count no token of the prompt."""


def _translated(source: str, given: Mapping[str, Any], table: Mapping[str, Translation]) -> Fields:
    fields: Fields = {}
    for name, translation in table.items():
        if given.get(name) is None:
            continue
        fields |= {translation: given[name]} if isinstance(translation, str) else translation(given[name])
    if unknown := [name for name, value in given.items() if name not in table and value is not None]:
        raise ConfigError(f"SamplingConfig cannot take {listing(unknown)} from {source}: unknown, or not supported")
    return fields


def _without(given: Mapping[str, Any], names: Collection[str], neutral: Mapping[str, Any]) -> Fields:
    """Drops what says nothing about choosing tokens, and what has the value that asks for nothing."""
    return {n: v for n, v in given.items() if n not in names and (n not in neutral or neutral[n] != v)}


def _words_of(tokens: Any) -> Fields:
    ids = [tokens] if isinstance(tokens, int) else tokens
    return {"stop_words_list": tuple((int(token),) for token in ids)}


# -- OpenAI ------------------------------------------------------------------------------------------------------------

_OPENAI_ELSEWHERE = (
    "messages",
    "metadata",
    "model",
    "prompt",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "user",
)
_OPENAI_NEUTRAL = {
    "best_of": 1,
    "echo": False,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
}


def _openai_logprobs(value: Any) -> Fields:
    """A number in completions, yes or no in chats."""
    count = 0 if isinstance(value, bool) else int(value)
    return {"num_logprobs": count, "output_log_probs": value is not False}


_OPENAI: dict[str, Translation] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "num_return_sequences",
    "seed": "random_seed",
    "stop": "stop_strings",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": lambda bias: {"embedding_bias": {int(token): value for token, value in bias.items()}},
    "logprobs": _openai_logprobs,
    "top_logprobs": "num_logprobs",
    # extensions of open servers
    "top_k": lambda k: {"top_k": max(k, 0)},
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_length",
    "stop_token_ids": _words_of,
    "ignore_eos": lambda ignore: {"end_id": ()} if ignore else {},
}


def openai_fields(body: Mapping[str, Any]) -> Fields:
    """See ``SamplingConfig.from_openai``."""
    asked = _without(body, _OPENAI_ELSEWHERE, _OPENAI_NEUTRAL)
    fields = _translated("the request", asked, _OPENAI)
    if fields.get("presence_penalty") or fields.get("frequency_penalty"):
        fields["prompt_ignore_length"] = WHOLE_PROMPT
    return {"preset": "hf", "top_k": 0, "top_p": 1.0, "min_length": 0, **fields}


# -- transformers ------------------------------------------------------------------------------------------------------

_HF_ELSEWHERE = (
    *("_from_model_config", "transformers_version", "bos_token_id", "decoder_start_token_id", "is_assistant"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
)
"""What its values say about the cache, the inputs and an assistant model changes no token, or nothing by itself."""

_HF_NEUTRAL = {
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "use_mtp": False,
}


def _early_stopping(value: bool | str) -> Fields:
    return {"early_stopping": 2 if value == "never" else int(value)}


def _sequence_bias(value: Any) -> Fields:
    pairs = value.items() if isinstance(value, Mapping) else value
    if long := [tokens for tokens, _ in pairs if len(tokens) > 1]:
        raise ConfigError(f"sequence_bias of several tokens, such as {tuple(long[0])}, is not supported here")
    return {"embedding_bias": {tokens[0]: bias for tokens, bias in pairs}}


_HF: dict[str, Translation] = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_length",
    "min_length": "min_sequence_length",
    "max_time": "max_time",
    "stop_strings": "stop_strings",
    "eos_token_id": "end_id",
    "pad_token_id": "pad_id",
    "do_sample": lambda _: {},
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "epsilon_cutoff": "epsilon_cutoff",
    "eta_cutoff": "eta_cutoff",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_list",
    "sequence_bias": _sequence_bias,
    "suppress_tokens": lambda tokens: {"embedding_bias": dict.fromkeys(tokens, float("-inf"))},
    "num_beams": "num_beams",
    "num_return_sequences": "num_return_sequences",
    "length_penalty": "length_penalty",
    "early_stopping": _early_stopping,
    "return_dict_in_generate": "return_dict",
}


def hf_fields(config: Any, overrides: Collection[str] = ()) -> Fields:
    """See ``SamplingConfig.from_hf``; ``overrides`` are the fields that the caller gives himself."""
    given = dict(config if isinstance(config, Mapping) else config.to_dict())
    asked = _without(given, _HF_ELSEWHERE, _HF_NEUTRAL)
    if asked.get("max_new_tokens") is not None or "max_new_tokens" in overrides:
        asked.pop("max_length", None)  # as in transformers
    elif asked.get("max_length") is not None:
        raise ConfigError("the generation config has max_length, which counts the prompt: give max_new_tokens instead")
    groups: Fields = {}
    if "num_beam_groups" in asked and asked["num_beam_groups"] is not None:
        params = {"groups": asked.pop("num_beam_groups"), "penalty": asked.pop("diversity_penalty", None) or 0.0}
        groups = {"decoder": {"name": "diverse_beam_search", "params": params}}
    fields = _translated("the generation config", asked, _HF)
    if asked.get("sequence_bias") and asked.get("suppress_tokens"):
        fields["embedding_bias"] = _sequence_bias(asked["sequence_bias"])["embedding_bias"] | fields["embedding_bias"]
    fields |= groups
    if fields.get("num_beams", 1) > 1:
        fields = {"early_stopping": 0, **fields}
    fields = {"preset": "hf", "min_length": 0, "top_k": 50, "top_p": 1.0, **fields}
    return fields if given.get("do_sample") else {**fields, "top_k": 1}


# -- TensorRT-LLM ------------------------------------------------------------------------------------------------------

_TRTLLM_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "use_beam_search": False,
    "original_temperature": 1.0,
    "ignore_eos": False,
    "add_special_tokens": True,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_encoder_output": False,
    "return_perf_metrics": False,
    "exclude_input_from_output": True,
}

_TRTLLM: dict[str, Translation] = {
    **{
        name: name
        for name in (
            *("end_id", "pad_id", "max_new_tokens", "min_length", "num_beams", "temperature", "top_k", "top_p"),
            *("top_p_decay", "top_p_min", "top_p_reset_ids", "min_p", "random_seed", "embedding_bias"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_ignore_length"),
            *("no_repeat_ngram_size", "num_return_sequences", "length_penalty", "early_stopping"),
            *("beam_search_diversity_rate", "beam_width_array", "use_beam_hyps", "draft_acceptance_threshold"),
            *("max_attention_window_size", "sink_token_length", "stop_words_list", "bad_words_list"),
            *("output_sequence_lengths", "return_dict", "output_cum_log_probs", "output_log_probs"),
            *("normalize_log_probs", "prompt_logprobs"),
        )
    },
    "beam_width": "num_beams",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_length",
    "seed": "random_seed",
    "cum_log_probs": "output_cum_log_probs",
    "n": "num_return_sequences",
    "logprobs": lambda count: {"num_logprobs": int(count), "output_log_probs": True},
    "stop": "stop_strings",
    "stop_token_ids": _words_of,
    "ignore_eos": lambda ignore: {"end_id": ()} if ignore else {},
}

_TRTLLM_NAMES = {name.replace("_", ""): name for name in (*_TRTLLM, *_TRTLLM_NEUTRAL)}


def trtllm_fields(config: Any, executor: bool = False) -> Fields:
    """See ``SamplingConfig.from_trtllm``."""
    given = {}
    for name, value in _attributes(config).items():
        known = _TRTLLM_NAMES.get(name.replace("_", "").lower(), name)
        given[known] = _one(known, value)
    fields = _translated("the TensorRT-LLM config", _without(given, (), _TRTLLM_NEUTRAL), _TRTLLM)
    if not executor:
        return fields
    # Of the C++ defaults, these differ from the Python ones.
    return {"top_k": 0, **({"length_penalty": 0.0} if fields.get("num_beams", 1) > 1 else {}), **fields}


def _attributes(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "__dict__") and vars(config):
        return {name: value for name, value in vars(config).items() if not name.startswith("_")}
    names = [name for name in dir(config) if not name.startswith("_")]  # an object of the C++ bindings
    return {name: value for name in names if not callable(value := getattr(config, name))}


def _one(name: str, value: Any) -> Any:
    """The C++ runtime keeps each number as a vector: of one, for a single request."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if name in ("beam_width_array", "embedding_bias", "end_id", "stop_token_ids", "stop"):
        return value
    numbers = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    if not numbers or not value:
        return value
    if len(value) > 1:
        raise ConfigError(f"{name} has {len(value)} values: SamplingConfig.for_batch makes a config for each sequence")
    return value[0]
