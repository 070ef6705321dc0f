"""The hooks, by domain, and which kind each belongs to.

Every docstring of a hook follows one template, which a test enforces: a summary; Called (when, how often, in which
process); Result; Tensors (what the registered objects will see: shape, dtype, device, and whether it may be changed);
Returns; Raises; Ordering; versionadded; an example that runs.

A hook is always called with keyword arguments, and an implementation may leave out arguments that it does not need.
"""

from __future__ import annotations

from trtllm_core.plugin.specs.decoding import DecoderSpecs, LogitsProcessorSpecs, StoppingCriterionSpecs
from trtllm_core.plugin.specs.execution import BackendSpecs, KVPolicySpecs, ModelFamilySpecs
from trtllm_core.plugin.specs.observing import ObserverSpecs

SPECS: dict[str, type] = {
    "model_family": ModelFamilySpecs,
    "decoder": DecoderSpecs,
    "logits_processor": LogitsProcessorSpecs,
    "stopping_criterion": StoppingCriterionSpecs,
    "kv_policy": KVPolicySpecs,
    "backend": BackendSpecs,
    "observer": ObserverSpecs,
}
"""The spec class of each hook kind."""

HOOK_KINDS: dict[str, str] = {
    name: kind for kind, spec in SPECS.items() for name in vars(spec) if name.startswith("trtllm_")
}
"""The kind of each hook: ``trtllm_register_decoders`` is of kind ``decoder``."""

__all__ = [
    "HOOK_KINDS",
    "SPECS",
    "BackendSpecs",
    "DecoderSpecs",
    "KVPolicySpecs",
    "LogitsProcessorSpecs",
    "ModelFamilySpecs",
    "ObserverSpecs",
    "StoppingCriterionSpecs",
]
