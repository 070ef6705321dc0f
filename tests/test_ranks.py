"""Two ranks run companions beside their branches, and find what one finds; and they draw alike without a seed."""

from __future__ import annotations

from pathlib import Path

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, build_engine, use
from trtllm_core.parallel import TensorParallel, run_ranks
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(max_batch_size=4, max_beam_width=4, max_input_len=40, max_seq_len=64, tokens_per_block=8)
PROMPTS = [[5, 6, 7, 1, 2], [4], [9, 8, 7]]
ASK = SamplingConfig(max_new_tokens=10, end_id=(), return_dict=True)
GUIDED = ASK.replace(logits_processors=use("cfg", scale=2.0, negative_prompt_ids=(9, 3, 1)))
CASES = {
    "greedy": [GUIDED, ASK, GUIDED],
    "drawn": [GUIDED.replace(top_k=0, top_p=1.0, random_seed=n) for n in range(3)],
    "beams": [GUIDED.replace(num_beams=2, random_seed=1), ASK, GUIDED.replace(num_beams=2, random_seed=2)],
    "contrastive": [GUIDED.replace(decoder=use("contrastive_search", top_k=3)), ASK, GUIDED],
}


def tokens(runner: ModelRunner) -> dict[str, list[tuple[int, ...]]]:
    return {name: [one.tokens for one in runner.generate(PROMPTS, asked)["outputs"]] for name, asked in CASES.items()}


DRAWN = {
    "by the sampler": ASK.replace(top_k=0, top_p=1.0, temperature=1.5),
    "by a processor": ASK.replace(logits_processors=use("xtc", threshold=0.01, probability=0.5)),
    "by a decoder": ASK.replace(top_k=0, top_p=1.0, decoder=use("best_of", n=2)),
}


def drawn(parallel: TensorParallel, engine: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The seed that one rank used, and what it drew."""
    runner = ModelRunner.from_dir(engine, parallel.rank, parallel=parallel)
    outputs = {name: runner.generate([[5, 6]], asked)["outputs"][0] for name, asked in DRAWN.items()}
    return {name: (one.seed, one.tokens) for name, one in outputs.items()}


def guided(parallel: TensorParallel, engine: Path) -> dict[str, list[tuple[int, ...]]]:
    """What one rank answers."""
    return tokens(ModelRunner.from_dir(engine, parallel.rank, parallel=parallel))


def test_two_ranks_are_guided_like_one(tmp_path: Path) -> None:
    checkpoint = write_llama(tmp_path / "hf")
    for size in (1, 2):
        build_engine(checkpoint, tmp_path / f"engine{size}", LIMITS.replace(tp_size=size))
    runner = ModelRunner.from_dir(tmp_path / "engine1")
    alone = tokens(runner)
    plain = [one.tokens for one in runner.generate(PROMPTS, ASK)["outputs"]]
    assert alone["greedy"][0] != plain[0], "or it would show little"
    assert run_ranks(guided, 2, tmp_path / "engine2", timeout=120, backend="gloo") == [alone] * 2


def test_without_a_seed_two_ranks_draw_alike(tmp_path: Path) -> None:
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", LIMITS.replace(tp_size=2))
    first, second = run_ranks(drawn, 2, tmp_path / "engine", timeout=120, backend="gloo")
    assert first == second
    again = run_ranks(drawn, 2, tmp_path / "engine", timeout=120, backend="gloo")
    assert again[0] != first, "each time another seed"
