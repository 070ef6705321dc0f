"""The words for weight maps, and that each works for any input axis, and for none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtllm_core.nn.weights import chain, fused, halves, linear, of_each_head, rows, transposed
from trtllm_core.plugin import Piece

OUT = torch.arange(2 * 3 * 4)  # two heads of three parts of four


def test_rows_of_layers_one_after_another() -> None:
    assert rows(8, 8)(OUT).tolist() == list(range(8, 16))


def test_parts_of_each_head() -> None:
    assert of_each_head(1, 3, 4)(OUT).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_neighbours_become_halves() -> None:
    assert halves(4)(OUT[:8]).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves(8, 4)(OUT[:16]).tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    "transform", [rows(5, 9), of_each_head(2, 3, 4), halves(12, 8), chain(of_each_head(0, 3, 4), halves(4))]
)
def test_any_input_axis(transform: Any) -> None:
    """What happens to a bias happens to each column of a weight, or of a low-rank factor."""
    for width in (1, 5, 24):
        weight = OUT[:, None] * 100 + torch.arange(width)
        expected = transform(OUT)[:, None] * 100 + torch.arange(width)
        assert torch.equal(transform(weight), expected)
        assert torch.equal(chain(transposed, transform)(weight.T), expected)
    assert torch.equal(chain(transposed, transform)(OUT), transform(OUT)), "a bias has nothing to transpose"


def test_maps() -> None:
    assert [(w.target, w.pieces) for w in linear("a", "b", "columns", bias=True, transform=transposed)] == [
        ("a.weight", (Piece("b.weight", "columns", transposed),)),
        ("a.bias", (Piece("b.bias", "whole", transposed),)),
    ]
    assert [w.target for w in linear("a", "b", "rows")] == ["a.weight"]
    (weight,) = fused("qkv", [Piece("q", "heads"), Piece("k", "kv_heads", transposed)])
    assert weight.pieces == (Piece("q.weight", "heads"), Piece("k.weight", "kv_heads", transposed))
    assert [w.target for w in fused("qkv", [Piece("q", "heads")], bias=True)] == ["qkv.weight", "qkv.bias"]
