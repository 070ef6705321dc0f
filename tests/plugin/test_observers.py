"""Observers are told, and cannot break anything."""

from __future__ import annotations

import logging

import pytest

from trtllm_core.plugin import SessionStats, StepStats, hookimpl

STEP = StepStats(step=1, rows=2, context_tokens=0, generation_tokens=2, kv_blocks_free=3, seconds=0.1)
SESSION = SessionStats(family="llama", backend="torch", max_batch_size=1, kv_blocks=1, kv_bytes=1, weight_bytes=1)


class Observes:
    """An observer that can be told to fail."""

    hook_api = "observer>=1.0,<2"

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.fail = False

    @hookimpl
    def trtllm_on_step_end(self, stats: StepStats) -> None:
        if self.fail:
            raise ValueError("tired")
        self.seen.append(stats)


def test_observers_watch(site) -> None:
    plugin = Observes()
    plugins = site.load(extra=[plugin])
    assert plugins.observes_steps
    plugins.on_step_end(STEP)
    plugins.on_session_end(SESSION)
    assert plugin.seen == [STEP]
    assert not site.load().observes_steps


def test_observer_that_raises_is_recorded_and_logged_once(site, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Observes(), Observes()
    plugins = site.load(extra=[bad, good])
    bad.fail = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            plugins.on_step_end(STEP)
    assert len(good.seen) == 3
    assert len(caplog.records) == 1
    assert "observer local 0 (Observes): trtllm_on_step_end raised ValueError: tired" in caplog.text
    report = plugins.report()[0]
    assert (report.status, report.why) == ("loaded", "trtllm_on_step_end raised ValueError: tired (3 times)")
    bad.fail = False
    plugins.on_step_end(STEP)
    assert len(bad.seen) == 1


def test_interrupts_are_not_swallowed(site) -> None:
    class Interrupts(Observes):
        @hookimpl
        def trtllm_on_step_end(self, stats: StepStats) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.load(extra=[Interrupts()]).on_step_end(STEP)
