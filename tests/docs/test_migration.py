"""``docs/migration.md``: each row of its table of changes has a test. Its scripts are run by ``test_examples.py``."""

from __future__ import annotations

import re
from pathlib import Path

from trtllm_core.compat.tensorrt_llm import runtime

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")

TESTS = {
    "engines": "engine/test_load.py::of TensorRT-LLM",
    "words of later requests": "compat/test_scripts.py::a stop word of a later row matches",
    "unknown arguments": "compat/test_runtime.py::did you mean 'max_new_tokens'",
    "values that nothing honours": "docs/test_readme.py::test_what_is_not_in_this_version_is_refused",
    "results without a dictionary": "compat/test_runtime.py::no place for it; ask for return_dict=True",
    "streams": "test_generation.py::test_a_full_stream_has_lengths_and_log_probs_as_they_grow",
    "finished rows": "compat/test_classic.py::test_ids_hold_the_end_token_after_the_end_and_finished_rows_stay",
    "stopping criteria": "compat/test_scripts.py::test_stopping_criteria_end_the_batch",
    "errors in callbacks": "compat/test_runtime.py::test_what_a_callback_raises_reaches_the_caller",
    "draws": "compat/test_scripts.py::test_sampling_is_repeatable_without_a_seed",
    "`end_id`": "compat/test_runtime.py::test_ends",
    "hints of memory and speed": "compat/test_runtime.py::test_limits_hints_and_post_processors",
    "post-processors by name": "compat/test_classic.py::test_post_processors_are_chosen_by_name",
    "Medusa, EAGLE, lookahead": "compat/test_runtime.py::which has no EAGLE heads",
    "`Session.run`": "compat/test_runtime.py::test_a_session_takes_its_context_and_refuses_addresses",
    "layers of pipeline stages": "config/test_mapping.py::pp_layers(7)",
    "last block of a context": "kv_cache/test_manager.py::test_beams_share_full_context_blocks_only",
    "pools that run out": "kv_cache/test_manager.py::test_failing_step_changes_nothing",
    "devices": "compat/test_scripts.py::stays on the CPU",
}
"""For each row, the test that holds it: a file under ``tests`` and a text in it."""


def test_every_change_has_its_test() -> None:
    table = PAGE.split("\n## What changed, and why\n")[1].split("\n## ")[0]
    rows = [row for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) if row not in ("what", "---")]
    assert rows == list(TESTS)
    for place in TESTS.values():
        file, text = place.split("::")
        assert text in (ROOT / "tests" / file).read_text(encoding="utf-8"), place


def test_what_the_page_says_is_there_is_there() -> None:
    """All names of the list of ``tensorrt_llm.runtime``."""
    (item,) = re.findall(r"- `tensorrt_llm.runtime`: (.*?)\.\n", PAGE, re.DOTALL)
    named = re.findall(r"`(\w+)`", item)
    assert len(named) > 12
    assert set(named) <= set(runtime.__all__)
