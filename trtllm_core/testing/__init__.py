"""What tests of trtllm-core and of its plugins share: ``pytest_plugins = ["trtllm_core.testing.plugin"]`` opts in."""
