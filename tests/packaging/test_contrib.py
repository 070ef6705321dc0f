"""Packages under ``contrib`` are what an outsider could have written: short, and with public names alone."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_core.testing import run_kit
from trtllm_core.testing.examine import PackageConformance

ROOT = Path(__file__).parents[2]
PACKAGES = [file.parent for file in sorted(ROOT.glob("contrib/*/pyproject.toml"))]
LIMITS = {"trtllm-contrib-gemma2": 200}
"""Most lines of code of a package, where it is a model family; others have 150."""
PUBLIC = (
    "trtllm_core",
    "trtllm_core.config",
    "trtllm_core.device",
    "trtllm_core.errors",
    "trtllm_core.kv_cache",
    "trtllm_core.plugin",
)
FAMILIES = ("trtllm_core.nn", "trtllm_core.parallel", "trtllm_core.checkpoint")
"""What families may import beside."""
each = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)


def sources(package: Path, place: str) -> list[Path]:
    return sorted((package / place).rglob("*.py"))


def lines_of_code(path: Path) -> int:
    """Lines that are neither empty nor a comment. Docstrings count: they are what makes code readable."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file imports from the core."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trtllm_core":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "trtllm_core")


def private(module: str, name: str) -> bool:
    return any(part.startswith("_") for part in (*module.split("."), name) if not part.startswith("__"))


@each
def test_it_is_short(package: Path) -> None:
    total = sum(lines_of_code(path) for path in sources(package, "src"))
    assert 0 < total <= LIMITS.get(package.name, 150)


@each
def test_it_imports_no_private_name(package: Path) -> None:
    found = {each for place in ("src", "tests") for path in sources(package, place) for each in imports(path)}
    assert found
    assert [each for each in found if private(*each)] == []


@each
def test_it_imports_what_is_documented_for_authors(package: Path) -> None:
    allowed = (*PUBLIC, *FAMILIES) if package.name in LIMITS else PUBLIC
    found = {module for path in sources(package, "src") for module, _ in imports(path)}
    inside = {module for module in found for ok in allowed[1:] if f"{module}.".startswith(f"{ok}.")}
    assert found - inside - {"trtllm_core"} == set()


@each
def test_it_touches_no_private_attribute_of_the_core(package: Path) -> None:
    """Private attributes are those of the package's own objects."""
    for path in sources(package, "src"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                known = node.attr in ("_replace", "_asdict")  # of every named tuple
                assert own or known, f"{path.name}:{node.lineno} touches {node.attr}"


@each
def test_it_is_a_package_of_its_own(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == package.name
    assert project["entry-points"]["trtllm_core"]
    assert any(line.startswith("trtllm-core>=0.1,<") for line in project["dependencies"])
    readme = (package / "README.md").read_text(encoding="utf-8")
    assert f"pip install trtllm-core {package.name}" in readme
    assert "Apache License" in (package / "LICENSE").read_text(encoding="utf-8")


@each
def test_what_holds_for_every_package(package: Path) -> None:
    """Listing plugins imports no torch through it, and its metadata say which core it fits."""
    kit = type("Package", (PackageConformance,), {"plugin": package.name})
    assert [result for result in run_kit(kit) if result.status != "passed"] == []


@each
def test_its_tests_go_through_a_kit(package: Path) -> None:
    bases = {
        base.id
        for path in sources(package, "tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    assert [base for base in bases if base.endswith("Conformance")]
