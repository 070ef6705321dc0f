"""The search for a nucleus' border in kernels against the one that sorts: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trtllm_core.decoding.kernels.nucleus import nucleus_border
from trtllm_core.decoding.ranking import border, masses, part

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def sorted_border(logits: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin, and whether a rounding of the masses could move its answer."""
    weights = masses(logits)
    target = part(share, weights.sum(dim=1, keepdim=True))
    ids = logits.sort(dim=1, descending=True, stable=True).indices
    sums = weights.gather(1, ids).cumsum(dim=1)
    place = torch.searchsorted(sums, target).clamp_(max=logits.shape[1] - 1)
    slack = sums[:, -1:].double() * 1e-6
    close = (sums.gather(1, place) - target).double() < slack
    close |= (target - (sums - weights.gather(1, ids)).gather(1, place)).double() < slack
    return ids.gather(1, place), close & (share < 1)


def rows(scale: float, vocab: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    logits = scale * torch.randn(6, vocab)
    logits[1] = logits[1].round()  # many equals
    logits[2] = 1.5
    logits[3, 100:] = -torch.inf
    logits[4] = -logits[4].abs() - 50
    share = torch.tensor([0.9, 0.5, 0.3, 0.99, 0.7, 2.0**-60]).view(-1, 1)
    return logits.to(device), share.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_the_border_is_that_of_the_sorted_row(scale: float, device: str) -> None:
    for vocab in (5000,) if device == "cpu" else (5000, 32000, 128256):
        logits, share = rows(scale, vocab, device)
        expected, close = sorted_border(logits, share)
        found = nucleus_border(logits, share)
        same = found == expected
        assert (same | close).all(), (found, expected)
        assert same.sum() >= 4, "hardly any row is that close to its border"


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_equals_and_rows_without_a_token(device: str) -> None:
    logits = torch.zeros(3, 4500, device=device)
    logits[1] = -torch.inf
    logits[2] = -0.0
    found = nucleus_border(logits, torch.full((3, 1), 0.5, device=device)).flatten().tolist()
    assert found[0] == found[2] == 2249
    assert 0 <= found[1] < 4500


def test_on_the_cpu_and_for_small_vocabularies_nothing_changes() -> None:
    logits, share = rows(2.0, 300, "cpu")
    assert torch.equal(border(logits, share), sorted_border(logits, share)[0])


@pytest.mark.cuda
def test_a_gpu_takes_the_kernels() -> None:
    logits, share = rows(2.0, 32000, "cuda")
    assert torch.equal(border(logits, share), nucleus_border(logits, share))
    part_of = torch.cat((logits, logits), 1)[:, :32000]
    assert torch.equal(border(part_of, share), nucleus_border(logits, share)), "rows may lie apart"
