"""What to do about a name that nobody registered."""

from __future__ import annotations

import pytest

from trtllm_core.errors import PluginNotFoundError


def test_hint_by_convention_and_by_recorded_distribution(site) -> None:
    plugins = site.load()
    assert plugins.missing_hint("model_family", "llama") == "To install it: pip install trtllm-plugin-llama"
    assert plugins.missing_hint("model_family", "LlamaForCausalLM").endswith("pip install trtllm-plugin-llama")
    assert plugins.missing_hint("model_family", "gguf:llama").endswith("pip install trtllm-plugin-llama")
    for name in ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM", "gguf:gptneox", "gguf:gpt2"):
        assert plugins.missing_hint("model_family", name).endswith("pip install trtllm-plugin-gpt")
    assert plugins.missing_hint("model_family", "MistralForCausalLM").endswith("pip install trtllm-plugin-llama")
    assert plugins.missing_hint("decoder", "min_p_2").endswith("pip install trtllm-plugin-min-p-2")
    assert plugins.missing_hint("model_family", "llama", "fast-llama").endswith("pip install fast-llama")
    assert "Plugins.load(extra=…)" in plugins.missing_hint("decoder", "x", "local")
    with pytest.raises(PluginNotFoundError, match=r"registered as 'llama' \(registered: none\). To install it: pip"):
        plugins.model_families.get("llama", hint=plugins.missing_hint("model_family", "llama"))


def test_hint_tells_of_what_is_installed_but_not_there(site) -> None:
    site.install("trtllm-plugin-llama", "import nothing_like_this", plugin="llama-family")
    site.decoder("odd-name", "x", plugin="bloom")
    plugins = site.load()
    hint = plugins.missing_hint("model_family", "llama")
    assert hint.startswith("trtllm-plugin-llama 0.3.0 is installed, but was not loaded: plugin 'llama-family' of")
    assert "No module named 'nothing_like_this'" in hint
    assert plugins.missing_hint("model_family", "bloom") == (
        "odd-name 0.3.0 is loaded, but has no model family 'bloom'; try: pip install --upgrade odd-name"
    )
    denied = site.load(deny=["bloom"])
    assert "odd-name 0.3.0 is installed, but is disabled: it is on the deny list" in denied.missing_hint(
        "decoder", "x", "odd_name"
    )
