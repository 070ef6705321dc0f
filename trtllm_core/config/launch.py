"""What the launcher of this process, MPI or torchrun, says about the world of ranks."""

from __future__ import annotations

import os

from trtllm_core.errors import ConfigError


def shares(launcher: str, size: int, tp: int | None, pp: int | None) -> tuple[int, int]:
    """Tensor and pipeline parallelism of ``size`` ranks: ``pp`` defaults to 1, ``tp`` to all ranks that are left.

    The rule is that of the classic ``WorldConfig.mpi``. Raises ConfigError unless the two multiply to ``size``.
    """
    pp = pp or 1
    tp = tp or size // pp
    if tp * pp != size:
        raise ConfigError(
            f"{launcher} started {size} ranks, but tensor_parallelism {tp} * pipeline_parallelism {pp} needs {tp * pp}"
        )
    return tp, pp


def mpi_world() -> tuple[int, int]:
    """Size and rank of ``MPI.COMM_WORLD``. The project's one place that imports mpi4py, which starts MPI.

    Raises:
        ConfigError: when mpi4py, or an MPI library for it, is missing.
    """
    try:
        from mpi4py import MPI  # type: ignore[import-not-found,unused-ignore]
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but finds no MPI library
        raise ConfigError(
            f"MPI needs mpi4py and an MPI library ({error}): run `pip install trtllm-core[mpi]`, or start the ranks "
            "with torchrun and use WorldConfig.from_env()"
        ) from error
    return MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank()


def env_world() -> tuple[int, int, int]:
    """Size, rank and processes a machine, from torchrun's environment variables; 8 a machine where it says nothing.

    Raises:
        ConfigError: when ``WORLD_SIZE`` or ``RANK`` is missing, or one of the three is no whole number.
    """
    return _env_int("WORLD_SIZE"), _env_int("RANK"), _env_int("LOCAL_WORLD_SIZE", "8")


def _env_int(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name} must be a whole number, got {text!r}; torchrun sets it")
    return int(text)
