"""Searches: their candidates beside the rows of samplers, and what survives when it is known which of them stop."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from trtllm_core.decoding.choice import Choice, Found, Outcome, Search
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.positions import Positions
from trtllm_core.decoding.scoring import Likeliest
from trtllm_core.decoding.stages import Stage
from trtllm_core.decoding.stopping import Verdict
from trtllm_core.errors import PluginContractError, PluginError
from trtllm_core.plugin import Candidates, Decoder, Selection, Stop, Survivors


def check_candidates(name: str, candidates: Candidates, slot: torch.Tensor, members: Collection[int]) -> list[int]:
    """The slots of candidates, on the host. Waits for the device.

    Raises:
        PluginContractError: they are not what ``Candidates`` says.
    """
    kinds = (("slot", torch.int64), ("tokens", torch.int64), ("scores", torch.float32), ("log_probs", torch.float32))
    for what, dtype in kinds:
        tensor = getattr(candidates, what)
        right = isinstance(tensor, torch.Tensor) and (tensor.dtype, tensor.device) == (dtype, slot.device)
        if not right or tensor.dim() != 1 or len(tensor) != len(candidates.slot):
            raise PluginContractError(
                f"decoder {name!r} returned candidates whose {what} is no {str(dtype).removeprefix('torch.')} [m] on "
                f"{slot.device}, one m for all"
            )
    slots: list[int] = candidates.slot.tolist()
    if strangers := set(slots) - set(members):
        raise PluginContractError(
            f"decoder {name!r} returned candidates for slot {min(strangers)}, which is not its own"
        )
    return slots


def with_searches(choice: Choice, searches: Sequence[Search], at: Positions) -> Choice:
    """The rows of a choice that belong to no search, and behind them one row for each candidate."""
    searching = {slot for search in searches for slot in search.stage.members}
    plain = [i for i, slot in enumerate(choice.slots) if slot not in searching]
    device = choice.slot.device
    rows = torch.tensor(plain, dtype=torch.int64, device=device)
    tokens, counts, given = choice.selection.tokens[rows], choice.selection.counts[rows], choice.selection.log_probs
    width = tokens.shape[1]
    starts = torch.arange(len(choice.slots), device=device) if at.starts is None else at.starts
    own = starts.unsqueeze(1).expand(-1, width) if choice.source is None else choice.source
    place = {slot: i for i, slot in enumerate(choice.slots)}
    parents = [place[slot] for search in searches for slot in search.slots]  # none where every token is forbidden
    for search in searches:
        more = torch.nn.functional.pad(search.candidates.tokens.unsqueeze(1), (0, width - 1))
        tokens = torch.cat([tokens, more])
        counts = torch.cat([counts, torch.ones_like(search.candidates.slot)])
    return Choice(
        torch.cat([choice.slot[rows], *(search.candidates.slot for search in searches)]),
        [choice.slots[i] for i in plain] + [slot for search in searches for slot in search.slots],
        Selection(tokens, counts, None if given is None else given[rows]),
        searches,
        torch.cat(
            [own[rows], starts[torch.tensor(parents, dtype=torch.int64, device=device)].unsqueeze(1).expand(-1, width)]
        ),
    )


def settle(
    choice: Choice,
    verdict: Verdict,
    log_probs: list[list[float]] | None,
    likeliest: list[list[Likeliest]] | None,
    owners: Mapping[int, LiveRequest],
) -> tuple[Outcome, list[tuple[Stage[Decoder], PluginError]]]:
    """Let searches choose their survivors, now that it is known what stops.

    Args:
        choice: the step's, with searches.
        verdict: of its rows.
        log_probs, likeliest: of the rows that belong to no search; None: nobody asked.
        owners: by slot, resting ones included.

    Returns:
        What is to be committed, and the searches that failed.
    """
    start = len(choice.slots) - sum(len(search.slots) for search in choice.searches)
    found, failed = [], []
    slots, new, stops = choice.slots[:start], verdict.tokens[:start], verdict.stops[:start]
    kept = list(range(start))
    forks: dict[int, int] = {}
    told = None if log_probs is None else list(log_probs)
    beside: list[Sequence[Mapping[int, float]]] | None = None if likeliest is None else list(likeliest)
    for search in choice.searches:
        answers = verdict.stops[start : start + len(search.slots)]
        stage, candidates = search.stage, search.candidates
        try:
            survivors = stage.call(stage.plugin.survive, candidates, answers)
            _check_survivors(search, survivors, answers, owners)
        except PluginError as error:
            failed.append((stage, error))
        else:
            one = Found(search, start, survivors, candidates.scores.tolist(), candidates.log_probs.tolist())
            found.append(one)
            for target, index, _ in survivors.branches:
                slots.append(target)
                new.append(verdict.tokens[start + index])
                stops.append(None)
                kept.append(start + index)
                if told is not None:
                    told.append([one.log_probs[index]])
                if beside is not None:
                    beside.append([search.likeliest.get(search.slots[index], {})])
                if search.slots[index] != target:
                    forks[target] = search.slots[index]
        start += len(search.slots)
    device, width = choice.slot.device, choice.selection.tokens.shape[1]
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in new], dtype=torch.int64).view(-1, width).to(device)
    slot = torch.tensor(slots, dtype=torch.int64).to(device)
    scores = verdict.scores
    if scores is not None:
        scores = replace(scores, source=scores.source[torch.tensor(kept, dtype=torch.int64, device=device)])
    return Outcome(slot, slots, tokens, new, stops, verdict, told, forks, found, scores, beside), failed


def _check_survivors(
    search: Search, survivors: Survivors, stops: Sequence[Stop | None], owners: Mapping[int, LiveRequest]
) -> None:
    name, known = search.stage.name, range(len(stops))
    if not isinstance(survivors, Survivors):
        raise PluginContractError(f"decoder {name!r} returned a {type(survivors).__name__} from survive, not Survivors")
    indices = [index for _, index, _ in survivors.branches] + [index for index, _ in survivors.finished]
    if any(index not in known for index in indices):
        raise PluginContractError(f"decoder {name!r} lets candidates {indices} survive, of {len(stops)}")
    slots = [slot for slot, _, _ in survivors.branches]
    if len(set(slots)) < len(slots):
        raise PluginContractError(f"decoder {name!r} puts several candidates in one slot: {slots}")
    for slot, index, _ in survivors.branches:
        owner = owners.get(slot)
        if owner is None or owner is not owners[search.slots[index]]:
            raise PluginContractError(
                f"decoder {name!r} puts a candidate in slot {slot}, which its request does not have"
            )
        stop = stops[index]
        if stop is not None:
            raise PluginContractError(f"decoder {name!r} lets a candidate go on that stops ({stop.reason})")
