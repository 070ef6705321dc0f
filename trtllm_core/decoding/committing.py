"""How the tokens of a step become history: on the device, in the cache, in the plugins' state, and in what is told."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.choice import Found, Outcome
from trtllm_core.decoding.ending import end, leave
from trtllm_core.decoding.flight import Ahead
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Delta
from trtllm_core.decoding.stages import CommittedRows
from trtllm_core.decoding.telling import append, finished, show
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import Stop

FAILED = "plugin_error"


def commit(
    table: BranchTable,
    cache: KVCache,
    outcome: Outcome,
    failures: Mapping[LiveRequest, PluginError],
    ahead: Ahead | None = None,
) -> list[Delta]:
    """Tokens are cut where a row ends and appended to the rest; what has ended is told, and leaves.

    Args:
        table, cache: of the session.
        outcome: of the step.
        failures: requests that failed before it was known.
        ahead: what the device has committed already; None: nothing.
    """
    failed = {**take_failures(table), **failures}
    for slot, what in outcome.verdict.wrong.items():
        live = table.owners[slot]
        # One that failed before chose nothing.
        failed.setdefault(live, PluginContractError(f"decoder {live.plan.decoder.name!r} {what}"))
    reasons = _blame(failed)
    broken = set(reasons)
    stopped = any(outcome.stops)
    if stopped:
        for slot, stop, everybody in zip(outcome.slots, outcome.stops, outcome.verdict.ends_request, strict=False):
            if everybody and stop is not None:
                reasons.setdefault(table.owners[slot], stop.reason)
    for found in outcome.found:
        _follow(table, found, outcome, reasons)
    if outcome.forks:
        _fork(table, cache, {dst: src for dst, src in outcome.forks.items() if table.owners[dst] not in broken})
    new = outcome.new
    if stopped or broken:
        new = [
            [] if table.owners[slot] in broken else tokens if stop is None else tokens[: stop.at + 1]
            for slot, tokens, stop in zip(outcome.slots, outcome.new, outcome.stops, strict=True)
        ]
    if new:
        _write(table, outcome, new, ahead is not None)
    held = None
    if table.streams:
        held = [_held(table, slot, stop) for slot, stop in zip(outcome.slots, outcome.stops, strict=True)]
    reasons |= _blame({**take_failures(table), **(ahead.failures if ahead else {})})
    return _tell(table, outcome, new, held, reasons)


def take_failures(table: BranchTable) -> dict[LiveRequest, PluginError]:
    """The requests whose plugins have failed since the last call, and the first failure of each."""
    if not any(stages.failures for stages in table.stages):
        return {}
    failed: dict[LiveRequest, PluginError] = {}
    for stages in table.stages:
        for slot, error in stages.take_failures().items():
            failed.setdefault(table.owners[slot], error)
    return failed


def _blame(failed: Mapping[LiveRequest, PluginError]) -> dict[LiveRequest, str]:
    """The reason of requests that fail, those that are over passed over."""
    broken = {}
    for live, error in failed.items():
        if not live.over:
            live.error = live.error or error
            broken[live] = FAILED
    return broken


def _follow(table: BranchTable, found: Found, outcome: Outcome, reasons: dict[LiveRequest, str]) -> None:
    """What a search decided: candidates become hypotheses, and branches go on or rest."""
    search, verdict = found.search, outcome.verdict
    for index, score in found.survivors.finished:
        parent, row = table.live[search.slots[index]], found.start + index
        token, stop = verdict.tokens[row][0], verdict.stops[row]
        raw = table.gathering.chosen_from(parent.slot, 1)
        beside = search.likeliest.get(parent.slot)
        one = finished(parent, token, found.log_probs[index], found.scores[index], stop, score, raw, beside)
        parent.owner.hypotheses.append(one)
        if stop is not None and verdict.ends_request[row]:
            reasons.setdefault(parent.owner, stop.reason)
    going = {slot: (index, rank) for slot, index, rank in found.survivors.branches}
    for live in dict.fromkeys(table.owners[slot] for slot in search.asked):
        if reasons.get(live) == FAILED:
            continue
        before = {branch.slot: table.live.pop(branch.slot) for branch in live.running}
        live.running = []
        for number, slot in enumerate(live.slots):
            if slot in going:
                index, rank = going[slot]
                parent = before[search.slots[index]]
                branch = parent if parent.slot == slot else parent.copy_to(slot, number)
                branch.score, branch.rank = found.scores[index], rank
                live.running.append(branch)
                table.live[slot] = branch
        if not (live.running or live.hypotheses):
            live.running = list(before.values())
            table.live |= before
            weighed = any(table.owners[slot] is live for slot in search.slots)
            what = "left a request without any sequence" if weighed else "found every token forbidden"
            live.error = PluginContractError(f"decoder {search.stage.name!r} {what}")
            reasons[live] = FAILED


def _fork(table: BranchTable, cache: KVCache, forks: Mapping[int, int]) -> None:
    """Slots take over the history of others, all at the same time."""
    dst, src = list(forks), list(forks.values())
    sources, copies = table.companions.with_pairs(src, dst) if table.companions else (src, dst)
    cache.fork(np.array(sources, np.int64), np.array(copies, np.int64))  # first: it reads what the slots' tokens were
    table.slots.fork(sources, copies)
    for stages in table.stages:
        stages.fork(src, dst)


def _write(table: BranchTable, outcome: Outcome, new: list[list[int]], ahead: bool) -> None:
    """Append ``new`` to the rows' slots, and to those of their companions, and tell the plugins.

    ``ahead``: those on the device know it already.
    """
    counts = list(map(len, new))
    single = outcome.tokens.shape[1] == 1 and min(counts) == 1
    if ahead:
        table.slots.record(outcome.slots, new, single)
        for stages in table.stages:
            stages.commit_host(outcome.slots, new)
        return
    count = table.slots.ones(len(new)) if single else table.slots.sent(counts)
    table.slots.commit(outcome.slot, outcome.tokens, count)
    table.slots.record(outcome.slots, new, single)
    companions, places = table.companions.of_rows(outcome.slots) if table.companions else ([], [])
    if companions:
        row = table.slots.sent(places)
        table.slots.commit(table.slots.sent(companions), outcome.tokens[row], count[row])
        table.slots.record(companions, [new[place] for place in places], single)
    rows = CommittedRows(outcome.slot, outcome.tokens, count, outcome.scores)
    for stages in table.stages:
        stages.commit_device(rows)
        stages.commit_host(outcome.slots, new)


def _beside(live: LiveRequest, outcome: Outcome, row: int, tokens: list[int]) -> list[Mapping[int, float]]:
    """The likeliest tokens beside each new one of a row, where its request wants some."""
    if outcome.likeliest is None or not live.request.sampling.num_logprobs:
        return []
    return list(outcome.likeliest[row][: len(tokens)])


def _held(table: BranchTable, slot: int, stop: Stop | None) -> int:
    """Bytes at the end of a slot's text that a stream must hold back."""
    branch = table.live.get(slot)
    return 0 if branch is None or branch.stream is None or stop is not None else table.rules.pending(slot)


def _tell(
    table: BranchTable,
    outcome: Outcome,
    new: list[list[int]],
    held: list[int] | None,
    reasons: Mapping[LiveRequest, str],
) -> list[Delta]:
    """Deltas of the step's rows, and of requests that end. ``reasons``: those that end around their branches."""
    deltas: list[Delta] = []
    ranked: list[tuple[Branch, list[int], str]] = []
    told: set[int] = set()
    ended = dict.fromkeys(reasons)
    keeps_logits = table.gathering.keeps
    plain = held is None and outcome.log_probs is None and outcome.likeliest is None and not keeps_logits
    for i, (slot, tokens, stop) in enumerate(zip(outcome.slots, new, outcome.stops, strict=True)):
        branch = table.live.get(slot)
        if branch is None:  # of a search that failed before it took the slot
            continue
        live = branch.owner
        reason = reasons.get(live) if reasons else None
        if stop is not None and reason != FAILED:
            reason = stop.reason
        if plain and reason is None and not live.request.streaming:  # nobody is told, and there is nothing else to keep
            branch.generated += tokens
            continue
        chances: list[float] = []
        if outcome.log_probs is not None and live.plan.log_probs:
            chances = outcome.log_probs[i][: len(tokens)]
        branch.generated += tokens
        branch.log_probs += chances
        if keeps_logits:
            branch.logits += table.gathering.chosen_from(outcome.forks.get(slot, slot), len(tokens))
        beside: list[Mapping[int, float]] = []
        if outcome.likeliest is not None:
            beside = _beside(live, outcome, i, tokens)
            branch.likeliest += beside
        text = ""
        if held is not None:
            text = branch.say(tokens, held[i]) if reason is None else branch.say_last(tokens, stop)
        if live.plan.ranked:
            if live.request.streaming:
                ranked.append((branch, tokens, text))
        elif live.request.streaming or reason is not None:
            deltas.append(append(branch, tokens, chances, text, reason, beside))
        if reason is not None:
            told.add(slot)
            if reason != FAILED:
                leave(table, branch, reason, stop)
                if not live.running:
                    ended[live] = None
    for found in outcome.found:
        ended |= dict.fromkeys(live for slot in found.search.asked if not (live := table.owners[slot]).running)
    for branch, tokens, text in ranked:
        if branch.owner not in ended and branch.number < branch.owner.plan.branching.returns:
            deltas.append(show(branch, tokens, text))
    for live in ended:
        deltas += end(table, live, reasons.get(live), told)
    return deltas
