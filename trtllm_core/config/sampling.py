"""What a request may say about choosing and ending its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trtllm_core.config.base import Config
from trtllm_core.config.dialects import hf_fields, openai_fields, trtllm_fields
from trtllm_core.config.patterns import growing_pattern
from trtllm_core.config.vectors import rows_of
from trtllm_core.errors import ConfigError

Tokens = tuple[int, ...]
Words = tuple[Tokens, ...]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _tokens(value: Any) -> Any:
    return (value,) if isinstance(value, int) else _tuples(value)


def _bias(value: Any) -> Any:
    """A mapping, or one number for each token as a list, an array or a tensor."""
    return _tuples(value.tolist() if hasattr(value, "tolist") else value)


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuples(value)


class PluginUse(Config):
    """A plugin chosen by name for a request, with that plugin's own parameters."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


def use(name: str, **params: Any) -> PluginUse:
    """Choose a plugin for a request: ``use("dry", multiplier=0.8)``."""
    return PluginUse(name=name, params=params)


def _uses(value: Any) -> Any:
    items = (value,) if isinstance(value, (str, Mapping, PluginUse)) else value
    return tuple(PluginUse(name=item) if isinstance(item, str) else item for item in items)


def _use(value: Any) -> Any:
    return PluginUse(name=value) if isinstance(value, str) else value


Uses = Annotated[tuple[PluginUse, ...], BeforeValidator(_uses)]


class SamplingConfig(Config):
    """All that a request may ask of decoding. Defaults are those of the classic Python runtime.

    One config is of one request; ``for_batch`` makes one for each of several. ``from_openai``, ``from_hf`` and
    ``from_trtllm`` translate what others call the same things.

    A field that is set to something else than its default must be consumed by a decoder, a logits processor or a
    stopping criterion of the request's plan; a field that nobody consumes is an error, never ignored.
    """

    # ending
    end_id: Annotated[Tokens, BeforeValidator(_tokens)] | None = Field(
        default=None, description="one token id or several; None is the engine's own set"
    )
    pad_id: int | None = Field(default=None, ge=0, description="fills output_ids after the end; None is end_id")
    max_new_tokens: int = Field(default=20, ge=1)
    min_length: int = Field(default=1, ge=0, description="generated tokens before end_id is allowed")
    min_sequence_length: int = Field(default=0, ge=0, description="the same, prompt and generated tokens together")
    stop_words_list: Annotated[Words, BeforeValidator(_tuples)] = Field(
        default=(), description="token sequences; a match may begin in the prompt"
    )
    stop_strings: Annotated[tuple[str, ...], BeforeValidator(_strings)] = ()
    stop_regexes: Annotated[tuple[str, ...], BeforeValidator(_strings)] = Field(
        default=(), description="patterns of the regex package, searched after each character"
    )
    max_time: float | None = Field(default=None, gt=0.0, description="seconds from the start, for all its branches")
    bad_words_list: Annotated[Words, BeforeValidator(_tuples)] = ()
    # choosing
    preset: Literal["trtllm", "hf"] = Field(
        default="trtllm", description="whose order and formulas: the classic runtime's, or transformers'"
    )
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False, description="0 is greedy")
    top_k: int = Field(default=1, ge=0, le=1024, description="0 turns it off")
    top_p: float = Field(default=0.0, ge=0.0, le=1.0, description="0 turns it off")
    top_p_decay: float | None = Field(default=None, gt=0.0, le=1.0, description="top_p becomes top_p·decay a token")
    top_p_min: float | None = Field(default=None, gt=0.0, le=1.0, description="what it does not fall below")
    top_p_reset_ids: int | None = Field(default=None, ge=-1, description="the token that resets it; -1 is none")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, description="0 turns it off")
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0, description="1 turns it off")
    epsilon_cutoff: float = Field(default=0.0, ge=0.0, lt=1.0, description="0 turns it off")
    eta_cutoff: float = Field(default=0.0, ge=0.0, lt=1.0, description="0 turns it off")
    random_seed: int | None = Field(default=None, description="None draws one, which the result returns")
    embedding_bias: Annotated[dict[int, float] | tuple[float, ...], BeforeValidator(_bias)] | None = Field(
        default=None, description="added to logits: token id to bias, or one bias for each token of the vocabulary"
    )
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    presence_penalty: float = Field(default=0.0, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, allow_inf_nan=False)
    prompt_ignore_length: int = Field(
        default=0, ge=0, description="prompt tokens that presence and frequency penalties do not count"
    )
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    # branches
    num_beams: int = Field(default=1, ge=1, le=64)
    num_return_sequences: int = Field(default=1, ge=1)
    length_penalty: float = Field(default=1.0, allow_inf_nan=False)
    early_stopping: int = 1
    beam_search_diversity_rate: float = Field(default=0.0, ge=0.0)
    beam_width_array: tuple[int, ...] = Field(default=(), max_length=8)
    use_beam_hyps: bool = True
    draft_acceptance_threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    # cache
    max_attention_window_size: int | None = Field(default=None, ge=1)
    sink_token_length: int | None = Field(default=None, ge=0)
    cache_salt: str | None = Field(
        default=None, description="cached prefixes are only shared by requests of the same salt"
    )
    cache_priority: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="what it leaves in the cache goes after that of lower priority; None is 50",
    )
    # results
    output_sequence_lengths: bool = False
    return_dict: bool = False
    output_cum_log_probs: bool = False
    output_log_probs: bool = False
    num_logprobs: int = Field(
        default=0, ge=0, le=1024, description="so many of the likeliest tokens beside each generated one"
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=1024, description="log-probabilities of the prompt's tokens, beside as many others"
    )
    normalize_log_probs: bool = Field(
        default=False, description="log-probabilities among the top_k alone, not in the whole vocabulary"
    )
    # plugins
    decoder: Annotated[PluginUse | None, BeforeValidator(_use)] = Field(
        default=None, description="a registered decoder; None chooses by the other fields"
    )
    logits_processors: Uses = ()
    stopping_criteria: Uses = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("stop_words_list", "bad_words_list"):
            if any(not word or min(word) < 0 for word in getattr(self, name)):
                raise ValueError(f"{name}: each word is a sequence of at least one token id >= 0")
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty string would stop at once")
        for pattern in self.stop_regexes:
            try:
                growing_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"stop_regexes: {error}") from None
        if self.end_id is not None and any(token < 0 for token in self.end_id):
            raise ValueError("end_id: token ids are >= 0; use an empty tuple to never stop at a token")
        return self

    @classmethod
    def for_batch(cls, batch_size: int, **fields: Any) -> tuple[Self, ...]:
        """One config for each of ``batch_size`` sequences.

        A field is one value for all of them, or a vector (list, tuple, array or tensor) with one for each. A field that
        is a sequence itself, such as ``stop_words_list``, is a vector when it is nested one level deeper.

        Raises:
            ConfigError: a vector of another length, or a wrong value, with the index of its sequence.
        """
        return tuple(cls(**row) for row in rows_of(batch_size, fields))

    @classmethod
    def from_openai(cls, body: Mapping[str, Any], **fields: Any) -> Self:
        """What the body of an OpenAI (chat) completion request asks of decoding, with OpenAI's defaults.

        Presence and frequency penalties count generated tokens only, and come before the temperature (preset ``hf``).
        Of the extensions of open servers, ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``,
        ``ignore_eos`` and ``stop_token_ids`` are known. What is said, to which model, and how the answer travels is
        passed over. Without ``max_tokens`` the length is this config's default: ``fields`` may say otherwise.

        Args:
            body: the request, as JSON has it.
            fields: of this config; they win.

        Raises:
            ConfigError: names that are unknown or not supported, all of them.
        """
        return cls(**{**openai_fields(body), **fields})

    @classmethod
    def from_hf(cls, config: Any, **fields: Any) -> Self:
        """What a ``GenerationConfig`` of transformers, or a dictionary of its fields, asks of decoding (preset ``hf``).

        What is not set has the default of ``generate()``. Without ``do_sample`` the choice is greedy, and whatever only
        shapes a drawn one has no effect, as in transformers. ``max_length`` and the like count the prompt, which is not
        known here: give ``max_new_tokens``.

        Args:
            config: as above.
            fields: of this config; they win.

        Raises:
            ConfigError: names that are unknown or not supported, all of them.
        """
        return cls(**{**hf_fields(config, fields), **fields})

    @classmethod
    def from_trtllm(cls, config: Any, executor: bool = False, **fields: Any) -> Self:
        """What a config of TensorRT-LLM asks: of its Python runtime, its C++ runtime, its executor or its LLM API.

        Args:
            config: the object, or a dictionary; names in ``snake_case`` or ``camelCase``.
            executor: what is not set has the C++ default and not the Python one: ``top_k`` 0, and with beams a
                ``length_penalty`` of 0.
            fields: of this config; they win.

        Raises:
            ConfigError: names that are unknown or not supported, all of them.
        """
        return cls(**{**trtllm_fields(config, executor), **fields})

    def asked(self) -> frozenset[str]:
        """Names of the fields whose value differs from the default: each needs a consumer."""
        fields = type(self).model_fields
        return frozenset(n for n in self.model_fields_set if getattr(self, n) != fields[n].default)


def with_fields(
    configs: SamplingConfig | Sequence[SamplingConfig], batch_size: int, fields: Mapping[str, Any]
) -> SamplingConfig | Sequence[SamplingConfig]:
    """Replace fields of a batch's config, or configs. A field is one value for all sequences, or a vector.

    Raises:
        ConfigError: see ``SamplingConfig.for_batch``, or there are not as many configs as sequences.
    """
    if not fields:
        return configs
    each = [configs] * batch_size if isinstance(configs, SamplingConfig) else list(configs)
    if len(each) != batch_size:
        raise ConfigError(f"{batch_size} prompts need one SamplingConfig or {batch_size}, not {len(each)}")
    return [config.replace(**row) for config, row in zip(each, rows_of(batch_size, fields), strict=True)]
