"""``Flight``: a step between its launch and its landing, when its tokens are on their way from the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from trtllm_core.decoding.fetching import Coming
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.tail import Chosen
from trtllm_core.errors import PluginError


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """What is known of a step's new tokens before the host has seen them."""

    chosen: Chosen
    coming: Coming
    """The tokens, and what the device criteria say."""
    slots: list[int]
    """Of the branches that asked for a token."""
    drafts: np.ndarray | None
    """int64 ``[slots]``: how many drafts ran of each; None: none."""
    failures: Mapping[LiveRequest, PluginError]
    """Requests whose plugins failed before anything was committed."""
    ahead: Ahead | None = None
    """None: what was chosen is committed when the step lands."""


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """What the device has committed already, so that the next step may be launched before this one lands."""

    branches: tuple[Branch, ...]
    """Of each row."""
    tokens: torch.Tensor
    """int32 ``[n]``: of each row."""
    failures: Mapping[LiveRequest, PluginError]
    """Requests whose plugins failed in that."""
