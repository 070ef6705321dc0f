"""How fast single products are on a GPU: ``python -m tests.cuda_products llama-3-8b 1,8,32 bf16,fp8,int4 [--wide]``.

For each product of a shape, by rows and kind of weight: microseconds by the library and by the fastest ways of ours, in
a replayed graph over weights that no cache holds, and what share of 4685 GB/s that is. ``--wide`` tries more ways;
``--part qkv``, which comes last, leaves out other products.
"""

from __future__ import annotations

import sys

import torch

from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.kernels.gemv import Tiling
from trtllm_core.backends.torch.cuda.kernels.skinny import Blocks
from trtllm_core.backends.torch.cuda.product import Product
from trtllm_core.backends.torch.cuda.tuning import SAMPLED, Way, candidates, timed
from trtllm_core.backends.torch.cuda.weights import codes_of
from trtllm_core.config import QuantizedLayer
from trtllm_core.nn import Linear
from trtllm_core.quantize import part_shapes

BANDWIDTH = 4685e9
SHAPES = {
    "llama-3-8b": {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "llama-3.2-1b": {
        "qkv": (3072, 2048),
        "output": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
        "head": (128256, 2048),
    },
}
KINDS = {
    "fp8": (8, "float8", 0),
    "int8": (8, "symmetric", 32),
    "int8-128": (8, "symmetric", 128),
    "int8-row": (8, "symmetric", 0),
    "int4": (4, "zero_points", 32),
    "int4-128": (4, "symmetric", 128),
    "q4_0": (4, "symmetric", 32),
    "q4_1": (4, "offsets", 32),
}
WIDE_TILINGS = [
    Tiling(*one)
    for one in ((2, 1024, 4), (4, 1024, 4), (8, 512, 4), (4, 2048, 4), (8, 2048, 8), (2, 2048, 2), (16, 512, 4))
]
WIDE_BLOCKS = [
    Blocks(*one)
    for one in (
        (32, 128, 1, 2, 5),
        (32, 256, 1, 2, 4),
        (32, 256, 2, 4, 4),
        (64, 256, 1, 4, 3),
        (64, 128, 2, 4, 5),
        (64, 256, 2, 4, 3),
        (64, 256, 4, 4, 3),
        (128, 128, 1, 8, 4),
        (128, 128, 2, 8, 4),
        (128, 128, 4, 8, 4),
        (64, 64, 2, 4, 6),
        (16, 256, 1, 1, 5),
    )
]


def weights(kind: str, shape: tuple[int, int]) -> list[torch.Tensor | Codes]:
    """So many that a measurement reads no cache."""
    if kind == "bf16":
        count = max(1, SAMPLED // (2 * shape[0] * shape[1]))
        return [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    bits, form, group = KINDS[kind]
    how = QuantizedLayer(bits=bits, group_size=group or shape[1], form=form)  # type: ignore[arg-type]
    made: list[torch.Tensor | Codes] = []
    for _ in range(max(1, SAMPLED // (bits * shape[0] * shape[1] // 8))):
        layer = Linear(1, 1)
        layer.quantized = how
        for name, size in part_shapes(how, shape).items():
            part = torch.full(size, 0.01, device="cuda")
            if name in ("codes", "zero_points"):
                part = torch.randint(0, 120, size, dtype=torch.uint8, device="cuda")
            setattr(layer, "weight" if name == "codes" else name, torch.nn.Parameter(part, requires_grad=False))
        found = codes_of(layer)
        assert found is not None
        made.append(found)
    return made


def size(weight: torch.Tensor | Codes) -> int:
    """Bytes that a product reads of it."""
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return weight.codes.nbytes + weight.scales.nbytes + (0 if weight.offsets is None else weight.offsets.nbytes)


def ways(weight: torch.Tensor | Codes, rows: int, wide: bool) -> list[Way]:
    """What is tried."""
    found = [*candidates(weight, rows)]
    if wide:
        found += [*(WIDE_TILINGS if rows == 1 else ()), *WIDE_BLOCKS]
    return list(dict.fromkeys([None, *found]))


def main() -> None:
    name, rows, kinds = sys.argv[1], [int(one) for one in sys.argv[2].split(",")], sys.argv[3].split(",")
    print(torch.cuda.get_device_name(), torch.__version__, name)
    for kind in kinds:
        total: dict[int, list[float]] = {count: [0.0, 0.0] for count in rows}
        parts = (
            SHAPES[name] if "--part" not in sys.argv else {one: SHAPES[name][one] for one in sys.argv[-1].split(",")}
        )
        for part, shape in parts.items():
            held = weights(kind, shape)
            gated = part == "gate_up"
            product = Product("silu" if gated else "none", gated, part in ("output", "down"))
            for count in rows:
                times = {}
                for way in ways(held[0], count, "--wide" in sys.argv):
                    try:
                        times[way] = 1e3 * timed(product, way, held, None, count)
                    except Exception as error:  # a way that does not fit is none
                        print(part, count, way, str(error).strip().split("\n")[-1][:100])
                best = sorted((way for way in times if way is not None), key=lambda way: times[way])
                share = size(held[0]) / BANDWIDTH / (times[best[0]] / 1e6)
                layers = 1 if part == "head" else 32 if name == "llama-3-8b" else 16
                total[count][0] += layers * times[None]
                total[count][1] += layers * min(times[None] if kind == "bf16" else 1e9, times[best[0]])
                told = ", ".join(f"{tuple(way)} {times[way]:.1f}" for way in best[:4] if way is not None)
                print(f"{kind} {part} x{count}: library {times[None]:.1f} us, ours {told}: {share:.0%} of bandwidth")
            del held
            torch.cuda.empty_cache()
        for count, (library, ours) in total.items():
            print(f"{kind} x{count}, all products of a step: library {library / 1e3:.3f} ms, ours {ours / 1e3:.3f} ms")


if __name__ == "__main__":
    main()
