"""The LLaMA family for trtllm-core."""
