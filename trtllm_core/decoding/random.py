"""Random numbers by counter: ``u = f(seed, branch, position, draw)``, with no state to carry, copy or rewind.

The same request draws the same numbers alone, in any batch, in any slot, and after a rewind, because nothing but its
own coordinates goes in. The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trtllm_core.plugin.views import LogitsBatch

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: successive counters land far apart
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FRACTION = 24  # bits of a float32 in [0.5, 1)


def _signed(word: int) -> int:
    """The int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def slot_key(seed: int, branch: int) -> int:
    """Key of one branch's random numbers, for ``DecodingContext.seeds``.

    Args:
        seed: of the request; any integer, taken modulo 2^64.
        branch: number of the branch within the request.

    Returns:
        An int64.
    """
    return _signed(_mix_int((_mix_int((seed + _GAMMA) & _WORD) + (branch + 1) * _GAMMA) & _WORD))


def draw_salt(name: str, draw: int = 0) -> int:
    """Salt (int64) of a plugin's draws, so that no two plugins see the same numbers. The same in every process.

    Args:
        name: the plugin's registered name.
        draw: tells several draws of one plugin at one position apart.
    """
    digest = hashlib.blake2b(f"{name}\0{draw}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest, "little"))


def _shifted(word: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right: torch's own repeats the sign bit, which the mask clears."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: torch.Tensor) -> torch.Tensor:
    word = (word ^ _shifted(word, 30)) * _signed(_MIX_1)
    word = (word ^ _shifted(word, 27)) * _signed(_MIX_2)
    return word ^ _shifted(word, 31)


def _counted(keys: torch.Tensor, positions: torch.Tensor, salt: int) -> torch.Tensor:
    return _mix(keys + salt + positions * _signed(_GAMMA))


def _unit(word: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1], from the upper bits: exact, so that 1 is possible and 0 is not."""
    return (_shifted(word, 64 - _FRACTION) + 1).to(torch.float32) * 2.0**-_FRACTION


def uniform(keys: torch.Tensor, positions: torch.Tensor, salt: int) -> torch.Tensor:
    """One number for each position.

    Args:
        keys: int64 ``[n]``, from ``slot_key``.
        positions: int64 ``[n]``: index in the text of the token that the draw is for.
        salt: from ``draw_salt``.

    Returns:
        float32 ``[n]``, uniform in (0, 1] on a grid of 2^-24, on the device of ``keys``.
    """
    return _unit(_counted(keys, positions, salt))


def uniform_rows(keys: torch.Tensor, positions: torch.Tensor, salt: int, width: int) -> torch.Tensor:
    """``width`` numbers for each position, as for one Gumbel variate a token.

    Args and result are those of ``uniform``, but the result is ``[n, width]``. A row's first numbers do not depend on
    ``width``.
    """
    columns = torch.arange(1, width + 1, device=keys.device) * _signed(_GAMMA)
    return _unit(_mix(_counted(keys, positions, salt).unsqueeze(1) + columns))


def batch_uniform(batch: LogitsBatch, salt: int) -> torch.Tensor:
    """One number in (0, 1] for each position of a step: float32 ``[n]``. Drafted positions count."""
    context = batch.context
    return uniform(
        context.seeds.index_select(0, batch.slot), context.lengths.index_select(0, batch.slot) + batch.offset, salt
    )
