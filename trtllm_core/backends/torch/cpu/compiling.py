"""Compiles the kernels with the machine's own compiler, once, and keeps the library on disk."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from trtllm_core.errors import EngineUnsupportedError

SOURCES = Path(__file__).with_name("native")
SOURCE = SOURCES / "kernels.cpp"
"""Includes the others."""

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""Not ``-ffast-math``: linked so, a library changes how the whole process rounds tiny numbers."""

COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 120
"""Seconds; a machine needs five or ten."""

_log = logging.getLogger(__name__)


@cache
def library(folder: Path) -> ctypes.CDLL:
    """The kernels, compiled or found in ``folder``.

    Raises:
        EngineUnsupportedError: there is no compiler, it fails, or what it made cannot be loaded; says which.
    """
    compiler = _compiler()
    if compiler is None:
        raise EngineUnsupportedError("there is no C++ compiler; install one, or set CXX to its path")
    try:
        return _loaded(compiler, folder / f"kernels-{_key(compiler)}.so")
    except subprocess.CalledProcessError as error:
        told = error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"]
        why = next((line for line in told if "error" in line), told[0])  # the first may say where a header is included
        raise EngineUnsupportedError(f"{compiler} cannot compile the kernels: {why}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineUnsupportedError(f"the kernels cannot be compiled or loaded: {error}") from error


def _loaded(compiler: str, path: Path) -> ctypes.CDLL:
    """What is there but cannot be loaded is compiled once more."""
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            _log.warning("the kernels are compiled again: %s", error)
            path.unlink(missing_ok=True)
    _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    """Others may compile at the same time: whoever is last replaces the file with an equal one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, since a linker keeps the permissions of a file that is there, and temporary ones are for one user alone.
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder:
        part = Path(folder, path.name)
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(part)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        part.replace(path)
    _log.info("compiled %s", path)


def _compiler() -> str | None:
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)


def _key(compiler: str) -> str:
    """Of source, flags, compiler and processor: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    command = [compiler, "--version"]
    version = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT).stdout
    sources = [path.read_text() for path in sorted(SOURCES.iterdir())]
    parts = (*sources, " ".join(FLAGS), version, platform.machine(), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
