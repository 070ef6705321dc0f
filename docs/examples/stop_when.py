"""Two stopping criteria: one in plain Python for each sequence, one on the device for the whole batch."""

import torch
from pydantic import BaseModel

from trtllm_core.plugin import (
    DeviceStoppingCriterion,
    HostStoppingCriterion,
    Stop,
    StoppingCapabilities,
    StoppingCriterionRegistrar,
    hookimpl,
)

hook_api = "stopping_criterion>=1.0,<2"


class BracesClosed(HostStoppingCriterion):
    """Stops behind the brace that closes the first object, and drops what else its token brought."""

    capabilities = StoppingCapabilities(speculation="rewind", needs=frozenset({"text"}))

    def setup(self, context):
        self.text = context.text

    def start(self, view):
        return [0]  # open braces: at the beginning, and after each token

    def check(self, state, tokens, new):
        depth = state[-1]
        for at, token in enumerate(new):
            data = self.text([token])
            for end, byte in enumerate(data, 1):
                depth += (byte == ord("{")) - (byte == ord("}"))
                if byte == ord("}") and depth == 0:
                    return Stop("braces_closed", at, trim_text=len(data) - end)
        return None

    def accept(self, state, tokens):
        for data in map(self.text, ([token] for token in tokens)):
            state.append(state[-1] + data.count(b"{") - data.count(b"}"))
        return state

    def copy(self, state):
        return list(state)

    def take_back(self, state, n):
        return state[: len(state) - n]


class EnoughOf(DeviceStoppingCriterion):
    """Stops at the ``times``-th generated ``token``. It counts what the slots hold: no rewind misleads it."""

    reason = "enough"
    capabilities = StoppingCapabilities(graph_safe=True)

    class Params(BaseModel, extra="forbid"):
        token: int
        times: int = 1

    def setup(self, context):
        self.asked = context.lengths.new_zeros(context.slots, 2)  # state lives by slot, on the device

    def begin(self, slot, view):
        self.asked[slot, 0], self.asked[slot, 1] = view.params.token, view.params.times

    def check(self, batch):
        context, (token, times) = batch.context, self.asked[batch.slot].T.unsqueeze(2)
        place = torch.arange(context.max_seq_len, device=token.device)
        first, length = context.prompt_lengths[batch.slot, None], context.lengths[batch.slot, None]
        before = (context.tokens[batch.slot] == token) & (place >= first) & (place < length)
        new = (batch.tokens == token) & (place[: batch.tokens.shape[1]] < batch.counts[:, None])
        enough = new & (before.sum(1, keepdim=True) + new.cumsum(1) >= times) & batch.active[:, None]
        return torch.where(enough.any(1), enough.int().argmax(1), -1)

    def fork(self, src, dst):
        self.asked[dst] = self.asked[src]


@hookimpl
def trtllm_register_stopping_criteria(registrar: StoppingCriterionRegistrar) -> None:
    registrar.add("braces_closed", BracesClosed)
    registrar.add("enough_of", EnoughOf)
