"""StreamingLLM as a KV policy."""
