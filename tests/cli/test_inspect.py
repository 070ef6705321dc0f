"""``plugins``, ``explain``, ``plan`` and ``doctor``: what they say without loading weights."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.cli import doctor as doctor_module
from trtllm_core.cli.console import size
from trtllm_core.cli.memory import parse_size
from trtllm_core.errors import ConfigError
from trtllm_core.runner import ModelRunner
from trtllm_core.version import __version__

# -- plugins -------------------------------------------------------------------------------------------------------


def test_plugins(cli: Callable) -> None:
    table = cli("plugins").stdout
    for word in ("plugin", "distribution", "hooks", "status", "why", "trtllm-plugin-llama", "loaded"):
        assert word in table
    reports = json.loads(cli("plugins", "--json").stdout)
    llama = next(report for report in reports if report["plugin"] == "llama")
    assert llama["status"] == "loaded"
    assert llama["hooks"] == ["trtllm_register_model_families"]


@pytest.fixture
def broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin that cannot be imported."""
    real = importlib.metadata.entry_points
    broken = importlib.metadata.EntryPoint("broken", "no.such.module", "trtllm_core")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **query: [*real(**query), broken])


def test_a_broken_plugin_is_shown(cli: Callable, broken_plugin: None) -> None:
    report = json.loads(cli("plugins", "--json").stdout)[-1]
    assert (report["plugin"], report["status"]) == ("broken", "failed")
    assert "no" in report["why"]
    result = cli("doctor", status=2)
    assert "problem  plugin broken" in result.stdout


# -- explain -------------------------------------------------------------------------------------------------------


def test_explain_shows_order_providers_fields_and_hash(cli: Callable, tiny_engine: Path) -> None:
    out = cli("explain", tiny_engine, "--temperature", "0.7", "--stop", "END", "--top-k", "9").stdout
    for text in (
        "llama (trtllm-plugin-llama ",
        "4 sequences of 128 tokens, prompts of 96",
        "paged (trtllm-core ",
        "decode steps are captured graphs",
        "temperature = 0.7",
        "honoured by temperature",
        "order of preset trtllm",
        "bias → temperature → penalty → constraint → truncation",
        "plan hash",
    ):
        assert text in out
    order = [out.index(f" {name} ") for name in ("min_length", "top_k_top_p", "stop_strings", "max_tokens")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "0.7"), "launched ahead; what follows the engine is a captured graph"),
        (("--set", 'decoder="ngram"'), "each waits for the tokens of the one before: decoder 'ngram' is more than"),
        (("--set", "output_log_probs=true"), "log-probabilities are told"),
    ],
)
def test_explain_says_whether_steps_look_ahead(tiny_engine, cli, options, said) -> None:
    assert said in " ".join(cli("explain", tiny_engine, *options).stdout.split())


def test_explain_prints_the_order_of_the_preset(cli: Callable, tiny_engine: Path) -> None:
    options = (
        "--temperature",
        "0.7",
        "--set",
        'preset="hf"',
        "--repetition-penalty",
        "1.2",
        "--top-p",
        "0.8",
        "--json",
    )
    plan = json.loads(cli("explain", tiny_engine, *options).stdout)
    assert (plan["preset"], plan["phases"]) == ("hf", ["bias", "penalty", "constraint", "temperature", "truncation"])
    names = [item["name"] for item in plan["pipeline"]]
    assert names[:5] == ["penalties", "min_length", "temperature", "top_p", "multinomial"]
    assert plan["consumers"]["preset"] == ["core"]


def test_explain_json(cli: Callable, tiny_engine: Path) -> None:
    options = ("--temperature", "0.7", "--set", "top_k=1", "--stop", "END", "--json")
    plan = json.loads(cli("explain", tiny_engine, *options).stdout)
    names = [item["name"] for item in plan["pipeline"]]
    assert names == ["min_length", "greedy", "end_id", "stop_strings", "max_tokens"]
    assert plan["notes"] == ["temperature: left out, it cannot change which logit is largest"]
    assert plan["asked"] == {"temperature": 0.7, "stop_strings": ["END"]}
    assert plan["consumers"]["stop_strings"] == ["stop_strings"]
    greedy = plan["pipeline"][1]
    assert greedy["consumes"] == {"top_k": 1, "top_p": 0.0, "random_seed": None}
    assert greedy["capabilities"].items() >= {"greedy": True, "graph_safe": True, "needs": []}.items()
    assert greedy["source"] == f"trtllm-core {__version__} (decoding)"
    assert len(plan["hash"]) == 64
    host = {item["name"]: item["runs_on"] for item in plan["pipeline"]}
    assert (host["stop_strings"], host["greedy"]) == ("host", "device")
    assert plan["engine"]["dtype"] == "float32"


def test_explain_shows_what_plugins_can_do_and_what_was_left_out(cli: Callable, tiny_engine: Path) -> None:
    out = cli("explain", tiny_engine, "--min-p", "0.2", "--stop", "END").stdout
    row = next(line for line in out.splitlines() if " stop_strings " in line)
    assert "speculation=" in row
    assert " needs" in out  # text
    assert re.search(r"^min_p = 0.2 +honoured by min_p *$", out, re.MULTILINE)
    greedy = cli("explain", tiny_engine, "--set", "min_p=0.2", "--set", "top_k=1").stdout
    assert "honoured by min_p (left out)" in greedy
    assert re.search(r"^note +min_p: left out, it cannot change which logit is largest", greedy, re.MULTILINE)


def test_the_hash_is_of_what_was_asked_and_who_does_it(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    def found(*options: str) -> str:
        return json.loads(cli("explain", tiny_engine, *options, "--json").stdout)["hash"]

    assert found("--top-k", "4") == found("--set", "top_k=4")
    assert len({found(), found("--top-k", "4"), found("--top-k", "5"), found("--top-k", "4", "--stop", "END")}) == 4


def test_explain_knows_searches_and_linear_caches(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e"
    shutil.copytree(tiny_engine, engine)
    build = json.loads((engine / "config.json").read_text())["build"]
    _change(engine, contract="padded_linear", build={**build, "max_beam_width": 3})
    out = cli("explain", engine, "--set", "num_beams=3").stdout
    for text in ("3 beams", "contiguous (trtllm-core ", "blocks of 128 tokens", "has up to 3, returns 3"):
        assert text in out
    assert "beam_search_diversity_rate=0.0" in out.replace("\n", "").replace(" ", "")
    found = json.loads(cli("explain", engine, "--set", "num_beams=3", "--json").stdout)
    assert found["branches"] == {"branches": 1, "max_branches": 3, "max_positions": 1, "returns": 3}


def test_explain_asks_the_backend_what_its_engines_give(
    cli: Callable, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contrastive search needs hidden states; n-gram drafts need several positions."""
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    build = json.loads((engine / "config.json").read_text())["build"]
    _change(engine, build={**build, "max_beam_width": 5})
    search, drafts = ("--decoder", "contrastive_search"), ("--decoder", "ngram", "--json")
    assert "contrastive_search" in cli("explain", engine, *search).stdout
    assert json.loads(cli("explain", engine, *drafts).stdout)["positions"] > 1
    monkeypatch.setattr(TorchBackend, "gives", frozenset())
    refused = cli("explain", engine, *search, status=2)
    assert "needs 'hidden_states', which this session cannot give it" in " ".join(refused.output.split())
    assert "needs 'multi_position'" in " ".join(cli("explain", engine, *drafts, status=2).output.split())


def test_explain_shows_drafts_and_who_takes_their_tokens(cli: Callable, tiny_engine: Path) -> None:
    out = cli("explain", tiny_engine, "--decoder", 'ngram:{"tokens": 4}').stdout
    assert re.search(r"^drafts +up to 5 positions of a branch are verified in a step", out, re.MULTILINE)
    plan = json.loads(cli("explain", tiny_engine, "--decoder", 'ngram:{"tokens": 4}', "--json").stdout)
    assert plan["positions"] == 5
    kinds = {item["name"]: item["kind"] for item in plan["pipeline"]}
    assert (kinds["greedy"], kinds["ngram"]) == ("sampler", "decoder")


def test_explain_has_the_hash_of_the_session(cli: Callable, tiny_engine: Path) -> None:
    from trtllm_core.config import SamplingConfig

    runner = ModelRunner.from_dir(tiny_engine)
    expected = runner.explain(SamplingConfig(top_k=4, min_p=0.1)).digest()
    found = json.loads(cli("explain", tiny_engine, "--top-k", "4", "--min-p", "0.1", "--json").stdout)
    assert found["hash"] == expected


def test_explain_refuses_what_run_refuses(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    assert "max_beam_width 1" in cli("explain", tiny_engine, "--set", "num_beams=3", status=2).stderr
    assert "no kv policy" in cli("explain", tiny_engine, "--kv-policy", "nope", status=2).stderr
    ids_only = tmp_path / "e"
    shutil.copytree(tiny_engine, ids_only)
    (ids_only / "tokenizer.json").unlink()
    assert "needs 'text'" in cli("explain", ids_only, "--stop", "END", status=2).stderr


# -- plan ----------------------------------------------------------------------------------------------------------


def test_plan_is_what_the_engine_then_takes(cli: Callable, tiny_checkpoint: Path, tiny_engine: Path) -> None:
    options = ["--max-batch-size", "4", "--max-seq-len", "128", "--max-input-len", "96", "--tokens-per-block", "16"]
    before = json.loads(cli("plan", tiny_checkpoint, *options, "--memory", "1MiB", "--json").stdout)
    runner = ModelRunner.from_dir(tiny_engine)
    assert before["weights"] == runner.context_mem_size
    assert before["kv_at_limits"] == runner.generation.loop.cache.bytes
    assert before["kv_per_sequence"] == 128 * before["kv_per_token"]
    after = json.loads(cli("plan", tiny_engine, "--json").stdout)
    header = after["weights"] - before["weights"]  # a file's header comes on top
    assert 0 < header < 8192
    assert {**after, "weights": 0, "weights_all_ranks": 0, "total": 0} == {
        **{name: before[name] for name in after},
        "weights": 0,
        "weights_all_ranks": 0,
        "total": 0,
    }
    left = 1024**2 - before["weights"] - before["logits"]
    assert before["sequences_that_fit"] == left // before["kv_per_sequence"]


def test_plan_for_people(cli: Callable, tiny_checkpoint: Path) -> None:
    out = cli("plan", tiny_checkpoint, "--memory", "24GiB", "--dtype", "bfloat16").stdout
    for text in ("weights", "bfloat16", "KV per token  ", "KV at limits", "logits", "in 24.00 GiB"):
        assert text in out
    two = cli("plan", tiny_checkpoint, "--tp-size", "2").stdout
    assert "2 ranks" in two


def test_plan_reads_headers_only(cli: Callable, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm_core.checkpoint.hf import HFCheckpoint

    monkeypatch.setattr(HFCheckpoint, "tensor", lambda self, name: pytest.fail(f"read {name}"))
    cli("plan", tiny_checkpoint)


def test_plan_refusals(cli: Callable, tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    assert "--max-batch-size" in cli("plan", tiny_engine, "--max-batch-size", "2", status=2).stderr
    assert "such as 24GiB" in cli("plan", tiny_checkpoint, "--memory", "lots", status=2).stderr
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    assert "config.json" in cli("plan", tmp_path, status=2).stderr


def test_sizes() -> None:
    assert parse_size("24GiB") == parse_size("24 g") == parse_size("24576MB") == 24 * 1024**3
    assert parse_size("1.5k") == 1536
    assert parse_size("7") == 7
    with pytest.raises(ConfigError, match="-1"):
        parse_size("-1")
    assert [size(n) for n in (5, 1536, 3 * 1024**3)] == ["5 B", "1.50 KiB", "3.00 GiB"]


# -- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_without_an_engine(cli: Callable) -> None:
    out = cli("doctor").stdout
    for word in ("python: ", "torch: ", "cpu: ", "cuda", "memory: ", "plugin llama: ", "backend torch: "):
        assert word in out
    assert "problem " not in out


def test_doctor_on_a_sound_engine(cli: Callable, tiny_engine: Path) -> None:
    out = cli("doctor", tiny_engine).stdout
    for word in ("engine: format 1", "rank0.safetensors: ", "family: llama", "backend: torch", "a chat template"):
        assert word in out
    assert "memory for it: " in out


def _change(engine: Path, **changes: object) -> None:
    path = engine / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"format_version": 99}, 2, "pip install -U trtllm-core"),
        ({"core_version": "99.0"}, 0, "newer than this"),
        ({"core_version": 5}, 2, "core_version"),
        (
            {"family": {"name": "mamba", "distribution": "trtllm-plugin-mamba", "version": "1"}},
            2,
            "pip install trtllm-plugin-mamba",
        ),
        (
            {"backend": {"name": "abacus", "distribution": "trtllm-backend-abacus", "version": "1"}},
            2,
            "pip install trtllm-backend-abacus",
        ),
        ({"family": {"name": "llama", "distribution": "trtllm-plugin-llama", "version": "0.0.1"}}, 0, "0.0.1, "),
    ],
)
def test_doctor_on_what_does_not_fit(
    changes: dict, status: int, message: str, cli: Callable, tiny_engine: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "e"
    shutil.copytree(tiny_engine, engine)
    _change(engine, **changes)
    assert message in cli("doctor", engine, status=status).stdout


def test_doctor_on_damage(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e"
    shutil.copytree(tiny_engine, engine)
    (engine / "tokenizer.json").write_text("{}")
    assert "tokenizer" in cli("doctor", engine, status=2).stdout
    (engine / "tokenizer.json").unlink()
    assert "token ids only" in cli("doctor", engine).stdout
    (engine / "rank0.safetensors").unlink()
    assert "is missing" in cli("doctor", engine, status=2).stdout
    assert "holds no engine" in cli("doctor", tmp_path / "none", status=2).stdout


def test_doctor_on_too_little_memory(cli: Callable, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "memory_available", lambda: 600_000)
    assert "--kv-max-tokens" in cli("doctor", tiny_engine).stdout


# -- keys and values as codes ----------------------------------------------------------------------------------------


def test_codes_of_the_kv_cache_are_told(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    limits = ("--max-seq-len", "128", "--max-input-len", "96", "--dtype", "float32")
    assert "int8 KV cache" in cli("build", tiny_checkpoint, "-o", engine, *limits, "--kv-dtype", "int8").output
    whole, coded = (
        json.loads(cli("plan", tiny_checkpoint, *limits, *kind, "--json").stdout)["kv_per_token"]
        for kind in ((), ("--kv-dtype", "int8"))
    )
    runner = ModelRunner.from_dir(engine)
    size = runner.config.model.head_size
    assert coded * 4 * size == whole * (size + 4)
    assert runner.generation.loop.cache.plan.model.bytes_per_token == coded
    assert re.search(r"kv.dtype\s+int8", cli("explain", engine).stdout)
    assert re.search(r"KV at limits .* int8", cli("inspect", engine).stdout)
    assert "kv_dtype" in cli("build", tiny_checkpoint, "-o", tmp_path / "no", "--kv-dtype", "int3", status=2).output
