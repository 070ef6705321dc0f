"""All of a plugin's test file: the checks come from the kit."""

import top_a

from trtllm_core.testing import LogitsProcessorConformance


class TestTopA(LogitsProcessorConformance):
    plugin = top_a
    params = ({}, {"a": 1.0})
    wrong_params = ({"a": 0}, {"b": 1.0})
