"""``BuildConfig.options`` of the tensorrt backend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trtllm_core.config import Config

ModuleName = Literal["tensorrt", "tensorrt_rtx"]


class TensorRTOptions(Config):
    """What is chosen when an engine is built."""

    module: ModuleName | None = Field(default=None, description="None: whichever is installed, tensorrt first")
    attention: Literal["lower_right", "mask"] = Field(
        default="lower_right",
        description="how queries are kept from later entries; models with windows or biases have a mask anyway",
    )
    max_draft_len: int = Field(default=0, ge=0, le=255, description="drafted tokens that a generation step may verify")
    gather_all_token_logits: bool = Field(default=False, description="room for the logits of every prompt token")
    weights: Literal["constants", "inputs"] = Field(
        default="constants", description="inputs: one small engine for every checkpoint of a shape"
    )
    weight_streaming: bool = False
    verify: bool = Field(default=False, description="hold the graph against the torch backend, and record the errors")
    compute_capabilities: tuple[str, ...] = Field(
        default=(), description="GPUs to build for, such as 8.9 and 12.0; none: the module's default"
    )
    debug_tensors: tuple[str, ...] = Field(
        default=(),
        description="modules, such as layers.*, whose outputs debug_mode keeps; the engine always writes them",
    )
