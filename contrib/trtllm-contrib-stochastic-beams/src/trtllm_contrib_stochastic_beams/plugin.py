"""Registers the search. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import DecoderRegistrar, hookimpl

hook_api = "decoder>=1.1,<2"


@hookimpl
def trtllm_register_decoders(registrar: DecoderRegistrar) -> None:
    """``stochastic_beam_search``."""
    search = "trtllm_contrib_stochastic_beams.search:StochasticBeamSearch"
    registrar.add("stochastic_beam_search", search, consumes=("num_beams", "num_return_sequences", "random_seed"))
