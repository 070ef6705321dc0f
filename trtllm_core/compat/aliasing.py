"""Gives ``trtllm_core.compat.tensorrt_llm`` the name ``tensorrt_llm``, for scripts that import it by that name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from trtllm_core.errors import ConfigError

NAME = "tensorrt_llm"
HOME = f"{__package__}.{NAME}"


class _NotHere(MetaPathFinder):
    """Says of a submodule that we do not have why it is not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{NAME}."):
            raise ModuleNotFoundError(
                f"{fullname} is not among what trtllm-core carries on of tensorrt_llm (the runtime: tensorrt_llm."
                "runtime and what it needs); engines are made with `trtllm-core build`",
                name=fullname,
            )
        return None


def install() -> None:
    """Make ``import tensorrt_llm`` and its submodules mean ours, in this process. A second call does nothing.

    Raises:
        ConfigError: there is a real ``tensorrt_llm`` that it would hide.
    """
    found = sys.modules.get(NAME)
    if found is not None and found.__name__ == HOME:
        return
    spec = found.__spec__ if found is not None else importlib.util.find_spec(NAME)
    if found is not None or spec is not None:
        places = [*(getattr(spec, "submodule_search_locations", None) or ())]
        where = getattr(spec, "origin", None) or (places[0] if places else "this process")
        raise ConfigError(
            f"tensorrt_llm is there already ({where}), and would be hidden: import {HOME} by that name, or use an "
            "environment and a directory without it"
        )
    ours = importlib.import_module(HOME)
    names = [HOME, *(info.name for info in pkgutil.walk_packages(ours.__path__, f"{HOME}."))]
    sys.modules.update({NAME + name.removeprefix(HOME): importlib.import_module(name) for name in names})
    sys.meta_path.insert(0, _NotHere())


def uninstall() -> None:
    """Take the name back, if ``install`` gave it. What was imported stays with who imported it."""
    if getattr(sys.modules.get(NAME), "__name__", None) != HOME:
        return
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _NotHere)]
