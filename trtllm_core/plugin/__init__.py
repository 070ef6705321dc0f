'''What plugin authors import: the marker, base classes, views, registrars and ``Plugins``. Imports no torch.

A plugin is a module, or an instance, that says which hook versions it implements and registers things:

.. code-block:: python

    """my_plugin.py: forbids one token."""

    from trtllm_core.plugin import DeviceLogitsProcessor, LogitsProcessorRegistrar, Phase, hookimpl

    hook_api = "logits_processor>=1.0,<2"


    class NeverZero(DeviceLogitsProcessor):
        phase = Phase.CONSTRAINT

        def apply(self, logits, batch):
            logits[:, 0].masked_fill_(batch.active, float("-inf"))


    @hookimpl
    def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
        registrar.add("never_zero", NeverZero)

Its ``pyproject.toml`` names the module in the entry-point group, and the core that it was written for::

    [project]
    dependencies = ["trtllm-core>=0.1"]

    [project.entry-points.trtllm_core]
    never_zero = "my_plugin"

While it is not installed, ``Plugins.load(extra=[my_plugin])`` loads it.
'''

from trtllm_core.plugin.backend import (
    Availability,
    Backend,
    BuiltRank,
    Capabilities,
    Executable,
    LowRank,
    TensorSpec,
)
from trtllm_core.plugin.decoder import (
    BranchPlan,
    Candidates,
    Decoder,
    DecoderCapabilities,
    DecoderHost,
    Hypothesis,
    Proposal,
    Sampler,
    Selection,
    Survivors,
)
from trtllm_core.plugin.eviction import CachedBlock, EvictionOrder
from trtllm_core.plugin.family import CheckpointView, ModelFamily, Piece, Weight
from trtllm_core.plugin.inspection import Finding, Inspection, LayerGroup, StoredTensor
from trtllm_core.plugin.kv_policy import (
    Admission,
    Edits,
    KVBudget,
    KVModel,
    KVPlan,
    KVPolicy,
    KVStatistics,
    KVUsage,
    Move,
    OutOfBlocksError,
    Placement,
)
from trtllm_core.plugin.lifecycle import Example, SlotPlugin
from trtllm_core.plugin.loader import PluginReport
from trtllm_core.plugin.logits import (
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    LogitsCapabilities,
    LogitsProcessor,
    Phase,
)
from trtllm_core.plugin.manager import Plugins
from trtllm_core.plugin.markers import HOOK_VERSIONS, PROJECT, hookimpl
from trtllm_core.plugin.observer import RequestStats, SessionStats, StepStats
from trtllm_core.plugin.registrar import (
    AnyOf,
    BackendRegistrar,
    DecoderRegistrar,
    Entry,
    KVPolicyRegistrar,
    LogitsProcessorRegistrar,
    ModelFamilyRegistrar,
    Registry,
    Source,
    StoppingCriterionRegistrar,
)
from trtllm_core.plugin.specs import (
    HOOK_KINDS,
    BackendSpecs,
    DecoderSpecs,
    KVPolicySpecs,
    LogitsProcessorSpecs,
    ModelFamilySpecs,
    ObserverSpecs,
    StoppingCriterionSpecs,
)
from trtllm_core.plugin.stopping import (
    DeviceStoppingCriterion,
    HostStoppingCriterion,
    Stop,
    StoppingCapabilities,
    StoppingCriterion,
)
from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, FinishReason, LogitsBatch

__all__ = [
    "HOOK_KINDS",
    "HOOK_VERSIONS",
    "PROJECT",
    "Admission",
    "AnyOf",
    "Availability",
    "Backend",
    "BackendRegistrar",
    "BackendSpecs",
    "BranchPlan",
    "BranchView",
    "BuiltRank",
    "CachedBlock",
    "Candidates",
    "Capabilities",
    "CheckpointView",
    "CommitBatch",
    "Decoder",
    "DecoderCapabilities",
    "DecoderHost",
    "DecoderRegistrar",
    "DecoderSpecs",
    "DecodingContext",
    "DeviceLogitsProcessor",
    "DeviceStoppingCriterion",
    "Edits",
    "Entry",
    "EvictionOrder",
    "Example",
    "Executable",
    "Finding",
    "FinishReason",
    "HostLogitsProcessor",
    "HostStoppingCriterion",
    "Hypothesis",
    "Inspection",
    "KVBudget",
    "KVModel",
    "KVPlan",
    "KVPolicy",
    "KVPolicyRegistrar",
    "KVPolicySpecs",
    "KVStatistics",
    "KVUsage",
    "LayerGroup",
    "LogitsBatch",
    "LogitsCapabilities",
    "LogitsProcessor",
    "LogitsProcessorRegistrar",
    "LogitsProcessorSpecs",
    "LowRank",
    "ModelFamily",
    "ModelFamilyRegistrar",
    "ModelFamilySpecs",
    "Move",
    "ObserverSpecs",
    "OutOfBlocksError",
    "Phase",
    "Piece",
    "Placement",
    "PluginReport",
    "Plugins",
    "Proposal",
    "Registry",
    "RequestStats",
    "Sampler",
    "Selection",
    "SessionStats",
    "SlotPlugin",
    "Source",
    "StepStats",
    "Stop",
    "StoppingCapabilities",
    "StoppingCriterion",
    "StoppingCriterionRegistrar",
    "StoppingCriterionSpecs",
    "StoredTensor",
    "Survivors",
    "TensorSpec",
    "Weight",
    "hookimpl",
]
