"""Every file of ``docs/examples`` runs and does what the pages that quote it say."""

from __future__ import annotations

import ast
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchView, CachedBlock, CommitBatch, Stop
from trtllm_core.testing import run_kit
from trtllm_core.testing.checkpoints import write_llama, write_lora
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import byte_tokenizer

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SAMPLED = SamplingConfig(top_k=0, top_p=1.0, random_seed=7, max_new_tokens=100, end_id=(), return_dict=True)


def test_every_example_is_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    untested = [path.name for path in EXAMPLES.glob("*.py") if f"def test_{path.stem}" not in tests]
    assert untested == []


@pytest.fixture
def top_a(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin's module, imported as its users import it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "top_a", raising=False)
    return __import__("top_a")


@pytest.fixture
def runner(top_a: ModuleType) -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load(extra=[top_a]))


def unlikely(runner: ModelRunner, prompt: list[int], tokens: tuple[int, ...], a: float) -> list[int]:
    """Tokens that top-a would have dropped, straight from its definition: p < a · p_max²."""
    chances = runner.session.engine.table.softmax(dim=-1)
    before = [prompt[-1], *tokens[:-1]]
    return [t for last, t in zip(before, tokens, strict=True) if chances[last, t] < a * chances[last].max() ** 2]


def test_top_a_drops_what_its_definition_drops_and_touches_nobody_else(runner: ModelRunner) -> None:
    alone = runner.generate([[5]], SAMPLED)["outputs"][0]
    assert unlikely(runner, [5], alone.tokens, 0.5), "or the test would show nothing"
    cut = SAMPLED.replace(logits_processors=use("top_a", a=0.5))
    free, with_top_a = runner.generate([[5], [5]], [SAMPLED, cut])["outputs"]
    assert with_top_a.finish_reason == "length"
    assert with_top_a.tokens != free.tokens
    assert unlikely(runner, [5], with_top_a.tokens, 0.5) == []
    assert free.tokens == alone.tokens, "the request beside it did not ask for the plugin"


def test_top_a_keeps_the_rest(runner: ModelRunner, top_a: ModuleType) -> None:
    """What it leaves is what it was: compared on logits, one row that asked and one that did not."""
    from trtllm_core.plugin import BranchView, LogitsBatch

    context = runner.generation.loop.branches.slots.context
    plugin = top_a.TopA()
    plugin.setup(context)
    plugin.begin(3, BranchView("0", 0, 3, (1,), SAMPLED, (), 7, top_a.TopA.Params(a=0.3)))
    logits = runner.session.engine.table[:2].clone()
    slot = torch.tensor([3, 0])
    plugin.apply(logits, LogitsBatch(context, slot, torch.zeros_like(slot), torch.tensor([True, False])))
    raw = runner.session.engine.table[:2]
    chances = raw[0].softmax(0)
    kept = chances >= 0.3 * chances.max() ** 2
    assert 1 <= int(kept.sum()) < len(kept)
    assert torch.equal(logits[0], raw[0].where(kept, torch.tensor(-math.inf)))
    assert torch.equal(logits[1], raw[1])


def test_top_a_is_left_out_of_a_greedy_request_and_refuses_wrong_parameters(runner: ModelRunner) -> None:
    plan = runner.explain(SamplingConfig(logits_processors="top_a"))
    assert any(note.startswith("top_a: left out") for note in plan.notes)
    for wrong in ({"a": 2.0}, {"b": 1.0}):
        with pytest.raises(ConfigError, match="'top_a'"):
            runner.explain(SAMPLED.replace(logits_processors=use("top_a", **wrong)))


def run(name: str, directory: Path, *options: str) -> str:
    """Run an example as a user does, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *options, str(EXAMPLES / name)],
        cwd=directory,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_try_top_a(tmp_path: Path) -> None:
    free, cut, names = run("try_top_a.py", tmp_path).splitlines()
    assert free.startswith("length (")
    assert cut.startswith("length (")
    assert free != cut
    assert names == "['min_length', 'top_a', 'top_k_top_p', 'max_tokens']"


def test_trace_prints_what_the_lifecycle_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "trace.py"))
    printed = capsys.readouterr().out
    page = (EXAMPLES.parent / "lifecycle.md").read_text(encoding="utf-8")
    assert f"```text\n{printed}```" in page


def test_try_stops(tmp_path: Path) -> None:
    printed = run("try_stops.py", tmp_path)
    assert f"```text\n{printed}```" in (EXAMPLES.parent / "stopping.md").read_text(encoding="utf-8")


def test_in_flight(tmp_path: Path) -> None:
    printed = run("in_flight.py", tmp_path)
    assert f"```text\n{printed}```" in (EXAMPLES.parent / "executor.md").read_text(encoding="utf-8")


def test_stop_when_follows_rewinds_and_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both criteria say of a text what a plain count says, after any way to it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    stop_when = __import__("stop_when")
    tokenizer = byte_tokenizer(["{}", "}{", "}}"])
    runner = ModelRunner.from_engine(MarkovExecutable(tokenizer.vocab_size), tokenizer=tokenizer)
    context = runner.generation.loop.branches.slots.context
    host, device = stop_when.BracesClosed(), stop_when.EnoughOf()
    view = BranchView("0", 0, 2, (1,), SAMPLED, (), 7, stop_when.EnoughOf.Params(token=65, times=2))
    for plugin in (host, device):
        plugin.setup(context)
    device.begin(2, view)
    brace, close, both, other = ord("{"), ord("}"), 257, 259

    state = host.accept(host.start(view), [brace, brace, close])
    copied = host.copy(state)
    assert host.check(state, [], [65, both, other]) == Stop("braces_closed", 2, trim_text=1)
    state = host.take_back(state, 1)
    assert host.check(state, [], [close]) is None
    assert host.check(copied, [], [close]) == Stop("braces_closed", 0)

    context.lengths[2], context.prompt_lengths[2] = 3, 1
    context.tokens[2, :3] = torch.tensor([65, 66, 65])  # the first is the prompt's
    device.fork(torch.tensor([2]), torch.tensor([4]))
    for tensor in (context.lengths, context.prompt_lengths, context.tokens):
        tensor[4] = tensor[2]
    context.lengths[2] -= 1  # a rewind
    tokens = torch.tensor([[66, 65, 65], [65, 65, 65], [65, 65, 65]])
    active = torch.tensor([True, True, False])
    batch = CommitBatch(context, torch.tensor([2, 4, 4]), tokens, torch.tensor([3, 1, 3]), active)
    assert device.check(batch).tolist() == [2, 0, -1]


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_quickstart(tmp_path: Path, smollm2_gguf: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2_gguf.resolve())
    printed = run("quickstart.py", tmp_path)
    first, rest = printed.split("['length']\n")
    assert "Paris" in first
    assert rest.strip(), "the stream printed text"


def test_once_first(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "once_first.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["0 of 22 prompt tokens were in the cache", "20 of 23 prompt tokens were in the cache"]
    key = module["OnceFirst"]().key
    once, found = CachedBlock(1, 0, last_used=9), CachedBlock(1, 0, last_used=3, uses=1)
    assert key(once) < key(found)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``engine``, as the scripts of the migration page want it."""
    directory = tmp_path_factory.mktemp("migration")
    checkpoint = write_llama(directory / "checkpoint", vocab_size=256)
    build_engine(str(checkpoint), directory / "engine", BuildConfig(max_batch_size=2, max_seq_len=64))
    return directory


def test_new_script(engine: Path) -> None:
    answers = [
        [int(token) for token in line.strip("[]").split(", ")] for line in run("new_script.py", engine).splitlines()
    ]
    assert [len(answer) for answer in answers] == [8, 8]
    assert all(len(set(answer)) == 8 for answer in answers), "no token of an answer comes twice"


def test_old_script_does_what_the_moved_one_does(engine: Path) -> None:
    assert run("old_script.py", engine, "-m", "trtllm_core.compat") == run("new_script.py", engine)


def test_other_processors(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "other_processors.py"))
    lines = capsys.readouterr().out.splitlines()
    for line, length in zip(lines, (8, 7), strict=True):
        reason, matched, tokens = line.split(" ", 2)
        assert (reason, matched) == ("stopping_criteria", "MaxLengthCriteria")
        found = [int(token) for token in tokens.strip("()").split(", ")]
        assert len(found) == len(set(found)) == length
        assert all(token % 2 == 0 for token in found)


def test_many_ways() -> None:
    """Requests of two presets and three dialects in one batch, as ``docs/sampling.md`` shows them."""
    made = runpy.run_path(str(EXAMPLES / "many_ways.py"))
    outputs, configs = made["result"]["outputs"], made["configs"]
    assert [len(one.tokens) for one in outputs] == [3, 4, 5, 6]
    assert [config.preset for config in configs] == ["hf", "hf", "trtllm", "trtllm"]
    assert [made["runner"].explain(config).decoder.name for config in configs] == [
        "multinomial",
        "multinomial",
        "top_k_top_p",
        "mirostat",
    ]
    assert [len(beside) for beside in outputs[0].top_log_probs] == [2, 2, 2]


def test_adapters(tmp_path: Path) -> None:
    """The page quotes the file, and the file runs: three kinds of requests in one batch, each with its own answer."""
    page = (EXAMPLES.parent / "adapters.md").read_text(encoding="utf-8")
    assert f"```python\n{(EXAMPLES / 'adapters.py').read_text(encoding='utf-8')}```" in page
    build = BuildConfig(max_seq_len=64, max_lora_rank=4, max_prompt_embedding_table_size=8)
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", build)
    layers = {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in (0, 1)}
    adapters = [write_lora(tmp_path / name, layers, seed=seed) for seed, name in enumerate(("en", "fr"))]
    command = [sys.executable, EXAMPLES / "adapters.py", tmp_path / "engine", *adapters]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 4


def test_test_top_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test file that the authors' page shows, as pytest would run it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    kit = runpy.run_path(str(EXAMPLES / "test_top_a.py"))["TestTopA"]
    results = run_kit(kit)
    assert [result for result in results if result.status == "failed"] == []
    assert sum(result.status == "passed" for result in results) > 15


def test_decoder_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It finds what a session of an engine with the same table finds."""
    module = runpy.run_path(str(EXAMPLES / "decoder_alone.py"))
    build = BuildConfig(max_batch_size=2, max_beam_width=3, max_seq_len=10, max_input_len=9, max_num_tokens=32)
    runner = ModelRunner.from_engine(MarkovExecutable(50, table=module["table"], build=build))
    configs = [module[name].replace(return_dict=True) for name in ("beams", "drawn")]
    found = runner.generate([[7, 8], [9]], configs)["outputs"]
    due = [f"{one.request_id} {one.finish_reason} {list(one.tokens)}" for one in found]
    assert capsys.readouterr().out.splitlines() == due
    assert len(due) == 5


def test_drafts_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each row the drafts that are told stand, and one token more, which is another where drafts are left."""
    module = runpy.run_path(str(EXAMPLES / "drafts_of_your_own.py"))
    rows = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    for row, drafts, count in zip(rows, module["drafts"].tolist(), (3, 1), strict=True):
        accepted = len(row) - 1
        assert row[:accepted] == drafts[:accepted]
        assert accepted <= count
        assert accepted == count or row[accepted] != drafts[accepted]
    assert len(rows) == 2


def test_gpt_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    """So does the classic front."""
    module = runpy.run_path(str(EXAMPLES / "gpt_decoder.py"))
    assert len(capsys.readouterr().out.splitlines()) == 2
    build = BuildConfig(max_batch_size=2, max_beam_width=3, max_seq_len=10, max_input_len=9, max_num_tokens=32)
    runner = ModelRunner.from_engine(MarkovExecutable(50, table=module["table"], build=build))
    config = SamplingConfig(end_id=0, num_beams=3, repetition_penalty=1.3, return_dict=True)
    outputs = runner.generate([[7, 8], [9]], [config.replace(max_new_tokens=8), config.replace(max_new_tokens=9)])
    for one in outputs["outputs"]:
        row = module["output"].ids[int(one.request_id), one.sequence].tolist()
        assert row[: len(one.prompt) + len(one.tokens)] == [*one.prompt, *one.tokens]
