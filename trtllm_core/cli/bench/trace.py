"""A trace of requests: what a server is asked, when."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from trtllm_core.errors import ConfigError

_FIELDS = ("arrival", "prompt_len", "new_tokens")


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    arrival: float
    """Seconds after the first moment."""
    prompt_len: int
    new_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival."""

    requests: tuple[Arrival, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(one.prompt_len for one in self.requests)

    @property
    def new_tokens(self) -> int:
        """Of all answers together."""
        return sum(one.new_tokens for one in self.requests)

    @property
    def spread(self) -> float:
        """Seconds from the first moment to the last arrival; 0 where all are there at once."""
        return max(one.arrival for one in self.requests)

    def limits(self, batch: int) -> dict[str, int]:
        """What an engine needs that is made for this trace: fields of ``BuildConfig``."""
        return {
            "max_batch_size": batch,
            "max_input_len": max(one.prompt_len for one in self.requests),
            "max_seq_len": max(one.prompt_len + one.new_tokens for one in self.requests),
            "max_num_tokens": max(8192, batch),
        }


def make_trace(
    count: int, prompts: tuple[int, int], outputs: tuple[int, int], rate: float | None, seed: int = 0
) -> Trace:
    """Lengths drawn evenly from both ranges, ends included; arrivals of a Poisson process.

    Args:
        rate: requests a second; None: all are there at once.
    """
    draw, now, out = random.Random(seed), 0.0, []
    for _ in range(count):
        out.append(Arrival(now, draw.randint(*prompts), draw.randint(*outputs)))
        now += 0.0 if rate is None else draw.expovariate(rate)
    return Trace(tuple(out))


def read_trace(path: Path) -> Trace:
    """Lines of JSON, a request each: ``{"arrival": 0.25, "prompt_len": 128, "new_tokens": 64}``.

    Raises:
        ConfigError: a line that is something else, naming its number; or there is none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_arrival(line, f"{path}, line {number}"))
    if not found:
        raise ConfigError(f"{path} has no request")
    return Trace(tuple(sorted(found, key=lambda one: one.arrival)))


def parse_range(text: str, option: str) -> tuple[int, int]:
    """``32-512``, or one length for all.

    Raises:
        ConfigError: it is neither; the message names ``option``.
    """
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        raise ConfigError(f"{option} {text}: write a range as 32-512") from None
    if not 1 <= low <= high:
        raise ConfigError(f"{option} {text}: a range is from 1 on, and its end is not before its start")
    return low, high


def _arrival(line: str, where: str) -> Arrival:
    try:
        values = json.loads(line)
        arrival, prompt, new = (values[name] for name in _FIELDS)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: a request is a JSON object with {', '.join(_FIELDS)}") from None
    wrong = values.keys() - set(_FIELDS)
    if wrong or not _is_number(arrival) or not all(isinstance(one, int) and one >= 1 for one in (prompt, new)):
        raise ConfigError(f"{where}: {', '.join(_FIELDS)} are seconds from 0 on and numbers of tokens from 1 on")
    return Arrival(float(arrival), prompt, new)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < float("inf")
