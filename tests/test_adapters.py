"""LoRA and prompt tables through the whole runtime: mixed in one batch, against transformers and peft."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trtllm_core import KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.parallel import run_ranks
from trtllm_core.testing.adapters import AdaptedModel, adapted_rank_tokens
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.reference import LIMITS, ReferenceModel, distance

pytest.importorskip("peft")

VOCAB, HIDDEN = 67, 32
CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=96, bos_token_id=0, eos_token_id=0
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4),
}
TARGETS = {
    "llama": (["q_proj", "v_proj"], ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (["c_attn"], ["c_proj", "c_fc"]),
    "bloom": (["query_key_value"], ["dense", "dense_h_to_4h", "dense_4h_to_h"]),
}
LIMITED = LIMITS.replace(max_lora_rank=8, max_loras=3, max_prompt_embedding_table_size=12)
V = VOCAB
"""The first virtual id."""
PROMPTS = [[5, 9, 13], [V, V + 1, V + 2, V + 3, 5], [1, V + 2, 3, 60], [30] * 20, [V + 1] * 9, [7]]
UIDS = ["0", None, "1", "1", "0", "-1"]
TASKS = [0, 1, 2, 0, 0, 0]
GREEDY = SamplingConfig(end_id=(), max_new_tokens=12, return_dict=True)


class Case:
    """A random model with two adapters and a prompt table. A ``calm`` one does not magnify rounding."""

    def __init__(self, kind: str, directory: Path, plugins: Plugins, calm: bool = False) -> None:
        gain, self.strength = (0.8, 2) if calm else (1.5, 8)
        self.reference = ReferenceModel(CONFIGS[kind], directory, plugins, gain, LIMITED)
        self.kind, self.directory, self.plugins = kind, directory, plugins
        self.adapted, self.paths = self.adapt(self.reference.model, "as it is")
        table = torch.randn(3, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
        self.table = table.bfloat16().float()

    def adapt(self, model: Any, name: str) -> tuple[AdaptedModel, list[Path]]:
        """The same random adapters for any form of the model."""
        torch.manual_seed(4)
        adapted, (attention, rest) = AdaptedModel(model, self.directory / name), TARGETS[self.kind]
        return adapted, [
            adapted.add("0", attention, lora_alpha=self.strength),
            adapted.add("1", rest, rank=8, lora_alpha=self.strength),
        ]

    def runner(self, dtype: str | None = None, **options: Any) -> ModelRunner:
        engine = self.reference.engine(dtype)
        return ModelRunner.from_dir(engine, plugins=self.plugins, lora_dir=self.paths, **options)

    def expected(self, i: int, count: int = 12) -> list[int]:
        uid = UIDS[i] if UIDS[i] != "-1" else None
        return self.adapted.greedy(uid, PROMPTS[i], count, self.table[TASKS[i]])


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(kind: str) -> Case:
        if kind not in made:
            made[kind] = Case(kind, tmp_path_factory.mktemp(kind), plugins)
        return made[kind]

    return make


def tokens(result: Any) -> list[list[int]]:
    return [list(output.tokens) for output in result["outputs"]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_of_it_in_one_batch(kind: str, case: Any) -> None:
    """Two adapters, three tasks and plain requests: every one gets the tokens that peft gives it alone."""
    one = case(kind)
    with one.runner() as runner:
        assert runner.lora_uids == ("0", "1")
        result = runner.generate(PROMPTS, GREEDY, prompt_table=one.table, prompt_tasks=TASKS, lora_uids=UIDS)
        assert tokens(result) == [one.expected(i) for i in range(len(PROMPTS))]
        plain = runner.generate([PROMPTS[3]], GREEDY)
        assert tokens(plain)[0] == one.adapted.greedy(None, PROMPTS[3], 12)
    without = one.adapted.logits(None, PROMPTS[0])
    for uid in ("0", "1"):
        assert distance([one.adapted.logits(uid, PROMPTS[0])], [without]) > 0.05, "an adapter must show"


def check_logits(one: Case, adapted: AdaptedModel, dtype: str | None, tolerance: float) -> None:
    """Every logit of prompts and of generated tokens, one batch for all, against peft on one sequence at a time."""
    gather = {"gather_context_logits": True, "gather_generation_logits": True}
    engine = one.reference.engine(dtype, max_num_tokens=16, **gather)
    with ModelRunner.from_dir(engine, plugins=one.plugins, lora_dir=one.paths) as runner:
        result = runner.generate(PROMPTS, GREEDY, prompt_table=one.table, prompt_tasks=TASKS, lora_uids=UIDS)
    ours, theirs = [], []
    for i, output in enumerate(result["outputs"]):
        ours.append(torch.cat((output.context_logits, output.generation_logits[1:])))
        text = [*output.prompt, *output.tokens[:-1]]
        theirs.append(adapted.logits(UIDS[i] if UIDS[i] != "-1" else None, text, one.table[TASKS[i]]))
    assert distance(ours, theirs) < tolerance


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_in_float32(kind: str, case: Any) -> None:
    one = case(kind)
    check_logits(one, one.adapted, None, 1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_in_half_precision(kind: str, tmp_path: Path, plugins: Plugins) -> None:
    """Against float32 arithmetic on the weights that were rounded."""
    one = Case(kind, tmp_path, plugins, calm=True)
    rounded, _ = one.adapt(copy.deepcopy(one.reference.model).bfloat16().float(), "rounded")
    check_logits(one, rounded, "bfloat16", 2e-2)


def test_chunks_waiting_and_streams(case: Any) -> None:
    """Prompts cut to a few tokens a step, more requests than slots, and deltas instead of a result."""
    one = case("llama")
    engine = one.reference.engine(max_num_tokens=3, max_batch_size=2)
    with ModelRunner.from_dir(engine, plugins=one.plugins, lora_dir=one.paths) as runner:
        got: dict[int, list[int]] = {}
        for start in range(0, 6, 2):
            part = slice(start, start + 2)
            options = {"prompt_table": one.table, "prompt_tasks": TASKS[part], "lora_uids": UIDS[part]}
            for delta in runner.generate(PROMPTS[part], GREEDY, streaming=True, **options):
                got.setdefault(start + int(delta.request_id), []).extend(delta.tokens)
    assert [got[i] for i in range(6)] == [one.expected(i) for i in range(6)]


def test_two_ranks(case: Any) -> None:
    one = case("llama")
    options = {"prompt_table": one.table, "prompt_tasks": TASKS, "lora_uids": UIDS}
    given = (one.reference.engine(tp_size=2), one.paths, PROMPTS, GREEDY, options)
    first, second = run_ranks(adapted_rank_tokens, 2, *given, timeout=120, backend="gloo")
    assert first == second == [tuple(one.expected(i)) for i in range(len(PROMPTS))]


def test_prefixes_are_shared_by_what_they_depend_on(case: Any) -> None:
    """The same tokens under another adapter or table are another prefix; under the same ones they are reused."""
    one = case("llama")
    prompt = [V, V + 1, V + 2, V + 3, *range(20)]
    with one.runner(kv_cache=KVCacheConfig(policy="prefix")) as runner:

        def ask(uid: str | None, table: torch.Tensor, task: int) -> int:
            result = runner.generate([prompt], GREEDY, prompt_table=table, prompt_tasks=[task], lora_uids=[uid])
            assert tokens(result)[0] == one.adapted.greedy(uid, prompt, 12, table[task])
            return result["outputs"][0].cached_prompt_tokens

        asked = [(None, 0), ("0", 0), ("1", 0), (None, 1), ("0", 1)]
        assert [ask(uid, one.table, task) for uid, task in asked] == [0, 0, 0, 0, 0]
        assert all(ask(uid, one.table.clone(), task) >= 8 for uid, task in asked)
        assert ask("0", one.table.flip(0), 1) >= 8, "of the table, only the request's own task matters"
        assert ask("0", one.table + 1, 1) == 0
        runner.drop_lora("0")
        runner.add_lora("0", one.paths[1])
        result = runner.generate([prompt], GREEDY, prompt_table=one.table, lora_uids=["0"])
        assert result["outputs"][0].cached_prompt_tokens == 0, "another adapter under the same uid"
        assert tokens(result)[0] == one.adapted.greedy("1", prompt, 12, one.table[0])


def test_several_answers_share_the_conditions(case: Any) -> None:
    one = case("llama")
    engine = one.reference.engine(max_beam_width=3)
    draws = GREEDY.replace(top_k=0, top_p=1.0, temperature=1e-4, random_seed=3, num_return_sequences=3)
    with ModelRunner.from_dir(engine, plugins=one.plugins, lora_dir=one.paths) as runner:
        result = runner.generate(PROMPTS[:3], draws, prompt_table=one.table, prompt_tasks=TASKS[:3], lora_uids=UIDS[:3])
    # So cold that the draws are greedy.
    assert tokens(result) == [one.expected(i) for i in range(3) for _ in range(3)]


def test_adapters_come_and_go_between_and_during_batches(case: Any) -> None:
    one = case("llama")
    with one.runner() as runner:
        stream = runner.generate([PROMPTS[0]], GREEDY, streaming=True, lora_uids=["0"])
        got = [*next(stream).tokens]
        runner.add_lora("late", one.paths[1])
        with pytest.raises(CapacityError, match="max_loras 3"):
            runner.add_lora("more", one.paths[1])
        with pytest.raises(ConfigError, match="'0' is used by 1 requests that have not ended"):
            runner.drop_lora("0")
        runner.drop_lora("1")
        got += [token for delta in stream for token in delta.tokens]
        assert got == one.expected(0)
        result = runner.generate([PROMPTS[3]], GREEDY, lora_uids=["late"])
        assert tokens(result)[0] == one.adapted.greedy("1", PROMPTS[3], 12)
        runner.drop_lora("0")
        assert runner.lora_uids == ("late",)
        with pytest.raises(ConfigError, match=r"no adapter '0' \(loaded: 'late'\)"):
            runner.generate([PROMPTS[0]], GREEDY, lora_uids=["0"])
        left = runner.generate([PROMPTS[0]], GREEDY, streaming=True, lora_uids=["late"])
        next(left)
        left.close()
        runner.drop_lora("late")


def test_virtual_ids_and_penalties(case: Any) -> None:
    """Virtual ids of the prompt are no tokens: no penalty, ban or n-gram is about them, and none trips over them."""
    one = case("llama")
    prompt, rows = [V + 3, V, V + 3, V, 5, 6, 5], one.table[0]
    config = GREEDY.replace(repetition_penalty=1.5, frequency_penalty=0.3, no_repeat_ngram_size=2, max_new_tokens=8)
    text, expected = list(prompt), []
    for _ in range(8):
        scores = one.adapted.logits(None, text, rows)[-1]
        counts = torch.bincount(torch.tensor([token for token in text if token < V]), minlength=V)
        seen = torch.where(scores < 0, scores * 1.5, scores / 1.5) - 0.3 * counts
        scores = torch.where(counts > 0, seen, scores)
        for a, b in pairwise(text):
            if a == text[-1] and b < V:
                scores[b] = -torch.inf
        text.append(int(scores.argmax()))
        expected.append(text[-1])
    with one.runner() as runner:
        assert tokens(runner.generate([prompt], config, prompt_table=one.table))[0] == expected


def test_classic_session_and_files(case: Any, tmp_path: Path) -> None:
    one = case("llama")
    np.save(tmp_path / "table.npy", one.table.numpy())
    with one.runner() as runner:
        assert (runner.use_lora_plugin, runner.max_prompt_embedding_table_size) == (True, 12)
        by_file = runner.generate(PROMPTS[1:3], GREEDY, prompt_table=str(tmp_path / "table.npy"), prompt_tasks="1,2")
        assert tokens(by_file)[0] == one.expected(1)
        by_request = runner.generate(PROMPTS[1:3], GREEDY, prompt_table=[one.table[1:2], one.table[2:]])
        assert tokens(by_request) == tokens(by_file)
        session = runner.generation
        session.setup(1, 5, 12)
        ids = session.decode(
            torch.tensor(PROMPTS[1]),
            torch.tensor([5]),
            SamplingConfig(end_id=(), max_new_tokens=12),
            prompt_embedding_table=one.table.flatten(0, 1),
            tasks=torch.tensor([1]),
            prompt_vocab_size=torch.tensor([4]),
            lora_uids=["-1"],
        )
        assert ids[0, 0].tolist() == PROMPTS[1] + one.expected(1)
        with pytest.raises(ConfigError, match="12 rows, not a multiple of prompt_vocab_size 5"):
            session.decode(
                torch.tensor(PROMPTS[1]),
                torch.tensor([5]),
                GREEDY,
                prompt_embedding_table=one.table.flatten(0, 1),
                prompt_vocab_size=5,
            )


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([[1]], {"lora_uids": ["7"]}, ConfigError, r"no adapter '7' \(loaded: '0', '1'\)"),
        ([[1]], {"lora_uids": ["0", "1"]}, ConfigError, "1 prompts need a list with one uid for each"),
        ([[1]], {"lora_uids": "0"}, ConfigError, "need a list"),
        ([[V]], {}, ConfigError, "prompt 0 has token id 67, outside the vocabulary of 67"),
        ([[V, -1]], {"prompt_table": torch.zeros(1, 4, HIDDEN)}, ConfigError, "prompt 0 has token id -1"),
        ([[1], [V + 4]], {"prompt_table": torch.zeros(1, 4, HIDDEN)}, ConfigError, "prompt 1 has virtual token id 71"),
        ([[V]], {"prompt_table": [None]}, ConfigError, "outside the vocabulary"),
        ([[V]], {"prompt_table": torch.zeros(4, 4, HIDDEN)}, CapacityError, "16 rows"),
        ([[V]], {"prompt_table": torch.zeros(1, 4, 31)}, ConfigError, r"\[1, 4, 31\]"),
        ([[V]], {"prompt_tasks": "0"}, ConfigError, "there is no prompt_table"),
    ],
)
def test_refusals(prompts: Any, options: Any, error: Any, words: str, case: Any) -> None:
    with case("llama").runner() as runner, pytest.raises(error, match=words):
        runner.generate(prompts, GREEDY, **options)


def test_engines_that_take_neither(plugins: Plugins, case: Any) -> None:
    with ModelRunner.from_engine(MarkovExecutable(), plugins=plugins) as runner:
        assert (runner.use_lora_plugin, runner.max_prompt_embedding_table_size) == (False, 0)
        with pytest.raises(ConfigError, match="not built for prompt tables"):
            runner.generate([[1]], GREEDY, prompt_table=torch.zeros(1, 4, 8))
        with pytest.raises(ConfigError, match="not built for LoRA adapters"):
            runner.add_lora("0", case("llama").paths[0])
        with pytest.raises(ConfigError, match="lora_ckpt_source is 'nemo'"):
            ModelRunner.from_engine(MarkovExecutable(), plugins=plugins, lora_ckpt_source="nemo")


def test_checkpoints_without_the_prefix(case: Any, tmp_path: Path) -> None:
    """GPT-2 as it was published calls its layers ``h.0…``, and adapters of it ``transformer.h.0…``."""
    one = case("gpt2")
    shutil.copytree(one.reference.path, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    build_engine(tmp_path / "hf", tmp_path / "engine", LIMITED, plugins=one.plugins)
    with ModelRunner.from_dir(tmp_path / "engine", plugins=one.plugins, lora_dir=one.paths) as runner:
        result = runner.generate(PROMPTS[:1], GREEDY, lora_uids=["0"])
    assert tokens(result)[0] == one.expected(0)


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_preempted_requests_keep_their_conditions(policy: str, case: Any) -> None:
    """What gives its cache back computes its prompt anew, with its own adapter and table."""
    one = case("llama")
    cache = KVCacheConfig(policy=policy, max_tokens=88, options={"admission": "optimistic"})
    with one.runner(kv_cache=cache) as runner:
        result = runner.generate(PROMPTS, GREEDY, prompt_table=one.table, prompt_tasks=TASKS, lora_uids=UIDS)
    assert tokens(result) == [one.expected(i) for i in range(len(PROMPTS))]
    assert sum(output.preemptions for output in result["outputs"]) > 0


def test_drafts_under_conditions(case: Any) -> None:
    """Lookup in the prompt finds virtual ids too, which are never drafted; what is accepted is what would be chosen."""
    one = case("llama")
    with one.runner() as runner:
        config = GREEDY.replace(decoder="ngram")
        result = runner.generate(PROMPTS, config, prompt_table=one.table, prompt_tasks=TASKS, lora_uids=UIDS)
    assert tokens(result) == [one.expected(i) for i in range(len(PROMPTS))]
