"""``run``: where prompts come from, what is printed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SHORT = ("--max-new-tokens", "4")


def records(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_has_everything_of_a_result(cli: Callable, tiny_engine: Path) -> None:
    (record,) = records(cli("run", tiny_engine, "hello", "--json", *SHORT, "--seed", "7"))
    assert list(record) == ["prompt", "sequence", "text", "tokens", "finish_reason", "seed", "matched", "error"]
    assert record["prompt"] == "hello"
    assert len(record["tokens"]) == 4
    assert (record["finish_reason"], record["seed"], record["error"]) == ("length", 7, None)


def test_prompts_from_a_file_and_arguments_in_order(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("two\n\nthree\r\n")
    result = cli("run", tiny_engine, "one", "--file", file, "--json", *SHORT)
    assert [record["prompt"] for record in records(result)] == ["one", "two", "three"]


def test_prompts_from_json_lines(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "id": 1}\n{"prompt": "c"}\n')
    result = cli("run", tiny_engine, "--file", file, "--json", *SHORT)
    assert [record["prompt"] for record in records(result)] == ["a\nb", "c"]
    file.write_text('{"prompt": "a"}\nplain\n')
    assert "line 2" in cli("run", tiny_engine, "--file", file, status=2).stderr


def test_prompts_from_stdin(cli: Callable, tiny_engine: Path) -> None:
    for arguments in ([], ["--file", "-"]):
        result = cli("run", tiny_engine, *arguments, "--json", *SHORT, input="x\ny\n")
        assert [record["prompt"] for record in records(result)] == ["x", "y"]
    assert "there is no prompt" in cli("run", tiny_engine, status=2, input="").stderr
    assert "not UTF-8" in cli("run", tiny_engine, status=2, input=b"\xff\xfe").stderr


def test_more_prompts_than_a_batch_are_the_same_one_by_one(cli: Callable, tiny_engine: Path) -> None:
    prompts = [f"prompt {i}" for i in range(6)]  # the engine takes 4
    options = ("--json", "--batch-invariant", *SHORT)
    together = records(cli("run", tiny_engine, *prompts, *options))
    assert [record["prompt"] for record in together] == prompts
    for prompt, record in zip(prompts, together, strict=True):
        assert records(cli("run", tiny_engine, prompt, *options))[0]["tokens"] == record["tokens"]


def test_text_has_headers_only_for_several(cli: Callable, tiny_engine: Path) -> None:
    alone = cli("run", tiny_engine, "one", *SHORT).stdout
    assert "─" not in alone
    both = cli("run", tiny_engine, "one", "[b]two[/b]", *SHORT).stdout
    assert both.count("─ ") + both.count(" ─") >= 2
    assert "[b]two[/b]" in both
    assert alone.strip() in both


def test_a_stream_is_the_same_text(cli: Callable, tiny_engine: Path) -> None:
    for prompts in (["one"], ["one", "two"]):
        whole = cli("run", tiny_engine, *prompts, *SHORT).stdout
        assert cli("run", tiny_engine, *prompts, *SHORT, "--stream").stdout == whole
    assert "choose one" in cli("run", tiny_engine, "one", "--stream", "--json", status=2).stderr


def test_stats_go_to_stderr(cli: Callable, tiny_engine: Path) -> None:
    result = cli("run", tiny_engine, "one", "two", "--json", "--stats", *SHORT)
    assert len(records(result)) == 2
    for word in ("plan", "greedy", "time to first token", "prefill", "decode  ", "6 tokens in", "tokens/s"):
        assert word in result.stderr


def test_chat_is_on_by_default_and_can_be_turned_off(cli: Callable, tiny_engine: Path) -> None:
    first = ("--json", *SHORT)
    chat = records(cli("run", tiny_engine, "hi", *first))[0]["tokens"]
    assert records(cli("run", tiny_engine, "hi", "--chat", *first))[0]["tokens"] == chat
    raw = records(cli("run", tiny_engine, "hi", "--no-chat", *first))[0]["tokens"]
    spelt = records(cli("run", tiny_engine, "<|user|>hi\n<|assistant|>", "--no-chat", *first))[0]["tokens"]
    assert raw != chat == spelt
    with_system = records(cli("run", tiny_engine, "hi", "--system", "be brief", *first))[0]["tokens"]
    assert with_system != chat
    assert "needs --chat" in cli("run", tiny_engine, "hi", "--no-chat", "--system", "x", status=2).stderr


def test_an_engine_without_a_template_takes_plain_text(
    cli: Callable, make_checkpoint: Callable, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("plain", template=None)
    cli("build", checkpoint, "-o", tmp_path / "e", "--max-seq-len", "64")
    cli("run", tmp_path / "e", "hi", *SHORT)
    assert "no chat template" in cli("run", tmp_path / "e", "hi", "--chat", status=2).stderr
    (tmp_path / "e" / "tokenizer.json").unlink()
    assert "no tokenizer" in cli("run", tmp_path / "e", "hi", status=2).stderr


def test_the_default_length_fits_the_engine(cli: Callable, tiny_engine: Path) -> None:
    (record,) = records(cli("run", tiny_engine, "hi", "--no-chat", "--json", "--set", "end_id=[]"))
    assert len(record["tokens"]) == 128 - 2


def test_sampling_options(cli: Callable, tiny_engine: Path) -> None:
    greedy = records(cli("run", tiny_engine, "hi", "--json", *SHORT))[0]["tokens"]
    sampled = ("--json", *SHORT, "--temperature", "2.5", "--seed", "3")
    first, second = (records(cli("run", tiny_engine, "hi", *sampled))[0]["tokens"] for _ in range(2))
    assert first == second != greedy
    assert records(cli("run", tiny_engine, "hi", "--json", *SHORT, "--temperature", "0"))[0]["tokens"] == greedy
    many = ("--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2")
    cli("run", tiny_engine, "hi", "--json", *SHORT, *many)
    note = cli("run", tiny_engine, "hi", *SHORT, "--temperature", "0.5", "--top-k", "1").stderr
    assert "note: temperature: left out" in note


def test_stop_texts_and_what_matched(cli: Callable, tiny_engine: Path) -> None:
    text = records(cli("run", tiny_engine, "hi", "--json", "--max-new-tokens", "40"))[0]["text"]
    stop = next(c for c in text[1:] if c.isascii() and c.isprintable())
    (record,) = records(cli("run", tiny_engine, "hi", "--json", "--stop", "never ever", "--stop", stop))
    assert (record["finish_reason"], record["matched"]) == ("stop_string", stop)
    assert record["text"] == text[: text.index(stop)]


def test_set_reaches_any_field(cli: Callable, tiny_engine: Path) -> None:
    (record,) = records(
        cli(
            "run",
            tiny_engine,
            "hi",
            "--json",
            "--set",
            "max_new_tokens=3",
            "--set",
            "random_seed=1",
        )
    )
    assert (len(record["tokens"]), record["seed"]) == (3, 1)


def test_plugins_by_name(cli: Callable, tiny_engine: Path) -> None:
    plugins = ("--processor", "min_p", "--criterion", "max_tokens", "--decoder", "top_k_top_p")
    cli("run", tiny_engine, "hi", "--json", *SHORT, *plugins)


def test_loading_options(cli: Callable, tiny_engine: Path) -> None:
    options = ("--device", "cpu", "--kv-policy", "contiguous", "--batch-invariant")
    cli("run", tiny_engine, "hi", *SHORT, *options)
    cli("run", tiny_engine, "hi", *SHORT, "--kv-max-tokens", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nope=1"], "it has no field 'nope' (known: "),
        (["--set", "top_k"], "write it as FIELD=JSON"),
        (["--set", "top_k=many"], "is not JSON"),
        (["--set", "top_k=2", "--top-k", "3"], "top_k is given twice"),
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--set", "num_beams=2"], "searches with 2 branches, but the engine was built for max_beam_width 1"),
        (["--processor", "nope"], "no logits processor is registered as 'nope'"),
        (["--processor", "min_pp"], "did you mean 'min_p'?"),
        (["--processor", "min_p:{"], "is not JSON"),
        (["--processor", "min_p:[1]"], "must be a JSON object"),
        (["--processor", 'min_p:{"x": 1}'], "takes no parameters"),
        (["--criterion", "nope"], "no stopping criterion is registered as 'nope'"),
        (["--decoder", "nope"], "no decoder is registered as 'nope'"),
        (["--kv-policy", "nope"], "no kv policy is registered as 'nope'"),
        (["--kv-max-tokens", "0"], "max_tokens = 0"),
        (["--device", "cuda", "--batch-invariant"], "cuda"),  # refused with a GPU and without
        (["--max-new-tokens", "5000"], "prompt 1 has"),
    ],
)
def test_refusals(arguments: list[str], message: str, cli: Callable, tiny_engine: Path) -> None:
    result = cli("run", tiny_engine, "hi", *arguments, status=2)
    assert message in result.stderr
    assert result.stdout == ""


def test_a_long_prompt_is_refused_before_any_other_runs(cli: Callable, tiny_engine: Path) -> None:
    result = cli("run", tiny_engine, "fine", "x" * 200, status=2)
    assert "prompt 2 has" in result.stderr
    assert "at most 96" in result.stderr
    assert result.stdout == ""


def test_a_truncated_rank_file(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    cli("build", tiny_checkpoint, "-o", tmp_path / "e")
    rank = tmp_path / "e" / "rank0.safetensors"
    rank.write_bytes(rank.read_bytes()[:1000])
    error = cli("run", tmp_path / "e", "hi", status=2).stderr
    assert "1000 bytes" in error
    assert "build the engine again" in error


def test_an_engine_of_several_ranks(cli: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    cli("build", tiny_checkpoint, "-o", tmp_path / "e", "--tp-size", "2")
    assert "has 2 ranks" in cli("run", tmp_path / "e", "hi", status=2).stderr


def test_a_pipe(shell: Callable, tiny_engine: Path) -> None:
    done = shell("run", tiny_engine, "--json", *SHORT, stdin="from a pipe\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "from a pipe"


def test_the_capital_of_france(cli: Callable, smollm2_gguf: Path, tmp_path: Path) -> None:
    engine = tmp_path / "smollm2"
    cli("build", smollm2_gguf, "-o", engine, "--dtype", "float32")
    question = "What is the capital of France?"
    assert "Paris" in cli("run", engine, question, "--max-new-tokens", "16").stdout
