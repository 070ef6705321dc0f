"""H2O as a KV policy."""
