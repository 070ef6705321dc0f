"""``Plugins``: order, clashes, replacement and atomicity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from trtllm_core.errors import ConfigError, PluginConflictError, PluginError, PluginLoadError, PluginNotFoundError
from trtllm_core.plugin import Plugins, StepStats, hookimpl

STEP = StepStats(step=1, rows=2, context_tokens=0, generation_tokens=2, kv_blocks_free=3, seconds=0.1)
MakeModule = Callable[..., ModuleType]


class Registers:
    """A plugin that registers decoders."""

    hook_api = ("decoder>=1.0,<2", "backend>=1.0,<2")

    def __init__(self, *names: str, **options: str) -> None:
        self.names = names
        self.options = options
        self.calls = 0

    @hookimpl
    def trtllm_register_decoders(self, registrar) -> None:
        self.calls += 1
        for name in self.names:
            registrar.add(name, dict, **self.options)


def names(plugins: Plugins) -> list[str]:
    """Decoders in the order of registration."""
    return [entry.name for entry in plugins.decoders]


def test_empty() -> None:
    plugins = Plugins()
    assert plugins.report() == ()
    assert not plugins.observes_steps
    plugins.on_step_end(STEP)
    with pytest.raises(PluginNotFoundError):
        plugins.decoders.get("greedy")


def test_managers_share_nothing(site) -> None:
    plugin = Registers("a")
    first, second = site.load(extra=[plugin]), site.load()
    assert "a" in first.decoders
    assert "a" not in second.decoders


def test_order_is_core_then_distributions_then_extra(site) -> None:
    for dist, name in [("zebra", "z"), ("trtllm-core", "c"), ("apple", "a")]:
        site.decoder(dist, name)
    assert names(site.load(extra=[Registers("x"), Registers("y")])) == ["c", "a", "z", "x", "y"]


def test_tryfirst_and_trylast_move_a_plugin(site, module: MakeModule) -> None:
    source = """
    from trtllm_core.plugin import hookimpl
    hook_api = "decoder>=1.0,<2"
    @hookimpl({how}=True)
    def trtllm_register_decoders(registrar): registrar.add("{how}", dict)
    """
    first, last = (module(source.format(how=how), how) for how in ("tryfirst", "trylast"))
    assert names(site.load(extra=[last, Registers("a"), first, Registers("b")])) == ["tryfirst", "a", "b", "trylast"]


def test_wrapper_is_called_around_each_plugin(site) -> None:
    seen = []

    class Wraps:
        hook_api = "decoder>=1.0,<2"

        @hookimpl(wrapper=True)
        def trtllm_register_decoders(self, registrar) -> Iterator[None]:
            seen.append("in")
            result = yield
            seen.append("out")
            return result

    plugins = site.load(extra=[Registers("a"), Wraps(), Registers("b")])
    assert seen == ["in", "out", "in", "out"]
    assert [str(entry.source.plugin) for entry in plugins.decoders] == ["Registers", "Registers#2"]


def test_hooks_are_called_once_even_when_others_fail(site) -> None:
    site.decoder("first", "a")
    site.decoder("second", "a")
    site.install("third", RAISES)
    plugin = Registers("b")
    plugins = site.load(extra=[plugin])
    assert plugin.calls == 1
    assert [report.status for report in plugins.report()] == ["loaded", "failed", "failed", "loaded"]


RAISES = """
from trtllm_core.plugin import hookimpl
hook_api = ("decoder>=1.0,<2", "backend>=1.0,<2", "observer>=1.0,<2")
@hookimpl
def trtllm_register_decoders(registrar): registrar.add("early", dict, replace="greedy")
@hookimpl
def trtllm_register_backends(registrar):
    registrar.add("late", dict)
    raise ValueError("half way")
@hookimpl
def trtllm_on_step_end(stats): raise AssertionError("a refused plugin observes nothing")
"""


def test_a_plugin_that_fails_half_way_leaves_nothing(site) -> None:
    site.decoder("trtllm-core", "greedy")
    site.install("half", RAISES, plugin="half")
    plugins = site.load()
    assert names(plugins) == ["greedy"]
    assert list(plugins.backends) == []
    assert not plugins.observes_steps
    report = plugins.report()[1]
    assert report.status == "failed"
    assert "failed in trtllm_register_backends: ValueError: half way" in report.why
    assert report.hooks == ("trtllm_on_step_end", "trtllm_register_backends", "trtllm_register_decoders")
    with pytest.raises(PluginLoadError, match="half way") as caught:
        site.load(require=["half"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_clash_refuses_the_second_and_names_both(site) -> None:
    site.decoder("one", "greedy")
    site.decoder("two", "greedy")
    plugins = site.load()
    assert plugins.decoders.get("greedy").source.distribution == "one"
    assert plugins.report()[1].why == (
        "decoder 'greedy' is registered by both one 0.3.0 (one) and two 0.3.0 (two); disable one of them, "
        "let one say replace='greedy', or choose with Plugins.load(replace={'decoder:greedy': 'two'})"
    )
    with pytest.raises(PluginConflictError, match=r"one 0\.3\.0 .* two 0\.3\.0"):
        site.load(require=["two"])


def test_clash_takes_everything_of_the_second_back(site) -> None:
    site.decoder("one", "greedy")
    site.decoder("three", "own")
    site.install("two", RAISES.replace('raise ValueError("half way")', "").replace('"early"', '"own"'))
    plugins = site.load()
    assert [report.status for report in plugins.report()] == ["loaded", "loaded", "failed"]
    assert names(plugins) == ["greedy", "own"]
    assert list(plugins.backends) == []


@pytest.mark.parametrize("order", [1, -1])
def test_replace_by_a_plugin_whatever_the_order(site, order: int) -> None:
    extra = [Registers("greedy", "other"), Registers("greedy", replace="greedy")][::order]
    plugins = site.load(extra=extra)
    assert sorted(names(plugins)) == ["greedy", "other"]
    assert plugins.decoders.get("greedy").source.plugin == ("Registers#2" if order == 1 else "Registers")


def test_a_replacement_takes_the_place_of_what_it_replaces(site) -> None:
    extra = [Registers("a", "b", "c"), Registers("b2", replace="b"), Registers("d")]
    assert names(site.load(extra=extra)) == ["a", "b2", "c", "d"]


def test_replace_may_name_an_alias(site, module: MakeModule) -> None:
    source = """
    from trtllm_core.plugin import hookimpl
    hook_api = "model_family>=1.0,<2"
    @hookimpl
    def trtllm_register_model_families(registrar):
        registrar.add({0!r}, dict, architectures=("LlamaForCausalLM",), replace={1!r})
    """
    extra = [module(source.format("a", None), "a"), module(source.format("b", "LlamaForCausalLM"), "b")]
    families = site.load(extra=extra).model_families
    assert [entry.name for entry in families] == ["b"]
    assert families.get("LlamaForCausalLM").name == "b"


def test_two_replacements_clash(site) -> None:
    with pytest.raises(PluginConflictError, match="'greedy' is replaced by both local 0"):
        site.load(extra=[Registers("greedy"), Registers("a", replace="greedy"), Registers("b", replace="greedy")])


def test_user_chooses_who_gets_a_name(site) -> None:
    for dist in ("one", "two"):
        site.decoder(dist, "greedy")
    site.install("three", RAISES.replace('raise ValueError("half way")', ""))
    plugins = site.load(replace={"decoder:greedy": "two"})
    assert plugins.decoders.get("greedy").source.distribution == "two"
    assert names(plugins) == ["early", "greedy"]
    assert {report.status for report in plugins.report()} == {"loaded"}


def test_user_chooses_an_alias(site, module: MakeModule) -> None:
    source = """
    from trtllm_core.plugin import hookimpl
    hook_api = "model_family>=1.0,<2"
    @hookimpl
    def trtllm_register_model_families(registrar):
        registrar.add("{name}", dict, architectures=("LlamaForCausalLM", "gguf:llama", "{name}Only"))
    """
    extra = [module(source.format(name=name), name) for name in ("a", "b")]
    choice = {"model_family:LlamaForCausalLM": "b", "model_family:gguf:llama": "a"}
    families = site.load(extra=extra, replace=choice).model_families
    assert families.get("LlamaForCausalLM").name == "b"
    assert families.get("gguf:llama").name == "a"
    assert families.get("aOnly").name == "a"
    with pytest.raises(PluginConflictError):
        site.load(extra=extra)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"greedy": "one"}, "write '<kind>:<name>'"),
        ({"decoders:greedy": "one"}, "with a kind of 'backend', 'decoder'"),
        ({"decoder:greedy": "nobody"}, r"'nobody' registers no decoder 'greedy' \(those who do: 'one'\)"),
    ],
)
def test_choices_that_choose_nothing_are_errors(site, choice: dict[str, str], complaint: str) -> None:
    site.decoder("one", "greedy")
    with pytest.raises(ConfigError, match=complaint):
        site.load(replace=choice)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ('registrar.add("", dict)', "must not be empty"),
        ('registrar.add("x", "package.module")', "give a callable or 'package.module:name'"),
        ('registrar.add("x", 5)', "give a callable"),
        ('registrar.add("x", dict, consumes=["top_kk"])', "did you mean 'top_k'"),
        ("registrar.ad()", "AttributeError"),
    ],
)
def test_registrar_checks_what_it_is_given(site, module: MakeModule, call: str, complaint: str) -> None:
    source = f"""
    from trtllm_core.plugin import hookimpl
    hook_api = "decoder>=1.0,<2"
    @hookimpl
    def trtllm_register_decoders(registrar): {call}
    """
    with pytest.raises(PluginLoadError, match=complaint):
        site.load(extra=[module(source)])


def test_registering_after_the_hook_is_an_error(site) -> None:
    kept = []

    class Late(Registers):
        @hookimpl
        def trtllm_register_decoders(self, registrar) -> None:
            kept.append(registrar)

    site.load(extra=[Late()])
    with pytest.raises(PluginError, match="after its hook has returned"):
        kept[0].add("late", dict)


def test_factories_load_when_they_are_needed(site, module: MakeModule) -> None:
    source = """
    from trtllm_core.plugin import hookimpl
    hook_api = "decoder>=1.0,<2"
    @hookimpl
    def trtllm_register_decoders(registrar):
        registrar.add("good", "collections:OrderedDict")
        registrar.add("bad", "no_such_package.there:Thing")
    """
    decoders = site.load(extra=[module(source)]).decoders
    assert decoders.get("good").load()() == {}
    with pytest.raises(PluginLoadError, match=r"'bad' of local 0 \(mine\) could not be loaded"):
        decoders.get("bad").load()
