"""Random numbers by counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.decoding.random import batch_uniform, draw_salt, slot_key, uniform, uniform_rows

SALT = draw_salt("test")


def keys(n, branch=0):
    return torch.tensor([slot_key(seed, branch) for seed in range(n)])


def splitmix(key: int, position: int, salt: int) -> int:
    """The same in Python integers."""
    word = (1 << 64) - 1
    z = (key + salt + position * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def test_golden_values_never_change():
    """A seed that a user noted must give the same tokens with the next release."""
    assert slot_key(0, 0) == -6411193824288604561
    assert slot_key(1234, 2) == 1346045572899166516
    assert draw_salt("top_k_top_p") == -7243196274425010364
    got = uniform(torch.tensor([slot_key(1234, 0)] * 3), torch.tensor([0, 1, 2]), draw_salt("top_k_top_p"))
    assert got.tolist() == pytest.approx([0.503128, 0.7805557, 0.103391], abs=1e-6)


def test_tensor_arithmetic_is_that_of_64_bit_words():
    position = torch.arange(500)
    key = keys(500)
    got = uniform(key, position, SALT)
    want = [((splitmix(k, p, SALT) >> 40) + 1) * 2.0**-24 for k, p in zip(key.tolist(), position.tolist(), strict=True)]
    assert got.tolist() == want
    assert got.dtype == torch.float32


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed):
    key = slot_key(seed, 3)
    assert -(2**63) <= key < 2**63
    assert key == slot_key(seed % 2**64, 3)


def test_range_is_above_0_and_up_to_1():
    u = uniform_rows(keys(64), torch.arange(64), SALT, 65536)
    assert 0 < float(u.min()) < 1e-6
    assert 1 - 1e-6 < float(u.max()) <= 1


@pytest.mark.parametrize("along", ["positions", "seeds", "branches", "salts", "columns"])
def test_uniform_and_independent_of_the_neighbour(along, assert_distribution):
    n = 60_000
    zeros = torch.zeros(n, dtype=torch.int64)
    if along == "positions":
        u = uniform(zeros + slot_key(7, 0), torch.arange(n), SALT)
    elif along == "seeds":
        u = uniform(keys(n), zeros, SALT)
    elif along == "branches":
        u = uniform(torch.tensor([slot_key(7, b) for b in range(n)]), zeros + 5, SALT)
    elif along == "salts":
        key = torch.tensor([slot_key(7, 0)])
        u = torch.cat([uniform(key, torch.tensor([5]), draw_salt("x", draw)) for draw in range(n // 10)])
    else:
        u = uniform_rows(torch.tensor([slot_key(7, 0)]), torch.tensor([3]), SALT, n)[0]
    x = u.double().numpy()
    bins = 100
    assert_distribution(np.bincount(np.minimum((x * bins).astype(int), bins - 1), minlength=bins), np.ones(bins))
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5 / len(x) ** 0.5
    pairs = (x[:-1] * 10).astype(int).clip(0, 9) * 10 + (x[1:] * 10).astype(int).clip(0, 9)
    assert_distribution(np.bincount(pairs[::2], minlength=100), np.ones(100))


def test_rows_do_not_depend_on_the_width_or_the_batch():
    key, position = keys(5), torch.arange(5)
    assert torch.equal(uniform_rows(key, position, SALT, 9)[:, :4], uniform_rows(key, position, SALT, 4))
    assert torch.equal(uniform(key, position, SALT)[3:4], uniform(key[3:4], position[3:4], SALT))


def test_position_counts_drafts(new_floor):
    floor = new_floor()
    floor.view(2, [1, 2, 3])
    drafted = batch_uniform(floor.logits_batch([2, 2], offsets=[0, 1], draft=np.zeros((6, 1))), SALT)
    floor.append(2, [9])
    assert drafted[1] == batch_uniform(floor.logits_batch([2]), SALT)[0]
