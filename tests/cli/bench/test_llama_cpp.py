"""llama.cpp as a peer: that it is given the same work, and does it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.cli.bench.peers import PeerSource, load_peer
from trtllm_core.cli.bench.workloads import Workload
from trtllm_core.runner import ModelRunner


@pytest.fixture(scope="module")
def tiny_gguf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's weights as llama.cpp's converter would write them, in float32 and without a vocabulary."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((tiny_checkpoint / "config.json").read_text())
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(tiny_checkpoint / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:  # rotated pairs are neighbours there
            heads = tensor.shape[0] // 16
            tensor = tensor.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def installed() -> None:
    """Skips where llama-cpp-python is not."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it takes minutes to compile")


@pytest.mark.usefixtures("installed")
def test_the_peer_does_the_same_work(tiny_engine: Path, tiny_gguf: Path) -> None:
    """Same weights, same prompts, two sequences at once: the greedy tokens must be the same."""
    work = Workload("x", 2, 8, 6)
    runner = ModelRunner.from_dir(tiny_engine)
    ours = runner.generate(work.prompts(256), max_new_tokens=6, end_id=())[:, 0, 8:]
    peer = load_peer(PeerSource("llama.cpp", "float32", str(tiny_gguf)), "cpu")
    timing = peer.time(work)
    assert list(zip(*peer.chosen, strict=True)) == [tuple(row) for row in ours.tolist()]
    assert (timing.decode_tokens, len(timing.gaps)) == (10, 10)
    assert peer.time(Workload("x", 1, 20, 1)).prefill_seconds > 0


@pytest.mark.usefixtures("installed")
def test_bench_beside_llama_cpp(cli: Callable, tiny_engine: Path, tiny_gguf: Path) -> None:
    small = ("--repeats", "1", "--new-tokens", "4", "--prompt-len", "5", "--prefill-len", "9", "--batch", "1,2")
    peer = ("--peer", "llama.cpp", "--checkpoint", tiny_gguf, "--threads", "1")
    found = json.loads(cli("bench", tiny_engine, *small, *peer, "--json").stdout)
    assert found["peer"].startswith("llama.cpp ")
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["peer"]) for row in found["rows"])
    assert found["rows"][1]["peer_cpu_ms_per_token"] > 0
    assert found["memory"]["llama.cpp"]["peak"] > 0


def test_it_is_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, cli: Callable, tiny_engine: Path, tiny_gguf: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    peer = ("--peer", "llama.cpp", "--checkpoint", tiny_gguf, "--no-memory")
    error = cli("bench", tiny_engine, *peer, status=2).stderr
    assert "pip install llama-cpp-python" in " ".join(error.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "reads GGUF files"),  # the Hugging Face directory beside the engine
        (("--device", "cuda"), "runs on the CPU"),
    ],
)
def test_what_it_cannot_run(cli: Callable, tiny_engine: Path, arguments: tuple[str, ...], message: str) -> None:
    error = cli("bench", tiny_engine, "--peer", "llama.cpp", *arguments, status=2).stderr
    assert message in " ".join(error.split())
