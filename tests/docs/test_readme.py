"""What the pages say exists: quoted code, links, commands with their options, files, functions, hooks and errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import trtllm_core.plugin
from trtllm_core import ModelRunner, SamplingConfig, errors, use
from trtllm_core.cli.app import app
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import HOOK_KINDS, HOOK_VERSIONS, OutOfBlocksError, Plugins
from trtllm_core.testing.markov import MarkovExecutable

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = (
    "README.md",
    "docs/lifecycle.md",
    "docs/kv-cache.md",
    "docs/cuda.md",
    "docs/numbers.md",
    "docs/quantization.md",
    "docs/sampling.md",
    "docs/stopping.md",
    "docs/migration.md",
    "docs/plugin-authors.md",
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)]+)\)")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def section(name: str, title: str) -> str:
    """The text under a heading of the second level."""
    return page(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_python_is_quoted_from_tested_files(name: str) -> None:
    """Each block is one of ``docs/examples`` to its end, word for word; ``test_examples.py`` runs those."""
    sources = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")]
    for block in blocks(name, "python"):
        # Of a script, the docstring may be left out: it says what the page says around the block.
        assert any(block in (source, source.split('"""\n\n', 1)[1]) for source in sources), block


def test_readme_quotes_what_it_must() -> None:
    quoted = "".join(blocks("README.md", "python"))
    for name in ("quickstart", "top_a", "try_top_a"):
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert source.split('"""\n\n', 1)[1] in quoted


def test_the_plugin_has_the_lines_that_the_heading_says() -> None:
    title = re.search(r"^## A plugin in (\d+) lines$", page("README.md"), re.MULTILINE)
    assert title is not None
    lines = (EXAMPLES / "top_a.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= int(title[1])


def test_the_plugin_loads_as_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the README's ``pyproject.toml``: its entry point finds the module, its requirement fits this core."""
    (text,) = blocks("README.md", "toml")
    made = tomllib.loads(text)
    project = made["project"]
    for file in made["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        (tmp_path / file).write_text((EXAMPLES / file).read_text(encoding="utf-8"), encoding="utf-8")
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    requires = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    ((group, points),) = project["entry-points"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "top_a", raising=False)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    installed = [*importlib.metadata.entry_points(group=group), *found.entry_points.select(group=group)]
    plugins = Plugins.load(entry_points=installed, require=[project["name"]])
    entry = plugins.logits_processors.get("top_a")
    assert (entry.source.distribution, entry.source.version) == (project["name"], project["version"])

    runner = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)
    free = SamplingConfig(top_k=0, top_p=1.0, random_seed=1, max_new_tokens=50, end_id=())
    cut = free.replace(logits_processors=use("top_a", a=1.0))
    ids = runner.generate([[3], [3]], [free, cut])[:, 0].tolist()
    assert ids[0] != ids[1]
    chances = runner.session.engine.table.softmax(-1)
    likely = [bool(chances[a, b] >= chances[a].max() ** 2) for a, b in zip(ids[1], ids[1][1:], strict=False)]
    assert all(likely)


# -- commands --------------------------------------------------------------------------------------------------------


def test_the_first_lines_are_two_commands() -> None:
    first = page("README.md").splitlines()[:4]
    assert [line.split("#")[0].strip() for line in first[1:3]] == ["make demo", "make test"]


def shell_lines() -> list[tuple[str, str]]:
    return [(name, line) for name in PAGES for block in blocks(name, "(?:sh)?") for line in block.splitlines() if line]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for name in PAGES for target in re.findall(r"(?:`|^)make (\w+)", page(name), re.MULTILINE)}
    assert named
    assert named <= targets


@pytest.mark.parametrize(("name", "line"), [pair for pair in shell_lines() if pair[1].startswith("trtllm-core")])
def test_commands_parse(name: str, line: str) -> None:
    """The command is there and takes these arguments and options; nothing is run."""
    group: Any = typer.main.get_command(app)
    _, command, *arguments = shlex.split(line)
    assert command in group.commands
    group.commands[command].make_context(command, arguments)


def test_the_commands_table_is_complete() -> None:
    group: Any = typer.main.get_command(app)
    named = re.findall(r"^\| `trtllm-core ([\w-]+)` \|", section("README.md", "Commands"), re.MULTILINE)
    assert sorted(named) == sorted(group.commands)


def test_numbers_names_the_commands_that_make_bench_runs() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    bench = re.search(r"(trtllm-core bench .*)", text.split("\nbench:")[1])
    assert bench is not None
    line = bench[1]
    for name, value in re.findall(r"^([A-Z]+) [?:]?= *(\S+)$", text, re.MULTILINE):
        line = line.replace(f"$({name})", value)
    assert f"\n{line}\n" in page("docs/numbers.md")


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    links = LINK.findall(page(name))
    for text, target in links:
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve()
        assert file.exists(), f"{text} leads to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def linked_names() -> list[tuple[str, str]]:
    """``[`StepLoop.step`](../trtllm_core/loop.py)`` in the lifecycle: a name and the file that has it."""
    pairs = [(text.strip("`"), path) for text, path in LINK.findall(page("docs/lifecycle.md")) if text.startswith("`")]
    return sorted(set(pairs))


def test_the_lifecycle_names_functions() -> None:
    assert len(linked_names()) > 40


@pytest.mark.parametrize(("name", "path"), linked_names())
def test_functions_of_the_lifecycle_exist(name: str, path: str) -> None:
    """The file defines the class or function itself: a name that moved is noticed."""
    module = ".".join(Path(path.removeprefix("../")).with_suffix("").parts)
    thing: Any = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    assert inspect.isclass(thing) or callable(thing)
    assert thing.__module__ == module


def test_hook_table_is_that_of_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (.+?) \| (.*?) ?\|$", section("README.md", "Kinds of hooks"), re.MULTILINE
    )
    assert {kind: version for kind, version, _, _ in rows} == HOOK_VERSIONS
    assert {hook: kind for kind, _, hooks, _ in rows for hook in re.findall(r"`(\w+)`", hooks)} == HOOK_KINDS
    for *_, bases in rows:
        for base in re.findall(r"`(\w+)`", bases):
            assert inspect.isclass(getattr(trtllm_core.plugin, base))


def test_the_house_is_the_one_that_the_linter_knows() -> None:
    """Each floor of the import contract is in the list, from the top down."""
    text = section("README.md", "The house")
    contract = tomllib.loads(page("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    floors = [[part.strip().removeprefix("trtllm_core.") for part in layer.split(":")] for layer in contract["layers"]]
    places = []
    for floor in floors:
        found = [text.find(f"](trtllm_core/{name}{end})") for name in floor for end in ("", ".py")]
        places.append(max(found))  # one name stands for its floor: not every small module has a line
    assert -1 not in places
    assert places == sorted(places)


def error_tree(cls: type, depth: int = 0) -> list[tuple[int, str]]:
    below = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("trtllm_core.")]
    return [(depth, cls.__name__), *(line for sub in below for line in error_tree(sub, depth + 1))]


def test_error_tree_is_that_of_the_code() -> None:

    assert issubclass(OutOfBlocksError, errors.CapacityError)
    (tree,) = re.findall(r"^```text\n(.*?)^```$", section("docs/lifecycle.md", "Errors"), re.MULTILINE | re.DOTALL)
    lines = [((len(line) - len(line.lstrip())) // 2, line.split()[0]) for line in tree.splitlines()]
    parents: dict[str, str] = {}
    path: list[str] = []
    for depth, name in lines:
        path = [*path[:depth], name]
        parents[name] = path[-2] if depth else ""
    wanted: dict[str, str] = {}
    for depth, name in error_tree(errors.TrtllmCoreError):
        path = [*path[:depth], name]
        wanted[name] = path[-2] if depth else ""
    assert parents == wanted


# -- honesty ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_without_its_command(name: str) -> None:
    """Rates and sizes are for ``docs/numbers.md``, in a table that names command and machine."""
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    found = re.findall(r"\d[\d.,]*\s?(?:tokens/s|tok/s|GB/s|GiB|MiB|ms|µs|x faster|times (?:as|faster))", text)
    if name == "docs/numbers.md":
        filled = re.findall(r"^\| (?:command|machine[^|]*|date[^|]*) \| *(\S.*?)? *\|$", text, re.MULTILINE)
        assert all(filled) or not any(filled), "figures need command, machine and date, all of them"
    else:
        assert found == []


@pytest.mark.parametrize(
    "field",
    [
        {"decoder": "medusa"},
    ],
)
def test_what_is_not_in_this_version_is_refused(field: dict[str, Any]) -> None:
    runner = ModelRunner.from_engine(MarkovExecutable())
    with pytest.raises((ConfigError, LookupError)):
        runner.generate([[1]], **field)


def test_what_is_said_to_be_absent_is_absent() -> None:
    """When one of them comes, the list in the README has to change."""
    absent = section("README.md", "What is there").split("**Not in this version:**")[1]
    plugins = Plugins.load()
    backends = {entry.name for entry in plugins.backends}
    families = {entry.name for entry in plugins.model_families}
    for word, here in (("TensorRT", "tensorrt" in backends), ("ONNX", "onnxruntime" in backends)):
        assert (word in absent) is not here
    for word, name in (("GPT", "gpt"), ("BLOOM", "bloom")):
        assert (word in absent) is not (name in families)
    assert ("in-flight batching" in absent) is not (ROOT / "trtllm_core" / "executor").exists()
    assert ("import paths" in absent) is not (ROOT / "trtllm_core" / "compat" / "tensorrt_llm").exists()
