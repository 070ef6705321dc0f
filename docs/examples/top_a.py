"""Top-A sampling: drops tokens less likely than a · p_max², many where the model is sure, few where it is not."""

import math

from pydantic import BaseModel, Field

from trtllm_core.plugin import DeviceLogitsProcessor, LogitsCapabilities, LogitsProcessorRegistrar, Phase, hookimpl

hook_api = "logits_processor>=1.0,<2"


class TopA(DeviceLogitsProcessor):
    phase = Phase.TRUNCATION
    capabilities = LogitsCapabilities(argmax_invariant=True)

    class Params(BaseModel, extra="forbid"):
        a: float = Field(default=0.2, gt=0, le=1)

    def setup(self, context):
        self.log_a = context.lengths.new_zeros(context.slots).float()  # state lives by slot, on the device

    def begin(self, slot, view):
        self.log_a[slot] = math.log(view.params.a)

    def apply(self, logits, batch):
        least = 2 * logits.amax(1) - logits.logsumexp(1) + self.log_a[batch.slot]
        logits.masked_fill_((logits < least[:, None]) & batch.active[:, None], -math.inf)


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    registrar.add("top_a", TopA)
