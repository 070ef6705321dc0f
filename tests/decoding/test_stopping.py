"""What criteria are given and what becomes of their answers: scopes, logits, failures of one branch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core import ModelRunner, SamplingConfig
from trtllm_core.decoding.stopping import _Ends
from trtllm_core.errors import BranchError
from trtllm_core.plugin import (
    DeviceStoppingCriterion,
    HostLogitsProcessor,
    HostStoppingCriterion,
    Stop,
    StoppingCapabilities,
)
from trtllm_core.testing.markov import MarkovExecutable

CONFIG = SamplingConfig(end_id=(), max_new_tokens=6, return_dict=True)


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable())


# -- which stop counts -----------------------------------------------------------------------------------------------

stops = st.tuples(
    st.integers(0, 3), st.sampled_from(["length", "end_id", "other"]), st.sampled_from(["row", "request"])
)


@given(st.lists(stops, max_size=5))
@settings(max_examples=200, deadline=None)
def test_the_earliest_stop_counts_and_what_comes_after_it_never_happened(said):
    ends = _Ends()
    for at, reason, scope in said:
        ends.add(Stop(reason, at), scope)
    if not said:
        assert (ends.stop, ends.of_request) == (None, False)
        return
    first = min(at for at, *_ in said)
    together = [(reason, scope) for at, reason, scope in said if at == first]
    others = [reason for reason, _ in together if reason != "length"]
    assert ends.stop == Stop(others[0] if others else "length", first)
    assert ends.of_request == any(scope == "request" for _, scope in together)


class StopsSecond(HostStoppingCriterion):
    """Ends its request at the second token."""

    scope = "request"

    def start(self, view):
        return 0

    def check(self, state, tokens, new):
        return Stop("second", 1 - state) if state + len(new) >= 2 else None

    def accept(self, state, tokens):
        return state + len(tokens)


def test_a_criterion_of_request_scope_ends_a_request(runner):
    told = []
    conclude = runner.generation.loop.branches.rules.conclude
    runner.generation.loop.branches.rules.conclude = lambda *args: told.append(conclude(*args)) or told[-1]
    result = runner.generate([[5], [6]], CONFIG, stopping_criteria=StopsSecond())
    assert result["finish_reasons"] == ["second", "second"]
    assert [verdict.ends_request for verdict in told] == [[False, False], [True, True]]


# -- logits ----------------------------------------------------------------------------------------------------------


class Watches(DeviceStoppingCriterion):
    """Keeps what it is shown; never stops."""

    reason = "never"
    capabilities = StoppingCapabilities(needs=frozenset({"logits"}))

    def __init__(self):
        self.seen = []

    def check(self, batch):
        self.seen.append(("check", batch.logits.clone(), batch.source.tolist(), batch.tokens.tolist()))
        return torch.full_like(batch.slot, -1)

    def commit(self, batch):
        self.seen.append(("commit", batch.logits.clone(), batch.source.tolist(), batch.tokens.tolist()))


class Blind(Watches):
    capabilities = StoppingCapabilities()

    def check(self, batch):
        self.seen.append((batch.logits, batch.source))
        return torch.full_like(batch.slot, -1)

    def commit(self, batch):
        self.seen.append((batch.logits, batch.source))


def test_a_device_criterion_is_given_the_logits_that_it_asks_for(runner):
    watches, blind = Watches(), Blind()
    config = CONFIG.replace(max_new_tokens=2, top_k=0, top_p=0.9, random_seed=1, temperature=0.5)
    ids = runner.generate([[5], [6]], config, stopping_criteria=[watches, blind])["output_ids"][:, 0]
    assert blind.seen == [(None, None)] * 4
    assert [kind for kind, *_ in watches.seen] == ["check", "commit"] * 2
    table = runner.session.engine.table
    last = [5, 6]
    for step in range(2):
        _, logits, source, tokens = watches.seen[2 * step]
        assert source == [[0], [1]]
        # Processed, and not what a sampler left of them.
        torch.testing.assert_close(logits, table[last] / (0.5 + 1e-6))
        assert torch.equal(logits, watches.seen[2 * step + 1][1])
        last = [row[0] for row in tokens]
        assert last == ids[:, 1 + step].tolist()


def test_a_greedy_request_whose_criterion_looks_at_logits_keeps_its_processors(runner):
    watches = Watches()
    runner.generate([[5]], CONFIG.replace(temperature=0.5, max_new_tokens=1), stopping_criteria=watches)
    torch.testing.assert_close(watches.seen[0][1], runner.session.engine.table[5:6] / (0.5 + 1e-6))


def test_logits_are_copied_for_nobody(runner, monkeypatch):
    """Without a criterion that looks, the sampler gets the pipeline's own tensor."""
    loop = runner.generation.loop
    given = []
    select = loop.branches.choosers.select
    monkeypatch.setattr(loop.branches.choosers, "select", lambda logits, *a: given.append(logits) or select(logits, *a))
    runner.generate([[5]], CONFIG.replace(max_new_tokens=1))
    assert given[0].data_ptr() == loop.branches.pipeline._work.data_ptr()
    runner.generate([[5]], CONFIG.replace(max_new_tokens=1), stopping_criteria=Watches())
    assert given[1].data_ptr() != loop.branches.pipeline._work.data_ptr()


def test_what_matched_is_in_the_result(runner):
    table = runner.session.engine.table
    tokens = [int(table[5].argmax())]
    for _ in range(3):
        tokens.append(int(table[tokens[-1]].argmax()))
    wishes = [{"stop_words_list": [tokens[1:3]]}, {"end_id": [0, tokens[2]]}, {}]
    outputs = runner.generate([[5]] * 3, [CONFIG.replace(**wish) for wish in wishes])["outputs"]
    assert [output.matched for output in outputs] == [tuple(tokens[1:3]), tokens[2], None]


# -- failures of one branch ------------------------------------------------------------------------------------------


class Refuses(HostLogitsProcessor):
    """Refuses one branch, by its prompt, in the method that it is told."""

    def __init__(self, method):
        self.method = method

    def start(self, view):
        return view.prompt[0]

    def _maybe(self, state, method):
        if state == 6 and method == self.method:
            raise BranchError("not six")

    def mask(self, state, tokens, words):
        self._maybe(state, "mask")
        return False

    def process(self, state, tokens, logits):
        self._maybe(state, "process")

    def accept(self, state, tokens):
        self._maybe(state, "accept")
        return state


class RefusesToStop(HostStoppingCriterion):
    def start(self, view):
        return view.prompt[0]

    def check(self, state, tokens, new):
        if state == 6:
            raise BranchError("not six")


@pytest.mark.parametrize(
    "objects",
    [{"logits_processor": Refuses(method)} for method in ("mask", "process", "accept")]
    + [{"stopping_criteria": RefusesToStop()}],
)
def test_a_host_plugin_can_fail_one_branch_alone(runner, objects):
    plain = runner.generate([[5], [6], [7]], CONFIG)["output_ids"][:, 0]
    result = runner.generate([[5], [6], [7]], CONFIG, **objects)
    assert result["finish_reasons"] == ["length", "plugin_error", "length"]
    error = result["outputs"][1].error
    assert isinstance(error, BranchError)
    assert "plugin 'Refuses" in str(error)
    assert str(error).endswith(": not six")
    assert torch.equal(result["output_ids"][::2, 0], plain[::2])
