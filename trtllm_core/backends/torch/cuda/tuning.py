"""Which kernel a product of few rows gets: measured when a machine first needs it, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile

import torch
import triton

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cuda.kernels.coded import CODED_TILINGS, Codes
from trtllm_core.backends.torch.cuda.kernels.gemv import TILINGS, Tiling
from trtllm_core.backends.torch.cuda.kernels.skinny import BLOCKS, CODED_BLOCKS, Blocks
from trtllm_core.backends.torch.cuda.product import Product
from trtllm_core.backends.torch.cuda.support import up

MEASURED_FROM = 1 << 20
"""Elements of a weight from which a product is measured: smaller ones take the first way."""

SAMPLED = 1 << 30
"""Bytes of weights of one shape that a measurement goes through: more than any cache holds."""

CALLS = 32
"""Products in one measurement, over different weights where there are some: none should lie in the cache already."""

FEWEST = 8
"""Rows of the smallest bucket beyond one: the matrix units take no fewer."""

FEW = 64
"""Rows up to which a product may have a kernel of ours. From there on it is the library's, which beside weights of e4m3
rounds activations: where it does is no matter of measurements, because results depend on it."""

FEW_OF_CODES = 128
"""The same of integers, which the library must dequantise first."""

Way = Tiling | Blocks | None
"""How a product is computed; None: by the library."""

_log = logging.getLogger(__name__)


class Tunings:
    """The choices of one machine, in a small JSON file.

    Args:
        path: of the file; None: ``kernels.json`` in ``$TRTLLM_CORE_CACHE``, or in the user's cache directory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = cache_folder() / "kernels.json" if path is None else path
        self._known = _read(self._path)
        self._changed = False

    def choose(
        self,
        product: Product,
        weights: Sequence[torch.Tensor | Codes],
        bias: torch.Tensor | None,
        rows: int = 1,
    ) -> Way:
        """How products with weights of one shape are computed.

        Args:
            product: what is computed.
            weights: some weights of the shape, from different layers.
            bias: of one of them; None: they have none.
            rows: of the other factor.
        """
        weight = weights[0]
        ways = candidates(weight, rows)
        if len(ways) == 1 or math.prod(weight.shape) < MEASURED_FROM:
            return ways[0]
        key = _key(product, weight, bias is not None, rows)
        if key not in self._known:
            self._known[key] = measured(product, weights, bias, rows)
            self._changed = True
        found = self._known[key]
        if found is None:
            return None
        return Blocks(*found) if len(found) == len(Blocks._fields) else Tiling(*found)

    def save(self) -> None:
        """Write what was measured, if anything was. Others may have written meanwhile: theirs stays."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self._path.parent, suffix=".part", delete=False) as part:
                json.dump(_read(self._path) | self._known, part, indent=1, sort_keys=True)
            os.replace(part.name, self._path)
        except OSError as error:
            _log.warning("the choice of kernels is measured again next time: %s", error)


class Choice:
    """How the products of layers that are alike are computed, by their rows. Asked for once a bucket and machine.

    Args:
        tunings: of the machine.
        product, weights, bias: see ``Tunings.choose``.
    """

    def __init__(
        self,
        tunings: Tunings,
        product: Product,
        weights: Sequence[torch.Tensor | Codes],
        bias: torch.Tensor | None,
    ) -> None:
        self._tunings, self._product, self._weights, self._bias = tunings, product, weights, bias
        self._known: dict[int, Way] = {}
        self._most = most_rows(weights[0])

    def __call__(self, rows: int) -> Way:
        """For so many rows. The first time may take seconds: it is never while a graph is captured, since a step runs
        before it is."""
        if rows > self._most:
            return None
        bucket = 1 if rows == 1 else max(FEWEST, up(rows))
        if bucket not in self._known:
            self._known[bucket] = self._tunings.choose(self._product, self._weights, self._bias, bucket)
            self._tunings.save()
        return self._known[bucket]


def most_rows(weight: torch.Tensor | Codes) -> int:
    """Rows from which on a product is the library's."""
    return FEW if isinstance(weight, torch.Tensor) or weight.float8 else FEW_OF_CODES


def candidates(weight: torch.Tensor | Codes, rows: int) -> Sequence[Way]:
    """What is tried for a product, the likeliest first. For codes the library is the last resort. One row of them goes
    through the matrix units where much of it is alike: the numbers of e4m3 are converted faster for them, and a head is
    long."""
    if isinstance(weight, torch.Tensor):
        return (*TILINGS, None) if rows == 1 else (None, *BLOCKS)
    if rows == 1:
        return (*CODED_TILINGS, *CODED_BLOCKS[:4]) if weight.bits == 8 else CODED_TILINGS
    return CODED_BLOCKS if weight.float8 or rows <= FEWEST else (*CODED_BLOCKS, None)


def measured(
    product: Product, weights: Sequence[torch.Tensor | Codes], bias: torch.Tensor | None, rows: int
) -> list[int] | None:
    """The fastest of the candidates, by the median of replayed graphs. What needs more than the GPU has is none."""
    times = {}
    for way in candidates(weights[0], rows):
        with suppress(triton.runtime.errors.OutOfResources):
            times[way] = timed(product, way, weights, bias, rows)
    best = min(times, key=lambda way: times[way])
    report = {str(way and tuple(way)): f"{1e3 * time:.1f}" for way, time in times.items()}
    _log.info("%s: us a product %s", _key(product, weights[0], bias is not None, rows), report)
    return None if best is None else list(best)


def timed(
    product: Product, way: Way, weights: Sequence[torch.Tensor | Codes], bias: torch.Tensor | None, rows: int
) -> float:
    """Milliseconds of one product, in a chain of them."""
    weight = weights[0]
    stored = weight if isinstance(weight, torch.Tensor) else weight.codes
    dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.bfloat16
    x = torch.randn(rows, weight.shape[1], dtype=dtype, device=stored.device)
    residual = torch.zeros(rows, weight.shape[0], dtype=dtype, device=stored.device) if product.added else None

    def chain() -> None:
        for number in range(CALLS):
            product.run(way, x, weights[number % len(weights)], bias, residual)

    return _replayed(chain, stored.device) / CALLS


def _replayed(chain: Callable[[], None], device: torch.device) -> float:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        chain()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        chain()
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(median(times[1:]))


def _read(path: Path) -> dict[str, list[int] | None]:
    """What a file says of known ways. What is damaged, or says anything else, is measured anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: way for key, way in entries if way is None or _is_way(way)}


def _is_way(way: object) -> bool:
    sizes = len(Blocks._fields), len(Tiling._fields)
    return isinstance(way, list) and len(way) in sizes and all(isinstance(number, int) for number in way)


@cache
def _sources() -> str:
    """Of the kernels and of what is tried: others may be faster since they changed."""
    digest = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6)
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(product: Product, weight: torch.Tensor | Codes, biased: bool, rows: int) -> str:
    """Whatever the choice depends on."""
    stored = weight if isinstance(weight, torch.Tensor) else weight.codes
    parts = [
        torch.cuda.get_device_name(stored.device),
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        f"kernels {_sources()}",
        _kind(weight),
        "x".join(map(str, weight.shape)),
        product.activation,
    ]
    flags = {"gated": product.gated, "added": product.added, "biased": biased, f"{rows} rows": rows > 1}
    return " | ".join(parts + [name for name, on in flags.items() if on])


def _kind(weight: torch.Tensor | Codes) -> str:
    """What a weight is made of."""
    if isinstance(weight, torch.Tensor):
        return str(weight.dtype).removeprefix("torch.")
    if weight.float8:
        return "e4m3"
    offsets = "" if weight.offsets is None else " and offsets"
    group = "row" if weight.whole else str(weight.group_size)
    return f"{weight.bits} bits in groups of {group}{offsets}"
