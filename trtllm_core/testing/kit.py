"""What all conformance kits share: how a check fails or is passed over, and running a kit without pytest."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn
from unittest import SkipTest

F = Callable[..., None]


class Conformance:
    """A kit: a class to subclass in a test file, whose ``test_…`` methods are its checks.

    .. code-block:: python

        class TestTopA(LogitsProcessorConformance):
            plugin = top_a
            params = ({}, {"a": 1.0})

    pytest runs them; so does ``run_kit``, without it. A check that fails raises ``AssertionError`` with one sentence;
    one that does not apply to the plugin is skipped, and says why.
    """

    plugin: ClassVar[Any] = None
    """A class, a module with hooks, or the name under which an installed plugin is registered."""
    name: ClassVar[str | None] = None
    """Which one, where a module registers several."""
    params: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Parameters to try."""
    wrong_params: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Parameters that must be refused before the first token."""

    @classmethod
    def given(cls) -> Any:
        """``plugin`` as it was written: a function that stands in a class would be bound to it otherwise."""
        found = inspect.getattr_static(cls, "plugin")
        return found.__func__ if isinstance(found, staticmethod) else found

    @classmethod
    def checks(cls) -> Iterator[str]:
        """Names of the checks, in the order in which they are written, base classes first."""
        seen: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            seen |= dict.fromkeys(name for name in vars(base) if name.startswith("test_"))
        return (name for name in seen if callable(getattr(cls, name)))


def require(condition: object, sentence: str) -> None:
    """Fail the check with a sentence unless ``condition`` holds."""
    if not condition:
        raise AssertionError(sentence)


def passed_over(why: str) -> NoReturn:
    """The check does not apply; pytest reports it as skipped."""
    raise SkipTest(why)


def cuda(check: F) -> F:
    """Mark a check that needs a CUDA GPU, for ``pytest -m cuda``; elsewhere it is skipped."""
    try:
        import pytest
    except ModuleNotFoundError:  # run_kit needs no pytest
        return check
    return pytest.mark.cuda(check)


def need_gpu() -> str:
    """The device to run on, or the check is passed over."""
    import torch

    if not torch.cuda.is_available():
        passed_over("there is no CUDA GPU here")
    return "cuda"


@dataclass(frozen=True)
class Result:
    """What became of one check."""

    check: str
    status: Literal["passed", "failed", "skipped"]
    why: str = ""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The check's name in words."""
        return self.check.removeprefix("test_").replace("_", " ")


def run_kit(kit: type[Conformance], checks: Iterable[str] | None = None) -> list[Result]:
    """Run some checks of a kit; None runs all. Nothing is raised: what a plugin raises fails the check."""
    results = []
    for name in kit.checks() if checks is None else checks:
        start = time.perf_counter()
        status: Literal["passed", "failed", "skipped"] = "passed"
        why = ""
        try:
            getattr(kit(), name)()
        except SkipTest as skip:
            status, why = "skipped", str(skip)
        except AssertionError as failure:
            status, why = "failed", str(failure) or _where(failure)
        except Exception as error:
            status, why = "failed", f"{type(error).__name__}: {error} ({_where(error)})"
        results.append(Result(name, status, why, time.perf_counter() - start))
    return results


def _where(error: BaseException) -> str:
    """The innermost line that raised, for those who write the plugin."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {last.name}, {Path(last.filename).name}:{last.lineno}"
