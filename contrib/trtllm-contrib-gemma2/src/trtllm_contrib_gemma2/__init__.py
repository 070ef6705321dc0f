"""The Gemma 2 family for trtllm-core."""
