"""The built-in samplers, logits processors and stopping criteria, registered as any plugin registers its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.plugin.markers import hookimpl
from trtllm_core.plugin.registrar import AnyOf

if TYPE_CHECKING:
    from trtllm_core.plugin.registrar import (
        DecoderRegistrar,
        LogitsProcessorRegistrar,
        StoppingCriterionRegistrar,
    )

hook_api = ["decoder>=1.0,<2", "logits_processor>=1.0,<2", "stopping_criterion>=1.0,<2"]

_HERE = "trtllm_core.decoding"


@hookimpl
def trtllm_register_decoders(registrar: DecoderRegistrar) -> None:
    """Register the samplers."""
    # A greedy choice is the plan's for top_k = 1, for top_k = top_p = 0 and for temperature = 0.
    registrar.add("greedy", f"{_HERE}.samplers:Greedy", consumes=("top_k", "top_p", "random_seed"))
    registrar.add(
        "top_k_top_p",
        f"{_HERE}.samplers:TopKTopP",
        consumes=("top_k", "top_p", "top_p_decay", "top_p_min", "top_p_reset_ids", "random_seed"),
    )
    # These two draw from what the processors leave: top-k and top-p are theirs then.
    registrar.add("multinomial", f"{_HERE}.samplers:Multinomial", consumes=("random_seed",))
    registrar.add("mirostat", f"{_HERE}.mirostat:Mirostat", consumes=("random_seed",))
    registrar.add("draft_model", f"{_HERE}.draft_model:DraftModel", consumes=("draft_acceptance_threshold",))
    registrar.add("contrastive_search", f"{_HERE}.contrastive:ContrastiveSearch")
    registrar.add("ngram", f"{_HERE}.ngram:NGram", consumes=("num_return_sequences",))
    beams = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping", "random_seed")
    classic = ("beam_search_diversity_rate", "beam_width_array")
    registrar.add("beam_search", f"{_HERE}.beam_search:BeamSearch", consumes=(*beams, *classic))
    in_place = ("num_beams", "num_return_sequences", "random_seed", "use_beam_hyps")
    registrar.add("plain_beam_search", f"{_HERE}.plain_beams:PlainBeamSearch", consumes=(*in_place, *classic))
    registrar.add("hf_beam_search", f"{_HERE}.hf_beams:HFBeamSearch", consumes=beams)
    registrar.add("diverse_beam_search", f"{_HERE}.diverse_beams:DiverseBeamSearch", consumes=beams)
    registrar.add("hf_beam_sample", f"{_HERE}.hf_beams:HFBeamSample", consumes=beams)


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    """Register the processors, in the order of the ``trtllm`` preset."""
    registrar.add("log_softmax", f"{_HERE}.processors:LogSoftmax")
    registrar.add("embedding_bias", f"{_HERE}.processors:EmbeddingBias", consumes={"embedding_bias": None})
    registrar.add("temperature", f"{_HERE}.processors:Temperature", consumes={"temperature": 1.0})
    registrar.add(
        "penalties",
        f"{_HERE}.penalties:Penalties",
        consumes={
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "prompt_ignore_length": 0,
        },
    )
    registrar.add("min_length", f"{_HERE}.processors:MinLength", consumes={"min_length": 0, "min_sequence_length": 0})
    registrar.add("no_repeat_ngram", f"{_HERE}.bans:NoRepeatNgram", consumes={"no_repeat_ngram_size": 0})
    registrar.add("bad_words", f"{_HERE}.bans:BadWords", consumes={"bad_words_list": ()})
    # 1 is top_k's default: greedy where nobody names a decoder, and not meant where somebody does.
    registrar.add("top_k", f"{_HERE}.truncation:TopK", consumes={"top_k": AnyOf(0, 1)})
    registrar.add("top_p", f"{_HERE}.truncation:TopP", consumes={"top_p": AnyOf(0.0, 1.0)})
    registrar.add("min_p", f"{_HERE}.truncation:MinP", consumes={"min_p": 0.0})
    registrar.add("typical_p", f"{_HERE}.truncation:TypicalP", consumes={"typical_p": 1.0})
    registrar.add("epsilon_cutoff", f"{_HERE}.truncation:EpsilonCutoff", consumes={"epsilon_cutoff": 0.0})
    registrar.add("eta_cutoff", f"{_HERE}.truncation:EtaCutoff", consumes={"eta_cutoff": 0.0})


@hookimpl
def trtllm_register_stopping_criteria(registrar: StoppingCriterionRegistrar) -> None:
    """Register the criteria."""
    registrar.add("end_id", f"{_HERE}.criteria:EndId", consumes={"end_id": ()})
    registrar.add("stop_words", f"{_HERE}.stop_words:StopWords", consumes={"stop_words_list": ()})
    registrar.add("stop_strings", f"{_HERE}.stop_strings:StopStrings", consumes={"stop_strings": ()})
    registrar.add("stop_regexes", f"{_HERE}.stop_regexes:StopRegexes", consumes={"stop_regexes": ()})
    registrar.add("max_time", f"{_HERE}.time_limit:MaxTime", consumes={"max_time": None})
    registrar.add("confidence", f"{_HERE}.confidence:Confidence")
    registrar.add("repetition", f"{_HERE}.repetition:Repetition")
    # There is no number of new tokens at which the limit is not needed.
    registrar.add("max_tokens", f"{_HERE}.criteria:MaxTokens", consumes={"max_new_tokens": None})
