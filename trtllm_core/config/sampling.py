"""What a request may say about choosing and ending its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from trtllm_core.config.base import Config
from trtllm_core.config.patterns import growing_pattern

Tokens = tuple[int, ...]
Words = tuple[Tokens, ...]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _tokens(value: Any) -> Any:
    return (value,) if isinstance(value, int) else _tuples(value)


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
    temperature: float = Field(default=1.0, ge=0.0, description="0 is greedy")
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
    embedding_bias: dict[int, float] | None = Field(default=None, description="token id to a bias on its logit")
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_ignore_length: int = Field(default=0, ge=0, description="prompt tokens that no penalty counts")
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    # branches
    num_beams: int = Field(default=1, ge=1, le=64)
    num_return_sequences: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    early_stopping: int = 1
    beam_search_diversity_rate: float = Field(default=0.0, ge=0.0)
    beam_width_array: tuple[int, ...] = Field(default=(), max_length=8)
    use_beam_hyps: bool = True
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

    def asked(self) -> frozenset[str]:
        """Names of the fields whose value differs from the default: each needs a consumer."""
        fields = type(self).model_fields
        return frozenset(n for n in self.model_fields_set if getattr(self, n) != fields[n].default)
