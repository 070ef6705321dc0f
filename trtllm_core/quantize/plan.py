"""Which layers of a model are quantised, and how: known before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trtllm_core.config import Quantization, QuantizationConfig, QuantizedLayer
from trtllm_core.errors import ConfigError, listing
from trtllm_core.quantize.gguf import GGUF_BITS, GGUF_GROUP, gguf_form

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of tensors that ``keep`` leaves in the engine's dtype."""


def plan_quantization(
    wish: QuantizationConfig,
    linears: Mapping[str, tuple[int, int]],
    heads: frozenset[str],
    sources: Mapping[str, Sequence[str]],
    stored: Callable[[str], str],
) -> Quantization:
    """What becomes of every linear layer.

    Args:
        wish: of the build.
        linears: ``(out, in)`` of a rank's layers that may be quantised, by name.
        heads: those of them that are the head.
        sources: the checkpoint's tensors that a layer's weight is made of.
        stored: the type of a tensor in the checkpoint.

    Raises:
        ConfigError: a group does not divide a layer's input features; or codes are to be kept, and there are none.
    """
    layers = {}
    for name, (_, inputs) in linears.items():
        if wish.weights == "keep":
            layer = _kept(name, [stored(source) for source in sources[name]])
        else:
            layer = _rounded(wish, inputs, name in heads)
        if layer is None:
            continue
        if inputs % layer.group_size:
            raise ConfigError(
                f"group_size {layer.group_size} does not divide the {inputs} input features of {name!r}: "
                "take a smaller one, or fewer ranks"
            )
        layers[name] = layer
    if not layers:
        raise ConfigError("quantization 'keep' was asked for, but the checkpoint's weights are not quantised")
    return Quantization(weights=wish.weights, layers=layers)


def _rounded(wish: QuantizationConfig, inputs: int, head: bool) -> QuantizedLayer | None:
    bits = (wish.head_bits or 8) if head else 4 if wish.weights == "int4" else 8
    if bits == 16:
        return None
    if wish.weights == "fp8":
        return QuantizedLayer(bits=8, group_size=inputs, form="float8")
    group = 32 if wish.group_size is None else wish.group_size or inputs
    if bits == 4:
        return QuantizedLayer(bits=4, group_size=group, form="symmetric" if wish.symmetric else "zero_points")
    return QuantizedLayer(bits=8, group_size=group, form="symmetric")


def _kept(name: str, types: Sequence[str]) -> QuantizedLayer | None:
    """A layer whose parts differ has the most bits of them, and offsets if one has: no value changes by it."""
    if PLAIN.issuperset(types):
        return None
    other = sorted({kind for kind in types if kind not in GGUF_BITS})
    if other:
        raise ConfigError(
            f"quantization 'keep' takes over {listing(sorted(GGUF_BITS))}, and {name!r} is stored as {listing(other)}: "
            "round it anew with int4 or int8"
        )
    bits = max(GGUF_BITS[kind] for kind in types)
    form = "offsets" if any(gguf_form(kind) == "offsets" for kind in types) else "symmetric"
    return QuantizedLayer(bits=bits, group_size=GGUF_GROUP, form=form)  # type: ignore[arg-type]
