"""The adapters, with something in them, pass the kits that every plugin must pass."""

from __future__ import annotations

import torch
from transformers.generation import logits_process as theirs
from transformers.generation import stopping_criteria as criteria

from trtllm_core.compat import (
    TransformersLogitsProcessor,
    TransformersStoppingCriterion,
    VLLMBatchProcessor,
    VLLMRequestProcessor,
)
from trtllm_core.testing import LogitsProcessorConformance, StoppingCriterionConformance


class Repetition(TransformersLogitsProcessor):
    """Known to keep no state: it takes part in speculation."""

    def __init__(self):
        super().__init__([theirs.RepetitionPenaltyLogitsProcessor(3.0), theirs.NoRepeatNGramLogitsProcessor(2)])


class TestTransformersLogitsProcessor(LogitsProcessorConformance):
    plugin = Repetition


class Ends(TransformersStoppingCriterion):
    def __init__(self):
        super().__init__([criteria.EosTokenCriteria([3, 5]), criteria.MaxLengthCriteria(30)])


class TestTransformersStoppingCriterion(StoppingCriterionConformance):
    plugin = Ends


def fewer(prompt, generated, logits):
    out = logits.clone()
    out[[*prompt, *generated][-3:]] -= 5.0
    return out


class Fewer(VLLMRequestProcessor):
    def __init__(self):
        super().__init__(fewer)


class TestVLLMRequestProcessor(LogitsProcessorConformance):
    plugin = Fewer


class Batch:
    """A processor of vLLM V1 that lowers what was generated, and all the prompt's first token."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.requests = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, update):
        if update is None:
            return
        for place in update.removed:
            del self.requests[place]
        for place, params, prompt, generated in update.added:
            self.requests[place] = (params.extra_args["rate"], prompt[:1], generated)
        for source, target, _ in update.moved:
            self.requests[target] = self.requests.pop(source)

    def apply(self, logits):
        for place, (rate, prompt, generated) in self.requests.items():
            logits[place, prompt + generated] -= rate
        return logits


class InBatch(VLLMBatchProcessor):
    def __init__(self):
        super().__init__(Batch(None, torch.device("cpu"), False), {"rate": 4.0})


class TestVLLMBatchProcessor(LogitsProcessorConformance):
    plugin = InBatch
    # vLLM's interface has the tokens in lists.
    test_the_host_never_waits = None
    test_gpu_never_waits = None
