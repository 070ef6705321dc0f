"""What authors of device plugins import beside ``trtllm_core.plugin``: words for tensors by slot. Imports torch.

Import it in the module that has the plugin's class, never in the one that registers it.

- State by slot: ``SlotTable`` keeps lists, ``copy_slots`` is a simultaneous fork, ``per_row`` and ``accepted`` read it.
- The text before a position, drafts of a verify step included: ``recent``, ``texts``, ``generated``, ``tokens_before``.
- Random numbers that belong to a request and a position: ``draw_salt``, ``batch_uniform``, ``uniform``,
  ``uniform_rows``.
"""

from trtllm_core.decoding.history import generated, recent, texts, tokens_before
from trtllm_core.decoding.random import batch_uniform, draw_salt, uniform, uniform_rows
from trtllm_core.decoding.state import SlotTable, accepted, copy_slots, per_row

__all__ = [
    "SlotTable",
    "accepted",
    "batch_uniform",
    "copy_slots",
    "draw_salt",
    "generated",
    "per_row",
    "recent",
    "texts",
    "tokens_before",
    "uniform",
    "uniform_rows",
]
