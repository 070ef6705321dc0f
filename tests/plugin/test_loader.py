"""From the list of entry points to what may register: filters, requirements, imports, checks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

import trtllm_core.plugin
from trtllm_core.errors import ConfigError, PluginLoadError, PluginVersionError
from trtllm_core.plugin import PluginReport, Plugins, hookimpl


def only(plugins: Plugins) -> PluginReport:
    """The one report that there is."""
    (report,) = plugins.report()
    return report


def test_loads_an_installed_plugin(site) -> None:
    site.decoder("trtllm-plugin-mine", "mine", plugin="mine")
    plugins = site.load()
    assert only(plugins) == PluginReport("mine", "trtllm-plugin-mine", "0.3.0", ("trtllm_register_decoders",), "loaded")
    assert str(plugins.decoders.get("mine").source) == "trtllm-plugin-mine 0.3.0 (mine)"


def test_finds_what_is_on_the_path_by_itself(site) -> None:
    site.decoder("trtllm-plugin-onpath", "onpath")
    assert "onpath" in Plugins.load(allow=["trtllm-plugin-onpath"]).decoders


@pytest.mark.parametrize("name", ["short", "trtllm-plugin-long", "TRTLLM_Plugin.long"])
def test_deny_and_allow_come_before_import(site, name: str) -> None:
    denied = site.decoder("trtllm-plugin-long", "a", plugin="short")
    plugins = site.load(deny=[name])
    assert denied not in sys.modules
    assert (only(plugins).status, only(plugins).why) == ("disabled", "it is on the deny list")
    other = site.decoder("trtllm-plugin-other", "b")
    plugins = site.load(allow=[name])
    assert "a" in plugins.decoders
    assert "b" not in plugins.decoders
    assert other not in sys.modules


def test_allow_list_keeps_the_cores_own(site) -> None:
    site.decoder("trtllm-core", "built-in")
    assert "built-in" in site.load(allow=[]).decoders
    assert "built-in" not in site.load(deny=["trtllm-core"]).decoders


def test_a_string_is_no_list_of_names(site) -> None:
    with pytest.raises(ConfigError, match=r"deny='x': give a sequence of names, such as \['x'\]"):
        site.load(deny="x")


def test_requirement_is_checked_before_import(site) -> None:
    module = site.decoder("trtllm-plugin-new", "x", plugin="new", requires=("numpy", "trtllm-core>=2"))
    assert only(site.load()).why == (
        "plugin 'new' of trtllm-plugin-new 0.3.0 requires trtllm-core>=2, but this is trtllm-core 0.1.0. "
        "To mend it: pip install 'trtllm-core>=2'"
    )
    assert module not in sys.modules
    with pytest.raises(PluginVersionError):
        site.load(require=["new"])


def test_prerelease_of_the_core_satisfies(site) -> None:
    site.decoder("trtllm-plugin-new", "x", requires=("trtllm-core>=0.1",))
    assert only(site.load(version="0.2.0rc1")).status == "loaded"


@pytest.mark.parametrize("source", ["import no_such_module_at_all", "raise SystemExit(3)", "def broken(:"])
def test_broken_import_is_recorded_or_raised(site, source: str) -> None:
    site.install("trtllm-plugin-bad", source, plugin="bad")
    site.decoder("trtllm-plugin-good", "good")
    plugins = site.load()
    assert "good" in plugins.decoders
    report = plugins.report()[0]
    assert report.status == "failed"
    assert report.hooks == ()
    with pytest.raises(PluginLoadError) as caught:
        site.load(require=["trtllm-plugin-bad"])
    assert str(caught.value) == report.why
    assert caught.value.__cause__ is not None
    for part in ("'bad' of trtllm-plugin-bad 0.3.0", "Error" if "Exit" not in source else "SystemExit: 3"):
        assert part in report.why
    assert report.why.endswith("pip install --upgrade --force-reinstall trtllm-plugin-bad")


def test_required_but_not_installed(site) -> None:
    site.decoder("trtllm-plugin-here", "here", plugin="here")
    with pytest.raises(PluginLoadError, match=r"'llama' is not installed \(installed: 'here'\); pip install trtllm-pl"):
        site.load(require=["llama"])
    with pytest.raises(PluginLoadError, match=r"pip install trtllm-plugin-llama$"):
        site.load(require=["trtllm-plugin-llama"])


def test_required_but_denied(site) -> None:
    site.decoder("trtllm-plugin-here", "here", plugin="here")
    with pytest.raises(ConfigError, match="is required, but it is on the deny list"):
        site.load(require=["here"], deny=["trtllm-plugin-here"])


def test_entry_point_may_name_an_instance(site) -> None:
    source = """
    from trtllm_core.plugin import hookimpl
    class Plugin:
        hook_api = ["decoder>=1.0,<2"]
        @hookimpl
        def trtllm_register_decoders(self, registrar):
            registrar.add("mine", dict)
    plugin = Plugin()
    """
    site.install("with-instance", source, attribute="plugin")
    assert "mine" in site.load().decoders
    site.install("with-class", source, attribute="Plugin")
    why = site.load().report()[0].why
    assert "is the class Plugin; name an instance instead: plugin = Plugin()" in why


BAD = {
    "does not say which hook versions": "{mark}\ndef trtllm_register_decoders(registrar): ...",
    'which hook_api does not declare; add the line hook_api = "decoder': """
        hook_api = "backend>=1.0"
        @hookimpl
        def trtllm_register_decoders(registrar): ...""",
    "offers decoder 1.1. To mend it: pip install --upgrade trtllm-core": """
        hook_api = "decoder>=1.7"
        @hookimpl
        def trtllm_register_decoders(registrar): ...""",
    "gives argument 'registrar' of trtllm_register_decoders a default": """
        @hookimpl
        def trtllm_register_decoders(registrar=None): ...""",
    "declares '**rest' in trtllm_register_decoders": """
        @hookimpl
        def trtllm_register_decoders(registrar, **rest): ...""",
    "as a coroutine; hooks are called synchronously": """
        @hookimpl
        async def trtllm_on_step_end(stats): ...""",
    "as a generator; remove the yield": """
        @hookimpl
        def trtllm_register_decoders(registrar): yield""",
    "'trtllm_register_decoder', which is no hook of this trtllm-core; did you mean 'trtllm_register_decoders'?": """
        @hookimpl
        def trtllm_register_decoder(registrar): ...""",
    "trtllm_register_decoders without a marker; decorate it with @trtllm_core.plugin.hookimpl": """
        def trtllm_register_decoders(registrar): ...""",
    "implements trtllm_on_step_end more than once": """
        @hookimpl
        def trtllm_on_step_end(stats): ...
        @hookimpl(specname="trtllm_on_step_end")
        def again(stats): ...""",
    "implements no hook; decorate": "x = 1",
    "does not fit its hooks": """
        hook_api = "decoder>=1.0"
        @hookimpl
        def trtllm_register_decoders(registrar, other): ...""",
}


@pytest.mark.parametrize("complaint", BAD)
def test_malformed_plugins_are_refused_alone(site, complaint: str) -> None:
    source = textwrap.dedent(BAD[complaint].replace("{mark}", "@hookimpl"))
    site.install("bad", "from trtllm_core.plugin import hookimpl\n" + source)
    site.decoder("good", "good")
    plugins = site.load()
    bad, good = plugins.report()
    assert good.status == "loaded"
    assert bad.status == "failed"
    assert complaint in bad.why
    assert bad.why.startswith("plugin 'bad' of bad 0.3.0 ")
    assert [entry.name for entry in plugins.decoders] == ["good"]
    with pytest.raises(PluginLoadError):
        site.load(require=["bad"])


def test_optional_hook_of_another_core_is_ignored(site) -> None:
    source = """
    @hookimpl(optionalhook=True)
    def trtllm_on_something_new(stats): ...
    """
    site.install("both", DECODER_AND + textwrap.dedent(source))
    assert only(site.load()).hooks == ("trtllm_register_decoders",)


DECODER_AND = """
from trtllm_core.plugin import hookimpl
hook_api = "decoder>=1.0,<2"
@hookimpl
def trtllm_register_decoders(registrar): registrar.add("mine", dict)
"""


@dataclass
class Unhashable:
    """pluggy keeps plugins in sets."""

    hook_api = "observer>=1.0"

    @hookimpl
    def trtllm_on_step_end(self, stats: object) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        (Unhashable(), "cannot be hashed"),
        (Unhashable, "is the class Unhashable"),
        (len, "implements no hook"),
        (test_a_string_is_no_list_of_names, "is the function"),
        (None, "implements no hook"),
    ],
)
def test_extra_of_a_wrong_sort(site, plugin: object, complaint: str) -> None:
    with pytest.raises(PluginLoadError, match=complaint):
        site.load(extra=[plugin])


def test_attribute_that_raises(site) -> None:
    class Nasty:
        @property
        def hook_api(self) -> str:
            raise RuntimeError("nasty")

        @hookimpl
        def trtllm_on_step_end(self, stats: object) -> None: ...

    with pytest.raises(PluginLoadError, match="could not be examined: RuntimeError: nasty"):
        site.load(extra=[Nasty()])


def test_missing_metadata(site) -> None:
    site.decoder("bare", "mine")
    (site.path / "bare-0.3.0.dist-info" / "METADATA").unlink()
    assert only(site.load()) == PluginReport("bare", "unknown", "unknown", ("trtllm_register_decoders",), "loaded")


def test_installed_and_passed_in_is_one_plugin(site) -> None:
    name = site.decoder("twice", "mine")
    module = __import__(name)
    plugins = site.load(extra=[module])
    assert [entry.source.distribution for entry in plugins.decoders] == ["twice"]
    assert [report.status for report in plugins.report()] == ["loaded", "disabled"]
    assert "same object as plugin twice 0.3.0 (twice)" in plugins.report()[1].why


def test_installed_and_passed_in_is_required(site) -> None:
    name = site.install("twice", DECODER_AND.replace('registrar.add("mine", dict)', "1 / 0"))
    assert only(site.load()).status == "failed"
    with pytest.raises(PluginLoadError, match="ZeroDivisionError"):
        site.load(extra=[__import__(name)])


def test_two_distributions_may_share_a_plugin_name(site) -> None:
    site.decoder("one", "a", plugin="llama")
    site.decoder("two", "b", plugin="llama")
    assert [entry.name for entry in site.load().decoders] == ["a", "b"]


def test_two_instances_of_one_class(site) -> None:
    class Plugin:
        hook_api = "decoder>=1.0"

        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def trtllm_register_decoders(self, registrar) -> None:
            registrar.add(self.name, dict)

    plugins = site.load(extra=[Plugin("a"), Plugin("b")])
    assert [entry.source.plugin for entry in plugins.decoders] == ["Plugin", "Plugin#2"]


def test_nothing_here_imports_torch(site) -> None:
    site.decoder("trtllm-plugin-mine", "mine")
    script = f"""
    import sys
    sys.path.insert(0, {str(site.path)!r})
    import trtllm_core.plugin
    plugins = trtllm_core.plugin.Plugins.load(require=["trtllm-plugin-mine"])
    assert "mine" in plugins.decoders
    heavy = {{"torch", "numpy", "triton", "tensorrt", "cuda"}} & set(sys.modules)
    assert not heavy, heavy
    """
    root = Path(trtllm_core.plugin.__file__).parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60, cwd=root)
