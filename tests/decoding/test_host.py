"""Plain-Python processors and criteria behind their adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.decoding.host import HostCriterionAdapter, HostProcessorAdapter, HostRow, MaskBuffer, unpacked
from trtllm_core.errors import BranchError
from trtllm_core.plugin.logits import HostLogitsProcessor, LogitsCapabilities, Phase
from trtllm_core.plugin.stopping import HostStoppingCriterion, Stop


class Log(HostLogitsProcessor):
    """Its state is the list of what it was told; it adds 1 to the logit of each of those tokens."""

    phase = Phase.CONSTRAINT
    after = ("penalties",)
    capabilities = LogitsCapabilities(speculation="rewind")

    def start(self, view):
        return [f"prompt{len(view.prompt)}"]

    def process(self, state, tokens, logits):
        for token in state[1:]:
            logits[token] += 1
        logits[0] = len(tokens)

    def accept(self, state, tokens):
        state.extend(tokens)
        return state

    def take_back(self, state, n):
        return state[: len(state) - n]


class Only(HostLogitsProcessor):
    """Allows the tokens of its state alone; none at all for a prompt of one token."""

    def start(self, view):
        return set(view.prompt)

    def mask(self, state, tokens, words):
        if len(state) == 1:
            words[:] = 0  # must not matter
            return False
        for token in range(len(words) * 32):
            if token not in state:
                words[token // 32] &= ~np.int32(1 << (token % 32)) if token % 32 < 31 else np.int32(2**31 - 1)
        return True

    def accept(self, state, tokens):
        return state | set(tokens)

    def forced(self, state):
        return sorted(state)[:1]


class Third(HostStoppingCriterion):
    """Stops at the third token that it saw."""

    scope = "request"

    def start(self, view):
        return 0

    def check(self, state, tokens, new):
        return Stop("third", 2 - state, matched=len(tokens)) if state + len(new) >= 3 else None

    def accept(self, state, tokens):
        return state + len(tokens)

    def take_back(self, state, n):
        return state - n

    def pending_text(self, state):
        return state


def started(new_floor, adapter, plugin, prompts=([1], [1, 2], [1, 2, 3])):
    floor = new_floor(vocab=70, padded=72)
    adapted = adapter(plugin, lambda slot: floor.histories[slot])
    adapted.setup(floor.context)
    for slot, prompt in enumerate(prompts):
        adapted.begin(slot, floor.view(slot, prompt))
    return floor, adapted


def test_process_form_and_lifecycle(new_floor):
    floor, adapter = started(new_floor, HostProcessorAdapter, Log())
    for slot, new in ((2, [5]), (0, [6, 6]), (1, [])):
        floor.append(slot, new)
    adapter.commit(floor.commit_batch([2, 0, 1], [[5], [6, 6], []]))
    logits = torch.zeros(4, 72)
    adapter.apply(logits, floor.logits_batch([0, 2, 1, 2], active=[True, True, True, False]))
    assert [row.nonzero().flatten().tolist() for row in logits] == [[0, 6], [0, 5], [0], []]
    assert logits[:, 0].tolist() == [3, 4, 2, 0]
    assert logits[0, 6] == 2
    adapter.rewind(0, 1)
    logits = torch.zeros(1, 72)
    adapter.apply(logits, floor.logits_batch([0]))
    assert logits[0, 6] == 1


def test_mask_form(new_floor):
    floor, adapter = started(new_floor, HostProcessorAdapter, Only(), ([1], [1, 31, 63], [2, 32, 71]))
    for prepared in (False, True):
        logits = torch.zeros(5, 72)
        if prepared:
            adapter.prepare([HostRow(2), HostRow(0), None, HostRow(1), HostRow(4)])
        adapter.apply(logits, floor.logits_batch([2, 0, 2, 1, 4], active=[True, True, False, True, True]))
        allowed = [(row == 0).nonzero().flatten().tolist() for row in logits]
        everything = list(range(72))
        assert allowed == [[2, 32, 71], everything, everything, [1, 31, 63], everything]
    assert adapter.forced(1) == [1]
    assert adapter.forced(5) == ()


@pytest.mark.parametrize("plugin", [Log, Only])
def test_verify_positions_see_the_drafts_before_them(new_floor, plugin):
    floor, adapter = started(new_floor, HostProcessorAdapter, plugin())
    draft = np.array([[8, 9]] * 6)
    logits, plain = torch.zeros(3, 72), torch.zeros(3, 72)
    adapter.apply(logits, floor.logits_batch([1] * 3, offsets=[0, 1, 2], draft=draft))
    for offset in range(3):  # as if the drafts were committed, one after the other
        adapter.apply(plain[offset : offset + 1], floor.logits_batch([1]))
        if offset < 2:
            floor.append(1, draft[1, offset : offset + 1].tolist())
            adapter.commit_rows([1], [draft[1, offset : offset + 1].tolist()])
    assert torch.equal(logits, plain)


def test_bits_are_unpacked_alike_on_the_host_and_on_a_device(rng):
    masks = MaskBuffer(70, torch.device("cpu"))
    for n in (3, 1, 5):
        words = masks.cleared(n)
        assert (words.shape, words.dtype, (words == -1).all()) == ((n, 3), np.int32, True)
        words[:] = rng.integers(-(2**31), 2**31, words.shape)
        want = [[not int(row[t // 32]) >> (t % 32) & 1 for t in range(96)] for row in words]
        logits = torch.randn(n + 1, 70)
        due = logits.clone()
        due[:n].masked_fill_(torch.tensor(want)[:, :70], -torch.inf)
        due[n // 2] = logits[n // 2]
        masks.apply(logits, [i for i in range(n) if i != n // 2])
        assert torch.equal(logits, due)
        assert unpacked(torch.from_numpy(~words).view(torch.uint8)).tolist() == want


class Ascending(Only):
    """Allows larger tokens alone, and counts its copies."""

    copies = 0

    def start(self, view):
        return [view.prompt[-1]]

    def mask(self, state, tokens, words):
        words[0] = -1 << (state[-1] + 1)
        words[1:] = 0
        return True

    def accept(self, state, tokens):
        for token in tokens:
            if token <= state[-1]:
                raise BranchError(f"{token} is too small")
            state.append(token)
        return state

    def copy(self, state):
        self.copies += 1
        return list(state)


def test_a_draft_is_followed_on_one_copy_and_to_the_first_token_that_is_refused(new_floor):
    plugin = Ascending()
    floor, adapter = started(new_floor, HostProcessorAdapter, plugin)
    draft = np.array([[8, 9, 9, 12], [4, 5, 6, 7]] * 3)
    logits = torch.zeros(10, 72)
    adapter.apply(logits, floor.logits_batch([0] * 5 + [1] * 5, offsets=[0, 1, 2, 3, 4] * 2, draft=draft))
    allowed = [(row == 0).nonzero().flatten().tolist() for row in logits]
    everything = list(range(72))
    assert allowed[:5] == [list(range(2, 32)), list(range(9, 32)), list(range(10, 32)), everything, everything]
    assert allowed[5:] == [list(range(t + 1, 32)) for t in (2, 4, 5, 6, 7)]
    assert plugin.copies == 2
    assert adapter.take_failed() == {}
    adapter.commit_rows([0, 1], [[1], [9]])
    assert {slot: str(error) for slot, error in adapter.take_failed().items()} == {0: "1 is too small"}
    assert adapter.take_failed() == {}


@pytest.mark.parametrize("cycle", [(1, 0), (1, 2, 0), (0, 0, 0)])
def test_fork_is_simultaneous_and_shares_nothing(new_floor, cycle):
    floor, adapter = started(new_floor, HostProcessorAdapter, Log())
    adapter.commit_rows([0, 1, 2], [[10], [11], [12]])
    n = len(cycle)
    adapter.fork(torch.tensor(cycle), torch.arange(n))
    adapter.commit_rows([0], [[20]])
    logits = torch.zeros(n, 72)
    adapter.apply(logits, floor.logits_batch(range(n)))
    logits[:, 0] = 0
    seen = [row.nonzero().flatten().tolist() for row in logits]
    assert seen == [[10 + src] + [20] * (slot == 0) for slot, src in enumerate(cycle)]


def test_a_slot_that_did_not_ask_is_passed_over(new_floor):
    floor, adapter = started(new_floor, HostProcessorAdapter, Log())
    adapter.end(0)
    adapter.commit_rows([0, 5], [[1], [2]])
    adapter.fork(torch.tensor([5, 1]), torch.tensor([4, 5]))
    logits = torch.zeros(2, 72)
    adapter.apply(logits, floor.logits_batch([0, 4]))
    assert not logits.any()


def test_an_adapter_stands_where_its_plugin_would(new_floor):
    adapter = HostProcessorAdapter(Log(), lambda slot: [])
    assert (adapter.phase, adapter.after, adapter.capabilities.speculation) == ("constraint", ("penalties",), "rewind")
    assert (adapter.masks, adapter.processes) == (False, True)
    assert (HostProcessorAdapter(Only(), lambda slot: []).masks, HostCriterionAdapter(Third(), lambda s: []).scope) == (
        True,
        "request",
    )


def test_criterion(new_floor):
    _, adapter = started(new_floor, HostCriterionAdapter, Third())
    new = [[4], [5, 5, 5, 5], [], [1, 1, 1]]
    for _ in range(2):  # check is pure
        got = adapter.check_rows([0, 1, 2, 5], new)
        assert got == [None, Stop("third", 2, matched=2), None, None]
    adapter.commit_rows([0, 1], [[4, 4], [5]])
    assert [adapter.pending_text(slot) for slot in (0, 1, 2, 5)] == [2, 1, 0, 0]
    adapter.rewind(0, 1)
    adapter.fork(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    assert [adapter.pending_text(slot) for slot in (0, 1, 2)] == [0, 1, 1]
    assert adapter.check_rows([2, 0], [[1, 1], [1, 1]]) == [Stop("third", 1, matched=3), None]


def test_a_plugin_that_cannot_rewind_says_so(new_floor):
    _, adapter = started(new_floor, HostProcessorAdapter, Only())
    with pytest.raises(NotImplementedError, match="Only cannot rewind"):
        adapter.rewind(0, 1)
