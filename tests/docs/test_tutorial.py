"""The tutorial's code is the package's, word for word, and shows all that a reader must write."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "contrib" / "trtllm-contrib-gemma2"
TUTORIAL = (ROOT / "docs" / "tutorial-family.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def test_code_is_quoted_from_the_package() -> None:
    strange = [block for block in BLOCKS if not any(block in source for source in SOURCES.values())]
    assert strange == []


def test_nothing_but_imports_and_a_few_lines_is_left_out() -> None:
    """Every line of the module's classes is shown, and of the family all that is not said in words."""
    shown = "".join(BLOCKS)
    for name in ("plugin.py", "test_gemma2.py"):
        assert SOURCES[name] in shown
    left = SOURCES["module.py"].split("class Extras")[1].splitlines()
    assert [line for line in left[1:] if line.strip() and line not in shown] == []


def test_the_package_is_as_short_as_the_page_says() -> None:
    (most,) = re.findall(r"fewer than (\d+) lines", TUTORIAL)
    source = [path.read_text(encoding="utf-8") for path in (PACKAGE / "src").rglob("*.py")]
    assert sum(len(text.splitlines()) for text in source) < int(most)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TUTORIAL):
        assert (ROOT / "docs" / target).exists(), target
