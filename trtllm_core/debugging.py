"""The tensors of a session's runs, for people who look for where numbers go wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

FOLDER = Path("trtllm_debug")
"""Below the working directory, unless another is given."""


class DebugBuffers:
    """Copies of what the last run took and gave, by name, which cost a synchronisation and a copy each.

    Args:
        names: which tensors are kept; None: all.
        folder: where every run is written as it is made; None: only what is asked for with ``dump``.
        rank: of this process, in the names of folders.
    """

    def __init__(self, names: Collection[str] | None = None, folder: Path | str | None = None, rank: int = 0) -> None:
        self.names = None if names is None else frozenset(names)
        self.folder = None if folder is None else Path(folder)
        self.rank = rank
        self.steps = 0
        """Runs so far."""
        self.tensors: dict[str, torch.Tensor] = {}
        """Of the last run, on the CPU."""

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a run's tensors instead of the last run's."""
        self.tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in tensors.items()
            if self.names is None or name in self.names
        }
        if self.folder is not None:
            self.dump(self.steps, self.folder)
        self.steps += 1

    def dump(self, step: int, folder: Path | str | None = None) -> list[Path]:
        """Write the last run as ``FOLDER/rank{r}/{name}-step{step}.npy``. bfloat16 becomes float32.

        Returns:
            The files.
        """
        return self.write(Path(folder or self.folder or FOLDER) / f"rank{self.rank}", step)

    def write(self, place: Path, step: int) -> list[Path]:
        """As ``dump``, into this very folder."""
        place.mkdir(parents=True, exist_ok=True)
        files = []
        for name, tensor in self.tensors.items():
            path = place / f"{name}-step{step}.npy"
            np.save(path, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
            files.append(path)
        return files
