"""``python -m trtllm_core.compat script.py arguments``: runs a script written for ``tensorrt_llm``, as it is."""

from __future__ import annotations

import os
import runpy
import sys
from contextlib import nullcontext

from trtllm_core.compat.aliasing import install
from trtllm_core.errors import TrtllmCoreError


def main(arguments: list[str]) -> None:
    """Run the script in ``arguments[0]`` with the rest as its arguments."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m trtllm_core.compat SCRIPT [ARGUMENT]...", file=sys.stderr)
        raise SystemExit(2)
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))  # python puts the working directory there
    try:
        install()
    except TrtllmCoreError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    import torch

    context = nullcontext()
    if not torch.cuda.is_available():
        from trtllm_core.compat.cuda import cuda_on_cpu

        print("note: there is no CUDA device; what the script sends to one stays on the CPU", file=sys.stderr)
        context = cuda_on_cpu()  # type: ignore[assignment]
    sys.argv = arguments
    with context:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
