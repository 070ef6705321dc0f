"""What a plugin declares, against what is offered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_core.errors import PluginLoadError, PluginVersionError
from trtllm_core.plugin import HOOK_VERSIONS, Source
from trtllm_core.plugin.versions import LOCAL, check_hook_api, check_requires, parse, suggest, wants_newer

DRY = Source("dry", "trtllm-plugin-dry", "0.3.0")


def test_parse() -> None:
    declared = parse(" logits_processor>=1.0,<2 ")
    assert declared.kind == "logits_processor"
    assert declared.text == "logits_processor>=1.0,<2"
    assert "1.4" in declared.versions
    assert "2.0" not in declared.versions


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "does not begin"), (">=1", "does not begin"), ("decoder", "no version range"), ("decoder one", "'one'")],
)
def test_parse_refuses(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)


@given(st.integers(1, 50), st.integers(0, 50))
def test_wants_newer_knows_which_side_to_upgrade(major: int, minor: int) -> None:
    offered = f"{major}.{minor}"
    assert wants_newer(parse(f"decoder>={major}.{minor + 1},<{major + 1}").versions, offered)
    assert wants_newer(parse(f"decoder=={major + 1}.*").versions, offered)
    assert wants_newer(parse(f"decoder>{offered}").versions, offered)
    assert not wants_newer(parse(f"decoder>=0.1,<{major}").versions, offered)


@pytest.mark.parametrize("kind", HOOK_VERSIONS)
def test_suggestion_is_accepted(kind: str) -> None:
    namespace: dict[str, object] = {}
    exec(suggest([kind]), namespace)
    check_hook_api(namespace["hook_api"], [kind], DRY)
    exec(suggest(HOOK_VERSIONS), namespace)
    check_hook_api(namespace["hook_api"], [kind], DRY)


def test_version_too_new_says_all() -> None:
    with pytest.raises(PluginVersionError) as caught:
        check_hook_api("logits_processor>=2.0,<3", ["logits_processor"], DRY, core="0.1.0")
    assert str(caught.value) == (
        "plugin 'dry' of trtllm-plugin-dry 0.3.0 implements logits_processor>=2.0,<3, but this trtllm-core 0.1.0 "
        "offers logits_processor 1.0. To mend it: pip install --upgrade trtllm-core"
    )


def test_version_too_old_upgrades_the_plugin() -> None:
    with pytest.raises(PluginVersionError, match=r"pip install --upgrade trtllm-plugin-dry$"):
        check_hook_api("decoder>=1.0,<2", ["decoder"], DRY, offered={"decoder": "2.1"})


def test_unknown_kind() -> None:
    with pytest.raises(
        PluginVersionError, match=r"did you mean 'decoder'\?. To mend it: pip install --upgrade trtllm-plu"
    ):
        check_hook_api("decoders>=1.0", ["decoder"], DRY)
    with pytest.raises(PluginVersionError, match="pip install --upgrade trtllm-core"):
        check_hook_api("quantum_thing>=1.0", ["decoder"], DRY)


@pytest.mark.parametrize("hook_api", [None, 1.0, ("decoder>=1.0", 2), "decoder", "backend>=1.0"])
def test_bad_declarations_say_which_line_to_add(hook_api: object) -> None:
    with pytest.raises(PluginLoadError) as caught:
        check_hook_api(hook_api, ["decoder"], DRY)
    assert 'add the line hook_api = "decoder>=1.1,<2"' in str(caught.value)


def test_local_plugin_is_not_to_be_installed() -> None:
    with pytest.raises(PluginLoadError) as caught:
        check_hook_api(None, ["decoder"], Source("mine", LOCAL, "0"))
    assert "pip" not in str(caught.value)
    assert "local" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "core", "complaint"),
    [
        ("trtllm-core>=0.1,<0.2", "0.1.0", None),
        ("TRTLLM_core>=0.1", "0.1.0.dev3+g1", "requires"),
        ("trtllm-core>=0.1.0.dev1", "0.1.0.dev3+g1", None),
        ("trtllm-core>=2", "0.1.0", "pip install 'trtllm-core>=2'"),
        ("trtllm-core<0.1", "0.1.0", "pip install --upgrade trtllm-plugin-dry"),
        ("trtllm-core>=2; extra == 'new'", "0.1.0", None),
        ("trtllm-core>=2; python_version < '3'", "0.1.0", None),
        ("torch>=99", "0.1.0", None),
        ("%%%", "0.1.0", None),
    ],
)
def test_requires(line: str, core: str, complaint: str | None) -> None:
    if complaint is None:
        check_requires(DRY, [line], core)
    else:
        with pytest.raises(PluginVersionError, match=complaint):
            check_requires(DRY, [line], core)
