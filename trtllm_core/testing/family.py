"""The conformance kit of model families: everything that a family promises, held against transformers' logits."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.engine.build import family_of
from trtllm_core.engine.lora import lora_parts
from trtllm_core.errors import CheckpointError
from trtllm_core.parallel import TensorParallel, run_ranks
from trtllm_core.plugin import Plugins
from trtllm_core.prompt_table import VirtualTokens
from trtllm_core.runner import ModelRunner
from trtllm_core.session import Session
from trtllm_core.testing.adapters import AdaptedModel, adapted_logits
from trtllm_core.testing.packed import PackedRows, prefill_and_decode
from trtllm_core.testing.reference import LIMITS, STEPS, ReferenceModel, oracle, virtual_oracle
from trtllm_core.testing.weight_map import check_module_is_filled, check_weights_are_used_once

Logits = list[torch.Tensor]


class ModelFamilyConformance:
    """Subclass it in a test module, name a small transformers config, and run pytest::

        class TestGPT2(ModelFamilyConformance):
            config = transformers.GPT2Config(vocab_size=67, n_embd=64, n_head=4, n_layer=2, n_positions=96)

    Sizes should be small, the vocabulary odd (so that two ranks have to pad it), and the positions at least 96.
    Weights are random. ``float32`` is the largest difference to transformers that is allowed, as a share of the
    largest absolute logit; ``half`` that of bfloat16 and float16 to float32 arithmetic on the same rounded weights,
    where transformers itself comes nearer than two thirds of it.
    """

    config: ClassVar[Any]
    """A transformers config of the architecture."""
    plugins: ClassVar[Sequence[str]] = ()
    """Plugins that are not installed, by module or instance: ``my_package.plugin``, ``my_package.plugin:mine``."""
    deny: ClassVar[Sequence[str]] = ()
    """Installed plugins that would claim the same architecture."""
    limits: ClassVar[BuildConfig] = LIMITS
    float32: ClassVar[float] = 1e-4
    half: ClassVar[float] = 2e-2
    dtypes: ClassVar[Sequence[str]] = ("bfloat16", "float16")
    tensor_parallel: ClassVar[bool] = True
    """Whether the config's heads can be shared out over two ranks."""

    @pytest.fixture(scope="class")
    @classmethod
    def installed(cls) -> Plugins:
        """Where the family is looked up."""
        return load_plugins(cls.plugins, cls.deny)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, tmp_path_factory: pytest.TempPathFactory, installed: Plugins) -> ReferenceModel:
        """The random model, as transformers has it."""
        return ReferenceModel(cls.config, tmp_path_factory.mktemp("family"), installed, limits=cls.limits)

    @pytest.fixture(scope="class")
    @classmethod
    def calm(cls, tmp_path_factory: pytest.TempPathFactory, installed: Plugins) -> ReferenceModel:
        """The same with smaller weights, which do not magnify the rounding of half precision."""
        return ReferenceModel(cls.config, tmp_path_factory.mktemp("family"), installed, 0.8, cls.limits)

    def test_weight_map(self, reference: ReferenceModel, installed: Plugins) -> None:
        """Every tensor of the checkpoint is used once, element by element, and every parameter filled once."""
        checkpoint = open_checkpoint(reference.path)
        family, _ = family_of(checkpoint, installed)
        config = family.config(checkpoint)
        check_weights_are_used_once(family, config, checkpoint)
        for size in (1, 2) if self.tensor_parallel else (1,):
            for rank in range(size):
                check_module_is_filled(family, config, checkpoint, TensorParallel(rank, size))

    def test_an_unknown_tensor_is_refused(self, reference: ReferenceModel, installed: Plugins) -> None:
        """A tensor that the family does not know is an error: ``unused`` must not say yes to everything."""
        checkpoint = open_checkpoint(reference.path)
        family, _ = family_of(checkpoint, installed)
        with pytest.raises(CheckpointError, match="surprise"):
            check_weights_are_used_once(family, family.config(checkpoint), checkpoint, extra=("surprise.weight",))

    def test_prefill(self, reference: ReferenceModel) -> None:
        """A prompt at a time, alone in its batch."""
        session = reference.session()
        ours = [PackedRows(session, 1, shuffle=None).run({0: ids})[0] for ids in reference.prompts]
        self.check(reference, ours)

    def test_ragged_batch(self, reference: ReferenceModel) -> None:
        """Prompts of several lengths in one call, their blocks anywhere in the pool."""
        rows = PackedRows(reference.session(), len(reference.prompts), shuffle=1)
        self.check(reference, list(rows.run(dict(enumerate(reference.prompts))).values()))

    def test_chunked_prefill(self, reference: ReferenceModel) -> None:
        """Rows that run one, a few or many tokens after any past, in one call."""
        rows = PackedRows(reference.session(), len(reference.prompts), shuffle=5)
        parts: list[Logits] = [[] for _ in reference.prompts]
        sizes = ((7, 1, 3), (1, 1, 6), (16, 5, 1), (1, 9, 2))
        for turn in range(200):
            chunks = {
                row: ids[(at := int(rows.lengths[row])) : at + sizes[row % 4][turn % 3]]
                for row, ids in enumerate(reference.prompts)
                if (row + turn) % 4 and rows.lengths[row] < len(ids)  # each row sits out every fourth call
            }
            for row, logits in rows.run(chunks).items() if chunks else ():
                parts[row].append(logits)
        self.check(reference, [torch.cat(part) for part in parts])

    def test_decode(self, reference: ReferenceModel) -> None:
        """Prefill, then 32 steps of a ragged batch."""
        self.check(reference, prefill_and_decode(reference.session(), reference.prompts, STEPS, shuffle=3))

    def test_greedy_tokens(self, reference: ReferenceModel) -> None:
        """The generation loop chooses the tokens that transformers' logits would."""
        with ModelRunner.from_engine(reference.session(), plugins=reference.plugins) as runner:
            prompts = [ids[: len(ids) - STEPS] for ids in reference.prompts]
            sampling = SamplingConfig(max_new_tokens=16, end_id=(), return_dict=True)
            outputs = runner.generate(prompts, sampling)["outputs"]
        assert [list(output.tokens) for output in outputs] == [greedy(reference.model, ids, 16) for ids in prompts]

    def test_rewind(self, reference: ReferenceModel) -> None:
        """Drafts that are taken back are overwritten and leave no trace."""
        vocabulary = reference.model.config.vocab_size
        ids = reference.prompts[2]
        wrong = [(token + 1) % vocabulary for token in ids]
        rows = PackedRows(reference.session(), 1)
        parts = [rows.run({0: ids[:20]})[0]]
        for at in range(20, 44, 4):
            parts.append(rows.run({0: ids[at : at + 4] + wrong[at + 4 : at + 9]})[0][:4])
            rows.lengths[0] -= 5
        self.check(reference, [torch.cat(parts)], [reference.expected[2][:44]])

    def test_fork(self, reference: ReferenceModel) -> None:
        """Two rows that share a prefix, in whole blocks and in a copied one, go on by themselves."""
        first, second = reference.prompts[2], reference.prompts[3]
        split = self.limits.tokens_per_block + 3
        branch = [*first[:split], *second[: 2 * split]]
        rows = PackedRows(reference.session(), 2)
        start = rows.run({0: first[:split]})[0]
        rows.fork(0, 1)
        later = rows.run({1: branch[split:], 0: first[split:]})
        with torch.inference_mode():
            expected = reference.model(torch.tensor([branch]), use_cache=False).logits[0].float()
        self.check(
            reference,
            [torch.cat((start, later[0])), torch.cat((start, later[1]))],
            [reference.expected[2], expected],
        )

    def test_tensor_parallel(self, reference: ReferenceModel) -> None:
        """Two processes answer as transformers does, and both the same."""
        if not self.tensor_parallel:
            pytest.skip("this config's heads cannot be shared out over two ranks")
        prompts = [ids[: len(ids) - STEPS + 4] for ids in reference.prompts]
        engine = reference.engine(tp_size=2)
        given = (engine, prompts, tuple(self.plugins), tuple(self.deny))
        ranks = run_ranks(parallel_logits, 2, *given, timeout=120, backend="gloo")
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True)), "the ranks' logits differ"
        expected = [full[: len(ids)] for full, ids in zip(reference.expected, prompts, strict=True)]
        self.check(reference, ranks[0], expected)

    def test_adapters(self, reference: ReferenceModel, tmp_path: Path) -> None:
        """LoRA adapters on every linear layer answer as peft's do, mixed in one batch. Skipped without peft."""
        pytest.importorskip("peft")
        session = Session.from_directory(reference.engine(max_lora_rank=4), plugins=reference.plugins)
        family = family_of(open_checkpoint(reference.path), reference.plugins)[0]
        parts = lora_parts(family, session.config.model, session.config.lora_layers)
        layers = sorted({part.module.split(".", 1)[-1] for part in parts})
        assert layers, "the family's module has no linear layers that adapters could change"
        model, choices = AdaptedModel(reference.model, tmp_path), [0, 1, -1, 0]
        paths = [model.add("0", layers, lora_alpha=4), model.add("1", layers[::2], rank=3)]
        prompts = [ids[: len(ids) - STEPS + 4] for ids in reference.prompts]
        ours = adapted_logits(session, reference.plugins, paths, choices, prompts, 4)
        pairs = zip(choices, prompts, strict=True)
        self.check(reference, ours, [model.logits(str(one) if one >= 0 else None, ids) for one, ids in pairs])

    def test_prompt_tables(self, reference: ReferenceModel) -> None:
        """Embeddings in place of tokens, of another table for each row, answer as transformers' ``inputs_embeds``."""
        engine = reference.engine(max_prompt_embedding_table_size=8)
        session = Session.from_directory(engine, plugins=reference.plugins)
        config = session.config.model
        tables = torch.randn(2, 4, config.hidden_size)
        rows = PackedRows(session, 3, shuffle=1)
        rows.tables = {row: VirtualTokens(tables[row], config.vocab_size) for row in (0, 1)}
        virtual, rest = [config.vocab_size + i for i in range(4)], reference.prompts[2]
        prompts = [[*virtual, *rest[:6]], [rest[0], *virtual[::-1], rest[1], virtual[2]], rest[:9]]
        first = rows.run({row: ids[:3] for row, ids in enumerate(prompts)})  # cut where virtual tokens stand
        later = rows.run({row: ids[3:] for row, ids in enumerate(prompts)})
        expected = [virtual_oracle(reference.model, ids, tables[row % 2]) for row, ids in enumerate(prompts)]
        self.check(reference, [torch.cat((first[row], later[row])) for row in range(3)], expected)

    def test_dtypes(self, calm: ReferenceModel) -> None:
        """Half precision, against float32 arithmetic on the same rounded weights."""
        for dtype in self.dtypes:
            ours = prefill_and_decode(calm.session(dtype), calm.prompts, STEPS)
            exact = calm.rounded(dtype)
            off, theirs = calm.off(ours, exact), calm.off(oracle(calm.half(dtype), calm.prompts), exact)
            allowed = max(self.half, 1.5 * theirs)
            assert 0 < off < allowed, f"{dtype}: off by {off:.2e} of the largest logit, transformers by {theirs:.2e}"

    def check(self, reference: ReferenceModel, ours: Logits, theirs: Logits | None = None) -> None:
        """Raise ``AssertionError`` where logits are too far from transformers'."""
        off = reference.off(ours, theirs)
        assert off < self.float32, f"logits are off by {off:.2e} of the largest one; {self.float32:.0e} is allowed"


def load_plugins(extra: Sequence[str], deny: Sequence[str]) -> Plugins:
    """The installed plugins but those in ``deny``, and those named in ``extra``."""
    return Plugins.load(extra=[pkgutil.resolve_name(name) for name in extra], deny=deny)


def parallel_logits(
    parallel: TensorParallel,
    engine: Path,
    prompts: Sequence[Sequence[int]],
    modules: Sequence[str],
    deny: Sequence[str],
) -> Logits:
    """For ``run_ranks``: what one rank answers."""
    plugins = load_plugins(modules, deny)
    session = Session.from_directory(engine, parallel.rank, plugins=plugins, parallel=parallel)
    return prefill_and_decode(session, prompts, 4)


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` tokens that follow ``prompt`` when transformers' largest logit is taken, by whole passes."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
