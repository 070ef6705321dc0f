"""Registers the decoder. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import DecoderRegistrar, hookimpl

hook_api = "decoder>=1.1,<2"


@hookimpl
def trtllm_register_decoders(registrar: DecoderRegistrar) -> None:
    """``best_of``."""
    fields = ("num_return_sequences", "random_seed")
    registrar.add("best_of", "trtllm_contrib_best_of.decoder:BestOf", consumes=fields)
