"""The BLOOM family for trtllm-core."""
