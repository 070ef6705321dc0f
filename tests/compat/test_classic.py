"""Callbacks of the classic signature over a whole batch, and executor-era post-processors."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig
from trtllm_core.compat import LogitsPostProcessors, classic_plugins
from trtllm_core.compat.classic import ClassicLogitsProcessor, Rows
from trtllm_core.errors import ConfigError, PluginContractError, PluginRuntimeError
from trtllm_core.plugin import BranchPlan, Candidates, Decoder, Survivors, hookimpl
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6], [11], [42, 17, 3], [5, 6]]
CONFIG = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)


class Ban:
    """Keeps what it knows by row: row i may never use a token twice. Writes down what it was given."""

    def __init__(self):
        self.used = {}
        self.steps = []
        self.seen = []

    def __call__(self, step, input_ids, scores):
        assert input_ids.dtype == torch.int32
        assert scores.dtype == torch.float32
        assert len(input_ids) == len(scores) == len(PROMPTS)
        self.steps.append(step)
        self.seen.append(input_ids)
        out = scores.clone()
        for row, prompt in enumerate(PROMPTS):
            used = input_ids[row, len(prompt) : len(prompt) + step].long()
            out[row, used] = -float("inf")
        return out


def without_repeats(tokens, logits, prompt):
    logits[tokens[len(prompt) :]] = -float("inf")
    return logits


def run(runner, processor=None, criterion=None, config=CONFIG, **options):
    processors, criteria = classic_plugins(processor, criterion, len(PROMPTS), **options)
    return runner.generate(PROMPTS, config, logits_processor=processors, stopping_criteria=criteria)["outputs"]


@pytest.mark.parametrize("kind", ["runner", "cramped"])
def test_a_processor_sees_the_whole_batch_in_its_rows(request, by_hand, kind):
    runner = request.getfixturevalue(kind)
    ban = Ban()
    outputs = run(runner, ban, length=15)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = by_hand(runner, prompt, lambda t, x, prompt=prompt: without_repeats(t, x, prompt))
        assert list(output.tokens) == expected
    assert ban.seen[0].shape == (4, 15)
    if kind == "runner":
        assert ban.steps == list(range(12)), "one call a step"
        for row, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
            end = len(prompt) + 11
            assert ban.seen[-1][row, :end].tolist() == [*prompt, *output.tokens[:11]]
    else:
        assert len(ban.steps) > 12, "rows at different steps come in calls of their own"
        assert set(ban.steps) == set(range(12))


def test_ids_hold_the_end_token_after_the_end_and_finished_rows_stay(runner, by_hand):
    first = by_hand(runner, PROMPTS[0], lambda _, x: x)
    config = CONFIG.replace(end_id=first[2])
    seen = []

    def look(step, input_ids, scores):
        seen.append((input_ids.clone(), scores.clone()))
        return scores

    outputs = run(runner, look, config=config)
    assert outputs[0].finish_reason == "end_id"
    ids, scores = seen[-1]
    assert ids[0, 2:5].tolist() == first[:3]
    assert (ids[0, 5:] == first[2]).all()
    assert torch.equal(scores[0], seen[2][1][0]), "it keeps what it was given last"
    assert not torch.equal(scores[1], seen[2][1][1])


def test_processors_run_before_everything_else(runner):
    seen = []

    def look(step, input_ids, scores):
        seen.append(scores.clone())
        return scores

    config = CONFIG.replace(embedding_bias={3: 9.0}, repetition_penalty=2.0, temperature=0.5, top_k=2, random_seed=1)
    run(runner, look, config=config)
    table = runner.session.engine.table
    assert torch.equal(seen[0], table[[prompt[-1] for prompt in PROMPTS]])


class StopAt:
    """Stops everybody when row 2 is ``length`` long. Writes down the scores."""

    def __init__(self, length):
        self.length = length
        self.calls = []

    def __call__(self, step, input_ids, scores):
        self.calls.append((step, input_ids, scores.clone()))
        return step + 1 == self.length


def test_true_ends_the_whole_batch(runner, by_hand):
    stop = StopAt(4)
    outputs = run(runner, None, stop)
    assert [output.finish_reason for output in outputs] == ["stopping_criteria"] * 4
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.tokens) == by_hand(runner, prompt, lambda _, x: x)[:4]
    assert [step for step, _, _ in stop.calls] == [0, 1, 2, 3]
    _, ids, scores = stop.calls[1]
    assert ids[2, :5].tolist() == [*PROMPTS[2], *outputs[2].tokens[:2]], "the new token is among them"
    assert torch.equal(scores[2], runner.session.engine.table[outputs[2].tokens[0]])


def test_a_criterion_sees_the_scores_as_the_processor_left_them(runner):
    stop = StopAt(3)
    run(runner, lambda step, ids, scores: scores - 100, stop)
    assert torch.equal(stop.calls[0][2], runner.session.engine.table[[p[-1] for p in PROMPTS]] - 100)


def test_who_starts_after_the_end_ends_with_its_first_token(cramped):
    outputs = run(cramped, None, StopAt(1))
    assert [output.finish_reason for output in outputs] == ["stopping_criteria"] * 4
    assert all(len(output.tokens) <= 2 for output in outputs)


def test_what_is_wrong_with_a_callback_ends_the_requests_with_its_name(runner):
    outputs = run(runner, lambda step, ids, scores: None)
    assert all(isinstance(output.error, PluginContractError) for output in outputs)
    assert "returned NoneType" in str(outputs[0].error)
    outputs = run(runner, lambda step, ids, scores: scores[:1])
    assert "returned [1, 97], where scores [4, 97] were given" in str(outputs[0].error)
    outputs = run(runner, None, lambda step, ids, scores: 1 / 0)
    assert all(isinstance(output.error, PluginRuntimeError) for output in outputs)


def test_a_request_that_is_not_of_the_batch_is_refused(runner):
    processors, _ = classic_plugins(lambda step, ids, scores: scores, None, 2)
    with pytest.raises(ConfigError, match="request '2' has no place among 2 rows"):
        runner.generate(PROMPTS, CONFIG, logits_processor=processors)


def test_nothing_to_run_is_nothing():
    assert classic_plugins(None, None, 4) == ([], [])


def test_forks_swap_rows(runner):
    """Beams: rows 0 and 1 become each other, at the same time."""
    rows = Rows(4, width=4, length=8)
    processor = ClassicLogitsProcessor(lambda step, ids, scores: scores, rows)
    processor.setup(runner.generation.loop.branches.slots.context)
    rows.of = {7: 0, 3: 1, 5: 2}
    rows._ends = {7: (2, 4), 3: (2, 5), 5: (2, 6)}
    rows.ids += torch.arange(4, dtype=torch.int32)[:, None]
    rows.scores += torch.arange(4.0)[:, None]
    processor.fork(torch.tensor([7, 3, 3]), torch.tensor([3, 7, 5]))
    assert rows.ids[:, 0].tolist() == [1, 0, 1, 3]
    assert rows.scores[:, 0].tolist() == [1, 0, 1, 3]
    assert rows._ends == {7: (2, 5), 3: (2, 4), 5: (2, 5)}


class Swap(Decoder):
    """A search of two branches that take over from each other in each step, and then go on greedily."""

    def plan(self, view):
        return BranchPlan(branches=1, max_branches=2, returns=2)

    def setup(self, context):
        self.slots = []

    def begin(self, slot, view):
        self.slots.append(slot)

    def select(self, logits, batch):
        rows = batch.active.nonzero()[:, 0]
        top = logits[rows].log_softmax(1).topk(2)
        slot = batch.slot[rows].repeat_interleave(2)
        return Candidates(slot, top.indices.flatten(), top.values.flatten(), top.values.flatten())

    def survive(self, candidates, stops):
        chosen = [0, 1] if len(stops) == 2 else [2, 0]  # the prompt's two likeliest; then each other's likeliest
        pairs = list(zip(self.slots, chosen, strict=True))
        return Survivors(
            [(slot, i, 0.0) for slot, i in pairs if stops[i] is None],
            [(i, 0.0) for _, i in pairs if stops[i] is not None],
        )


class SwapPlugin:
    hook_api = "decoder>=1.0,<2"

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        registrar.add("swap", Swap, consumes=("top_k", "top_p"))


def test_callbacks_follow_the_branches_of_a_search():
    build = BuildConfig(
        max_batch_size=2, max_beam_width=2, max_input_len=63, max_seq_len=64, max_num_tokens=64, tokens_per_block=8
    )
    runner = ModelRunner.from_engine(MarkovExecutable(build=build), plugins=Plugins.load(extra=[SwapPlugin()]))
    seen, checked = [], []

    def look(step, input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    def stop(step, input_ids, scores):
        checked.append(input_ids.clone())
        for row, row_scores in zip(input_ids, scores, strict=True):
            before = row[1 + step].item()  # the token that the row's last one was chosen after
            assert torch.equal(row_scores, runner.session.engine.table[before])
        return step == 4

    processors, criteria = classic_plugins(look, stop, 1, width=2, length=16)
    config = CONFIG.replace(decoder="swap", max_new_tokens=9)
    result = runner.generate([[5, 6]], config, logits_processor=processors, stopping_criteria=criteria)
    outputs = result["outputs"]
    assert [output.finish_reason for output in outputs] == ["stopping_criteria"] * 2
    assert [len(output.tokens) for output in outputs] == [5, 5]
    table = runner.session.engine.table
    ways = [[int(token)] for token in table[6].topk(2).indices]
    for step in range(1, 5):
        assert [row[2 : 2 + step].tolist() for row in seen[step]] == ways, "each row is one branch's history"
        ways = [[*way, int(table[way[-1]].argmax())] for way in reversed(ways)]
    assert sorted(map(list, (output.tokens for output in outputs))) == sorted(ways)
    assert checked[0][0, :3].tolist() == [5, 6, int(table[6].argmax())], "candidates, best first"


def test_several_answers_have_a_row_each(runner):
    processors, _ = classic_plugins(ban := Counter(), None, 1, width=3)
    config = CONFIG.replace(num_return_sequences=3, top_k=0, top_p=1.0, random_seed=5, max_new_tokens=4)
    outputs = runner.generate([[5]], config, logits_processor=processors)["outputs"]
    assert [row[1:4].tolist() for row in ban.ids] == [list(output.tokens[:3]) for output in outputs]
    assert len({output.tokens for output in outputs}) == 3


class Counter:
    """Keeps the last ids that it was given."""

    def __call__(self, step, input_ids, scores):
        self.ids = input_ids
        return scores


def test_post_processors_are_chosen_by_name(runner, by_hand):
    calls = []

    def ban(req_id, logits, token_ids, stream_ptr, client_id):
        calls.append((req_id, token_ids, stream_ptr, client_id))
        assert logits.shape == (1, 1, 97)
        logits[:, :, 40:] = -float("inf")

    plugin = LogitsPostProcessors({"ban": ban}, [None, "ban", None, "ban"])
    outputs = runner.generate(PROMPTS, CONFIG, logits_processor=plugin)["outputs"]
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        expected = by_hand(runner, prompt, lambda _, x, i=i: x[:40] if i % 2 else x)
        assert list(output.tokens) == expected
    assert calls[0] == (1, [[11]], 0, None)
    assert calls[-1][1] == [[5, 6, *outputs[3].tokens[:-1]]]
    with pytest.raises(ConfigError, match=r"no logits processor 'bann' in logits_processor_map \('ban'\)"):
        LogitsPostProcessors({"ban": ban}, ["bann"])
