"""Execution backends. Each is a package of its own that registers through the backend hook."""
