"""An engine that computes nothing: choosing tokens from logits that somebody else computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trtllm_core.config import BuildConfig, EngineConfig, ModelConfig, Provider
from trtllm_core.plugin import Capabilities, Executable, TensorSpec
from trtllm_core.plugin.kv_policy import Edits, KVPlan
from trtllm_core.version import __version__


class GivenLogits(Executable):
    """An engine whose logits are what it was given."""

    def __init__(self, vocab_size: int, build: BuildConfig, device: torch.device) -> None:
        nobody = Provider(name="given", distribution="trtllm-core", version=__version__)
        model = ModelConfig(
            family="given",
            architecture="given",
            vocab_size=vocab_size,
            hidden_size=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=1,
            max_position_embeddings=build.max_seq_len,
        )
        self.config = EngineConfig(
            core_version=__version__,
            family=nobody,
            backend=nobody,
            contract="packed_paged",
            model=model,
            build=build,
        )
        self.device = device
        self.capabilities = Capabilities(contract="packed_paged", dtypes=("float32",), batch_invariant=True)
        self.tensors: tuple[TensorSpec, ...] = ()
        self.logits: torch.Tensor
        """float32 ``[rows, vocab_size]``, in the order of the step's rows."""

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``: there is no cache."""
        return 0

    def edit_kv(self, edits: Edits) -> None:
        """See ``Executable``."""

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``Executable``."""
        outputs["logits"].copy_(self.logits)

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return 0
