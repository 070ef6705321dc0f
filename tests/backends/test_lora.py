"""LoRA on the torch backend, against peft."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.backends.torch import lora
from trtllm_core.backends.torch.lora import group_rows
from trtllm_core.errors import BackendError, ConfigError
from trtllm_core.lora import LoraManager
from trtllm_core.parallel import run_ranks
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.adapters import AdaptedModel, adapted_logits, adapted_rank_logits
from trtllm_core.testing.packed import PackedRows
from trtllm_core.testing.reference import LIMITS, ReferenceModel, distance

pytest.importorskip("peft")

SIZES = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "phi3": transformers.Phi3Config(**SIZES, pad_token_id=0),  # fused in the checkpoint
}
ATTENTION = {"llama": ["q_proj", "v_proj"], "phi3": ["qkv_proj"]}
REST = {"llama": ["k_proj", "o_proj", "up_proj", "down_proj"], "phi3": ["o_proj", "gate_up_proj"]}
CHOICES = [0, -1, 1, 2]
"""Of the four prompts."""


class Case:
    """A random model, three adapters, and what peft makes of them."""

    def __init__(self, kind: str, directory: Path, plugins: Plugins, gain: float = 1.5) -> None:
        self.reference = ReferenceModel(
            CONFIGS[kind], directory, plugins, gain, LIMITS.replace(max_loras=3, max_lora_rank=8)
        )
        self.plugins = plugins
        self.kind, self.directory = kind, directory
        self.strength = 1.0 if gain > 1 else 0.25  # strong adapters, as large weights, magnify each rounding
        self.adapted = AdaptedModel(self.reference.model, directory)
        self.paths = self.save(self.adapted)
        self.prompts = [ids[: len(ids) - 24] for ids in self.reference.prompts]

    def save(self, adapted: AdaptedModel) -> list[Path]:
        torch.manual_seed(4)
        everything = [*ATTENTION[self.kind], *REST[self.kind]]
        strength = self.strength
        pattern = {"v_proj": 2, r"layers\.1\.self_attn\.qkv_proj": 3}
        patterns = {"rank_pattern": pattern, "alpha_pattern": {"q_proj": 3 * strength}}
        return [
            adapted.add("0", ATTENTION[self.kind], 4, lora_alpha=8 * strength, **patterns),
            adapted.add("1", REST[self.kind], 8, lora_alpha=8 * strength, use_rslora=True),
            adapted.add("2", everything, 1, lora_alpha=2 * strength),
        ]

    def expected(self, adapted: AdaptedModel | None = None) -> list[torch.Tensor]:
        pairs = zip(CHOICES, self.prompts, strict=True)
        return [(adapted or self.adapted).logits(str(one) if one >= 0 else None, ids) for one, ids in pairs]

    def session(self, dtype: str | None = None, **options: Any) -> Session:
        return self.reference.session(dtype, **options)

    def ours(self, session: Session, choices: list[int] = CHOICES) -> list[torch.Tensor]:
        return adapted_logits(session, self.plugins, self.paths, choices, self.prompts, 8)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def make(kind: str, gain: float = 1.5) -> Case:
        key = f"{kind} {gain}"
        if key not in made:
            made[key] = Case(kind, tmp_path_factory.mktemp(kind), plugins, gain)
        return made[key]

    return make


@pytest.mark.parametrize("together", [0, 64])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mixed_batch_answers_as_peft(kind: str, together: int, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one product for all adapters, and with one for each."""
    monkeypatch.setattr(lora, "TOGETHER_UP_TO", together)
    one = case(kind)
    ours, expected = one.ours(one.session()), one.expected()
    assert distance(ours, expected) < 1e-4
    plain = [one.adapted.logits(None, ids) for ids in one.prompts]
    for choice, with_it, without in zip(CHOICES, expected, plain, strict=True):
        assert (distance([with_it], [without]) > 0.05) == (choice >= 0), "an adapter must show"


@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision(kind: str, case: Any) -> None:
    one = case(kind, gain=0.8)
    rounded = copy.deepcopy(one.reference.model).bfloat16().float()
    exact = AdaptedModel(rounded, one.directory / "rounded")
    one.save(exact)  # the same random factors, which are rounded too when they are loaded
    half = AdaptedModel(copy.deepcopy(one.reference.model).bfloat16(), one.directory / "half")
    one.save(half)
    expected = one.expected(exact)
    off = distance(one.ours(one.session("bfloat16")), expected)
    assert 0 < off < 2e-2
    assert off < 1.5 * distance(one.expected(half), expected)
    assert distance([one.adapted.logits(None, one.prompts[0])], expected[:1]) > 5e-2, "an adapter must show"


def test_two_ranks(case: Any) -> None:
    cases = [case(kind) for kind in CONFIGS]
    engines = [(one.reference.engine(tp_size=2), one.paths) for one in cases]
    ranks = run_ranks(adapted_rank_logits, 2, engines, CHOICES, cases[0].prompts, 4, timeout=120, backend="gloo")
    for one, first, second in zip(cases, *ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert distance(first, one.expected()) < 1e-4


def test_rows_without_an_adapter_keep_their_bits(case: Any) -> None:
    one = case("llama")
    session = one.session()
    plain, mixed = one.ours(session, [-1, -1, -1, -1]), one.ours(one.session(), CHOICES)
    assert torch.equal(plain[1], mixed[1])
    bare = Session.from_directory(one.reference.engine(max_lora_rank=0, max_loras=4), plugins=one.plugins)
    rows = PackedRows(bare, 4)
    assert torch.equal(rows.run({1: one.prompts[1]})[1][:1], PackedRows(session, 4).run({1: one.prompts[1]})[1][:1])


def test_nobody_pays_who_asks_for_nothing(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters loaded, a call whose rows have none makes no product with them; nor does a layer without any."""
    one = case("llama")
    session = one.session()
    manager = LoraManager(session, one.plugins)
    manager.add("0", one.paths[0])  # queries and values
    bank, asked = session.engine._lora, []  # type: ignore[attr-defined]
    monkeypatch.setattr(bank, "product", lambda x, w, b: asked.append(1) or torch.nn.functional.linear(x, w, b))
    rows = PackedRows(session, 2)
    rows.run({0: one.prompts[0], 1: one.prompts[1]})
    assert not asked
    rows.lora_ids[0] = 0
    rows.run({0: [1], 1: [2]})
    assert len(asked) == 2 * (1 + 3), "in each of two layers: down once, up once for each part of the fused product"


def test_adapters_come_and_go(case: Any) -> None:
    one = case("llama")
    session = one.session()
    manager = LoraManager(session, one.plugins)
    ids = one.prompts[2]

    def logits(index: int) -> torch.Tensor:
        rows = PackedRows(session, 1)
        rows.lora_ids[0] = index
        return rows.run({0: ids})[0]

    plain = logits(-1)
    for name in ("2", "0", "1", "0"):  # in one place, one after another: nothing of the one before stays
        assert manager.add("mine", one.paths[int(name)]).index == 0
        assert distance([logits(0)], [one.adapted.logits(name, ids)]) < 1e-4
        manager.drop("mine")
        assert torch.equal(logits(0), plain), "an empty place adds nothing"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=20), st.sampled_from([0, 4, 64]))
def test_groups_hold_every_row_once(adapters: list[int], together: int) -> None:
    groups = group_rows(np.array(adapters), torch.device("cpu"), together)
    seen: list[int] = []
    for group in groups:
        rows = list(range(len(adapters))) if group.rows is None else group.rows.tolist()
        seen += rows
        for at, row in enumerate(rows):
            own = [group.first] if group.others is None else [
                group.first + i for i, other in enumerate(group.others[at].flatten().tolist()) if not other
            ]  # fmt: skip
            assert own == [adapters[row]]
    assert sorted(seen) == [row for row, adapter in enumerate(adapters) if adapter >= 0]
    count = sum(adapter >= 0 for adapter in adapters)
    assert len(groups) <= 1 if count <= together else len(groups) == len(set(adapters) - {-1})


def test_batch_invariance(case: Any) -> None:
    """With adapters too: the same bits in any company, however the prompt is cut."""
    one = case("llama")
    session = one.session(batch_invariant=True)
    manager = LoraManager(session, one.plugins)
    for i, path in enumerate(one.paths):
        manager.add(str(i), path)
    prompts, choices = [one.prompts[i % 4] for i in range(8)], [0, -1, 1, 2, 2, 1, 0, -1]
    alone = []
    for ids, choice in zip(prompts, choices, strict=True):
        rows = PackedRows(session, 1)
        rows.lora_ids[0] = choice
        alone.append(rows.run({0: ids})[0])
    for seed in range(2):
        rows = PackedRows(session, 8, shuffle=seed)
        rows.lora_ids[:] = choices
        order = random.Random(seed).sample(range(8), 8)
        cut = {row: 1 + (row + seed) % 3 for row in order}
        first = rows.run({row: prompts[row][: cut[row]] for row in order})
        rest = rows.run({row: prompts[row][cut[row] :] for row in order if prompts[row][cut[row] :]})
        for row in order:
            ours = torch.cat((first[row], rest[row])) if row in rest else first[row]
            assert torch.equal(ours, alone[row])


def test_refusals(case: Any, load: Callable[..., Session]) -> None:
    session = case("llama").session()
    with pytest.raises(ConfigError, match="no place 3 for an adapter: the engine was built for 3"):
        session.engine.put_adapter(3, {})
    with pytest.raises(BackendError, match="was not built for LoRA adapters: build it with max_lora_rank"):
        load().engine.put_adapter(0, {})
