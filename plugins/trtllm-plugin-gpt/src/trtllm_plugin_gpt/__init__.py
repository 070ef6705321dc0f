"""The GPT family for trtllm-core."""
