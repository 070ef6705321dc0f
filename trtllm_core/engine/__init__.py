"""Engines: building them, their directory on disk, and loading them."""
