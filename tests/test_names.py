"""What ``import trtllm_core`` offers, and what it says of classic names that it does not."""

from __future__ import annotations

import pytest

import trtllm_core
from trtllm_core.compat.tensorrt_llm import runtime


@pytest.mark.parametrize("name", trtllm_core.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(trtllm_core, name) is not None
    assert name in dir(trtllm_core)


@pytest.mark.parametrize("name", [name for name in runtime.__all__ if name not in trtllm_core.__all__])
def test_classic_names_lead_somewhere(name: str) -> None:
    """What is not here under its old name is refused with what stands in its place, or was nothing that one uses."""
    gone = isinstance(getattr(runtime, name), type) and "Not carried on" in (getattr(runtime, name).__doc__ or "")
    if gone or name == "PYTHON_BINDINGS":
        assert not hasattr(trtllm_core, name)
        return
    with pytest.raises(ImportError, match=rf"trtllm_core.{name}: here it is \w+.*trtllm_core.compat.tensorrt_llm"):
        exec(f"from trtllm_core import {name}", {})


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trtllm_core.nonsense  # noqa: B018
