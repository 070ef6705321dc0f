"""Which kernel a product of one row gets: measured when an engine is first loaded on a machine, and kept on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import triton

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cuda.kernels.gemv import TILINGS, Tiling
from trtllm_core.backends.torch.cuda.product import Product

MEASURED_FROM = 1 << 20
"""Elements of a weight from which a product is measured: smaller ones take the first tiling."""

CALLS = 32
"""Products in one measurement, over different weights where there are some: none should lie in the cache already."""

_log = logging.getLogger(__name__)


class Tunings:
    """The choices of one machine, in a small JSON file.

    Args:
        path: of the file; None: ``kernels.json`` in ``$TRTLLM_CORE_CACHE``, or in the user's cache directory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = cache_folder() / "kernels.json" if path is None else path
        try:
            self._known: dict[str, list[int] | None] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def choose(self, product: Product, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Tiling | None:
        """The tiling for weights of one shape; None: the library is faster.

        Args:
            product: what is computed.
            weights: some weights of the shape, from different layers.
            bias: of one of them; None: they have none.
        """
        weight = weights[0]
        if weight.numel() < MEASURED_FROM:
            return TILINGS[0]
        key = _key(product, weight, bias is not None)
        if key not in self._known:
            self._known[key] = measured(product, weights, bias)
            self._changed = True
        found = self._known[key]
        return None if found is None else Tiling(*found)

    def save(self) -> None:
        """Write what was measured, if anything was. Others may have written meanwhile: theirs stays."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            known = json.loads(self._path.read_text()) if self._path.exists() else {}
            part = self._path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(known | self._known, indent=1, sort_keys=True))
            part.replace(self._path)
        except (OSError, ValueError) as error:
            _log.warning("the choice of kernels is measured again next time: %s", error)


def measured(product: Product, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> list[int] | None:
    """The fastest of ``TILINGS`` and the library, by the median of replayed graphs."""
    times = {tiling: _time(product, tiling, weights, bias) for tiling in (None, *TILINGS)}
    best = min(times, key=lambda tiling: times[tiling])
    report = {str(tiling and tuple(tiling)): f"{1e3 * time:.1f}" for tiling, time in times.items()}
    _log.info("%s: us a product %s", _key(product, weights[0], bias is not None), report)
    return None if best is None else list(best)


def _time(product: Product, tiling: Tiling | None, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> float:
    """Milliseconds of one product, in a chain of them."""
    weight = weights[0]
    x = torch.randn(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    residual = torch.zeros(1, weight.shape[0], dtype=weight.dtype, device=weight.device) if product.added else None

    def chain() -> None:
        for number in range(CALLS):
            product.run(tiling, x, weights[number % len(weights)], bias, residual)

    return _replayed(chain, weight.device) / CALLS


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


def _key(product: Product, weight: torch.Tensor, biased: bool) -> str:
    """Whatever the choice depends on."""
    parts = [
        torch.cuda.get_device_name(weight.device),
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        str(weight.dtype).removeprefix("torch."),
        "x".join(map(str, weight.shape)),
        product.activation,
    ]
    flags = {"gated": product.gated, "added": product.added, "biased": biased}
    return " | ".join(parts + [name for name, on in flags.items() if on])
