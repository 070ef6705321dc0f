"""``docs/sampling.md`` names every field, with its default and who honours it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtllm_core import ModelRunner, Plugins, SamplingConfig
from trtllm_core.decoding.order import PRESETS
from trtllm_core.decoding.planner import CORE_FIELDS, SAMPLER_FIELDS
from trtllm_core.errors import ConfigError
from trtllm_core.testing.markov import MarkovExecutable

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "sampling.md").read_text(encoding="utf-8")
ROWS = {
    name: (default.strip("`"), who.strip())
    for name, default, who in re.findall(r"^\| `(\w+)` \| (\S+) \| (.*?)\| ", PAGE, re.MULTILINE)
}
FIELDS = SamplingConfig.model_fields


def test_every_field_is_named() -> None:
    fields = PAGE.split("\n## Fields\n")[1].split("\n## ")[0]
    assert [name for name in FIELDS if f"`{name}`" not in fields] == []


@pytest.mark.parametrize("name", ROWS)
def test_defaults_and_consumers_are_those_of_the_code(name: str) -> None:
    default, who = ROWS[name]
    assert default == str(FIELDS[name].default)
    plugins = Plugins.load()
    able = {
        entry.name
        for registry in (plugins.decoders, plugins.logits_processors)
        for entry in registry
        if name in entry.consumes
    }
    named = set(re.findall(r"`(\w+)`", who))
    assert named <= able
    if "the core" in who:
        assert name in CORE_FIELDS | SAMPLER_FIELDS
    assert who or not (able or name in CORE_FIELDS | SAMPLER_FIELDS), "somebody honours it by now"


@pytest.mark.parametrize("name", [name for name, (_, who) in ROWS.items() if not who])
def test_what_is_refused_so_far_is_refused(name: str) -> None:
    runner = ModelRunner.from_engine(MarkovExecutable())
    with pytest.raises(ConfigError, match=name):
        runner.generate([[1]], **{name: 1})


def test_presets_are_those_of_the_code() -> None:
    for number, preset in enumerate(PRESETS.values(), 1):
        line = next(line for line in PAGE.splitlines() if line.startswith("| order |"))
        words = line.split("|")[number + 1]
        places = [words.index(phase.value.removesuffix("y")) for phase in preset.phases]
        assert places == sorted(places)
        assert f"`{preset.sampler}`" in PAGE
