"""Names that scripts may import, and that have nothing behind them any more: whoever uses one is told why."""

from __future__ import annotations

from typing import Any

from trtllm_core.errors import ConfigError


def gone(name: str, why: str) -> type:
    """A class that can be imported and refuses to be made.

    Args:
        name: as it is imported.
        why: a sentence after a colon.
    """

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(f"{name}: {why}")

    return type(name.rpartition(".")[2], (), {"__init__": refuse, "__doc__": f"Not carried on: {why}"})


def refuse(where: str, **values: Any) -> None:
    """Refuse arguments that are set and that nothing here honours. What is None, False, 0 or empty was not asked for.

    Raises:
        ConfigError: naming them.
    """
    for name, value in values.items():
        if value is None or (not hasattr(value, "shape") and not value):
            continue
        raise ConfigError(f"{where}: {name} is not honoured by trtllm-core{WHY.get(name, '')}; leave it out")


WHY = {
    "medusa_choices": ", which has no Medusa heads; for speculation choose a decoder",
    "eagle_choices": ", which has no EAGLE heads; for speculation choose a decoder",
    "lookahead_config": ", which has no lookahead decoding; for speculation choose a decoder",
    "encoder_input_ids": ", which runs decoder-only models",
    "encoder_output": ", which runs decoder-only models",
    "cross_attention_mask": ", which runs decoder-only models",
}
