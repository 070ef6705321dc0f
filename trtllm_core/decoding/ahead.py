"""What of a plan lets a step be launched before the one before it has landed, and what does not."""

from __future__ import annotations

from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Request
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion, Sampler


def needs_host(plan: Plan, request: Request | None = None) -> str | None:
    """Why a step's next tokens cannot be chosen, or committed, before the host has seen the last ones; None: they can.

    Args:
        plan: of a request.
        request: what it asks for beside its plan; None: nothing.
    """
    if at_host := [item.name for item in plan.processors if isinstance(item.plugin, HostLogitsProcessor)]:
        return f"processor {at_host[0]!r} runs on the host"
    if plan.sampler is not None or not isinstance(plan.decoder.plugin, Sampler):
        return f"decoder {plan.decoder.name!r} is more than a sampler"
    if plan.positions > 1:
        return "drafts are verified"
    if plan.companions:
        return "companions run beside it"
    if plan.log_probs:
        return "log-probabilities are told"
    if request is not None and (request.scores_prompt or request.generation_logits):
        return "logits are told"
    return None if request is None or request.virtual is None else "its prompt has virtual tokens"


def needs_python(plan: Plan) -> str | None:
    """Why what follows the engine in a step cannot be captured as a CUDA graph; None: it can.

    Criteria of the host kind are no reason: they are asked when the step lands.
    """
    for item in plan.items:
        if not (isinstance(item.plugin, HostStoppingCriterion) or item.graph_safe):
            return f"{item.name!r} does not say that it is graph_safe"
    return None
