"""``ObserverConformance``: what observers must do, which is to watch."""

from __future__ import annotations

from trtllm_core.config import SamplingConfig
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import HOOK_KINDS, PluginReport, Plugins
from trtllm_core.runner import ModelRunner
from trtllm_core.testing.kit import Conformance, require
from trtllm_core.testing.markov import MarkovExecutable

HOOKS = frozenset(hook for hook, kind in HOOK_KINDS.items() if kind == "observer")


class ObserverConformance(Conformance):
    """Subclass it and set ``plugin``: a module or instance with hooks, or the name of an installed plugin."""

    def installed(self) -> tuple[Plugins, PluginReport]:
        """The plugins with the observer among them, and what became of it.

        Raises:
            ConfigError: ``plugin`` observes nothing.
        """
        given = self.given()
        if isinstance(given, str):
            plugins = Plugins.load(require=[given])
            named = [report for report in plugins.report() if given in (report.plugin, report.distribution)]
        else:
            plugins = Plugins.load(extra=[given])
            named = list(plugins.report()[-1:])
        watching = [report for report in named if HOOKS & set(report.hooks)]
        if not watching:
            raise ConfigError(f"{given!r} implements no hook of an observer: {', '.join(sorted(HOOKS))}")
        return plugins, watching[0]

    def test_it_raises_nothing(self) -> None:
        """A session with several requests, from its start to its end."""
        plugins, report = self.installed()
        session(plugins)
        (after,) = (each for each in plugins.report() if each.plugin == report.plugin)
        require(not after.why, f"it raised in a session: {after.why}")

    def test_it_changes_nothing(self) -> None:
        """The same requests get the same tokens without it."""
        plugins, _ = self.installed()
        require(session(plugins) == session(Plugins.load(allow=[])), "with it, requests get other tokens")

    def test_it_takes_several_sessions(self) -> None:
        """What it keeps of one session does not break the next, nor one that runs beside it."""
        plugins, report = self.installed()
        runners = [ModelRunner.from_engine(MarkovExecutable(), plugins=plugins) for _ in range(2)]
        for runner in (*runners, *runners):
            runner.generate([[1, 2]], SamplingConfig(max_new_tokens=3, end_id=()))
        for runner in runners:
            runner.close()
        (after,) = (each for each in plugins.report() if each.plugin == report.plugin)
        require(not after.why, f"it raised beside a second session: {after.why}")


def session(plugins: Plugins) -> list[list[int]]:
    """A session with three requests; their tokens."""
    with ModelRunner.from_engine(MarkovExecutable(), plugins=plugins) as runner:
        sampling = SamplingConfig(top_k=0, top_p=1.0, random_seed=1, max_new_tokens=8, end_id=(), return_dict=True)
        outputs = runner.generate([[1, 2, 3], [4], [5, 6]], sampling)["outputs"]
        runner.generate([[7]], sampling.replace(max_new_tokens=1))
    return [list(output.tokens) for output in outputs]
