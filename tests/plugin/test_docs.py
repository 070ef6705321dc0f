"""No hook without its docs, its test, its place in the lifecycle, and a docstring that follows the template.

The sections of ``docs/hooks.md`` between its two markers are the docstrings. Run this file to write them anew.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import trtllm_core.plugin
from trtllm_core.plugin import HOOK_KINDS, HOOK_VERSIONS, Plugins
from trtllm_core.plugin.specs import SPECS

ROOT = Path(__file__).parents[2]
HOOKS_MD = ROOT / "docs" / "hooks.md"
BEGIN, END = "<!-- hooks: begin -->", "<!-- hooks: end -->"
TEMPLATE = ("Called:", "Result:", "Tensors:", "Returns:", "Raises:", "Ordering:", ".. versionadded::", "Example::")
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def signature(hook: str) -> str:
    """``trtllm_on_step_end(stats: StepStats) -> None``, as an author writes it in a module."""
    found = inspect.signature(getattr(SPECS[HOOK_KINDS[hook]], hook))
    arguments = [parameter for name, parameter in found.parameters.items() if name != "self"]
    return f"{hook}{found.replace(parameters=arguments)}".replace("'", "")


def section(hook: str) -> str:
    """The section of one hook, in Markdown."""
    text, example = inspect.getdoc(getattr(SPECS[HOOK_KINDS[hook]], hook)).split("\nExample::\n")
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"^\.\. versionadded:: (\w+) (\S+)$", r"Since: `\1` \2.", text, flags=re.MULTILINE)
    text = re.sub(r"^([A-Z]\w+):", r"**\1:**", text, flags=re.MULTILINE)
    return (
        f"### {hook}\n\n```text\n{signature(hook)}\n```\n\nKind: `{HOOK_KINDS[hook]}`.\n\n{text.strip()}\n\n"
        f"```python\n{textwrap.dedent(example).strip()}\n```\n"
    )


def rendered() -> str:
    """All sections."""
    return "\n".join(section(hook) for hook in HOOK_KINDS)


@pytest.mark.parametrize("hook", HOOK_KINDS)
def test_docstring_follows_the_template(hook: str) -> None:
    doc = inspect.getdoc(getattr(SPECS[HOOK_KINDS[hook]], hook))
    places = [doc.find(f"\n{part}") for part in TEMPLATE]
    assert -1 not in places, f"{hook} lacks {TEMPLATE[places.index(-1)]!r}"
    assert places == sorted(places), f"{hook} has its parts in another order than {TEMPLATE}"
    added = re.search(r"^\.\. versionadded:: (\w+) (\d+)\.(\d+)$", doc, re.MULTILINE)
    assert added is not None
    assert added[1] == HOOK_KINDS[hook]
    assert (int(added[2]), int(added[3])) <= tuple(map(int, HOOK_VERSIONS[added[1]].split(".")))


def test_every_kind_has_a_version_and_a_spec() -> None:
    assert set(SPECS) == set(HOOK_VERSIONS) == set(HOOK_KINDS.values())


@pytest.mark.parametrize("hook", HOOK_KINDS)
def test_hook_has_docs_with_its_signature(hook: str) -> None:
    text = HOOKS_MD.read_text(encoding="utf-8")
    assert f"\n### {hook}\n\n```text\n{signature(hook)}\n```\n" in text


def test_docs_are_the_docstrings() -> None:
    text = HOOKS_MD.read_text(encoding="utf-8")
    inside = text.split(BEGIN)[1].split(END)[0].strip()
    assert inside == rendered().strip(), f"docs/hooks.md is stale: run python {Path(__file__).relative_to(ROOT)}"


@pytest.mark.parametrize("hook", HOOK_KINDS)
def test_hook_has_a_test(hook: str) -> None:
    tests = (Path(__file__).parent / "test_hooks.py").read_text(encoding="utf-8")
    assert f"\ndef test_{hook}(" in tests


@pytest.mark.parametrize("hook", HOOK_KINDS)
def test_hook_has_a_place_in_the_lifecycle(hook: str) -> None:
    assert f"`{hook}`" in (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", HOOK_VERSIONS)
def test_docs_name_the_version_of_each_kind(kind: str) -> None:
    assert re.search(rf"^\| `{kind}` \| {HOOK_VERSIONS[kind]} \|", HOOKS_MD.read_text(encoding="utf-8"), re.MULTILINE)


def test_docs_name_what_authors_import() -> None:
    """Every public name is in the docs, so that none is found by reading the source alone."""
    text = HOOKS_MD.read_text(encoding="utf-8")
    missing = [name for name in trtllm_core.plugin.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_links_lead_somewhere() -> None:
    text = HOOKS_MD.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (HOOKS_MD.parent / target).exists(), target


def test_examples_of_the_page_load(module) -> None:
    """The page's own Python blocks; those of the docstrings are run in ``test_hooks.py``."""
    text = HOOKS_MD.read_text(encoding="utf-8")
    blocks = CODE.findall(text.split(BEGIN)[0] + text.split(END)[1])
    assert blocks
    made = module("\n".join(blocks), "page")
    plugins = Plugins.load(entry_points=(), extra=[made])
    assert plugins.logits_processors.get("dry").consumes == {}


def test_example_of_the_package_loads(module) -> None:
    doc = trtllm_core.plugin.__doc__
    example = doc.split(".. code-block:: python\n")[1].split("\nIts ``pyproject.toml``")[0]
    assert len(textwrap.dedent(example).strip().splitlines()) <= 20
    plugins = Plugins.load(entry_points=(), extra=[module(example)])
    assert "never_zero" in plugins.logits_processors


if __name__ == "__main__":
    page = HOOKS_MD.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    HOOKS_MD.write_text(f"{before}{BEGIN}\n\n{rendered()}\n{END}{after}", encoding="utf-8")
