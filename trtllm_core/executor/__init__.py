"""In-flight batching: requests come and go at any time, and share the steps of one session."""

from trtllm_core.executor.executor import Executor
from trtllm_core.executor.handle import RequestHandle

__all__ = ["Executor", "RequestHandle"]
