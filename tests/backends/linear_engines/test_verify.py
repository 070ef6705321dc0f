"""The check of parsed networks: right ones pass, and each planted mistake is named.

TensorRT builds an engine of nearly all of these mutants without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from trtllm_core.backends.tensorrt.verify import check_network, network_problems
from trtllm_core.errors import EngineUnsupportedError

from .conftest import Graph, MakeGraph, Parsed


def problems(trt: Any, graph: Graph, path: Path, kind: Any = None) -> list[str]:
    parsed = Parsed(trt, path)
    assert parsed.parses
    return list(network_problems(trt, parsed.network, graph.config.model.num_layers, kind or graph.kind, "float16"))


@pytest.mark.parametrize("kind", ["lower_right", "mask"])
def test_a_right_network_has_no_problems(kind: Any, make_graph: MakeGraph, trt: Any) -> None:
    graph = make_graph(kind)
    assert graph.kind == kind
    assert problems(trt, graph, graph.path) == []


def attentions(proto: Any) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == "TRT_Attention"]


def updates(proto: Any) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == "TensorScatter"]


def set_causal(proto: Any, value: bytes) -> None:
    for node in attentions(proto):
        (kind,) = (attribute for attribute in node.attribute if attribute.name == "causal_kind")
        kind.s = value


def standard_causal(proto: Any) -> None:
    """ONNX's own Attention with is_causal and nonpad_kv_seqlen: ONNX Runtime is right about it."""
    nodes = attentions(proto)
    first = list(proto.graph.node).index(nodes[0])
    cast = next(node for node in proto.graph.node if node.output[0] == nodes[0].input[5])
    proto.graph.node.insert(first, onnx.helper.make_node("Identity", [cast.input[0]], ["lengths"]))
    for node in nodes:
        node.op_type, node.domain = "Attention", ""
        inputs = [*node.input[:3], "", "", "", "lengths"]
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.attribute.extend([onnx.helper.make_attribute("is_causal", 1), onnx.helper.make_attribute("scale", 1.0)])


def no_lengths(proto: Any) -> None:
    for node in attentions(proto):
        node.input[5] = ""


def misspelt(proto: Any) -> None:
    for node in attentions(proto):
        (kind,) = (attribute for attribute in node.attribute if attribute.name == "causal_kind")
        kind.name = "causal_mask_kind"


def swapped_caches(proto: Any) -> None:
    first, second = updates(proto)[0], updates(proto)[2]
    first.input[0], second.input[0] = second.input[0], first.input[0]


def keys_of_another_layer(proto: Any) -> None:
    first, second = attentions(proto)[:2]
    second.input[1] = first.input[1]


def cache_is_no_output(proto: Any) -> None:
    (output,) = (one for one in proto.graph.output if one.name == "present_key_1")
    proto.graph.output.remove(output)


def foreign_lengths(proto: Any) -> None:
    proto.graph.input.append(onnx.helper.make_tensor_value_info("foreign", onnx.TensorProto.INT32, ["batch"]))
    for node in attentions(proto):
        node.input[5] = "foreign"


def older_argument_order(proto: Any) -> None:
    for node in attentions(proto):
        node.input.insert(4, "")
        node.input.insert(4, "")


def no_mask_and_a_scale(proto: Any) -> None:
    for node in attentions(proto):
        node.op_type, node.domain = "Attention", ""
        del node.input[3:], node.attribute[:]


def no_write_indices(proto: Any) -> None:
    for node in updates(proto):
        del node.input[2:]


MUTANTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "standard causal attention": (standard_causal, "UPPER_LEFT"),
    "no lengths": (no_lengths, "has no lengths"),
    "upper left": (lambda proto: set_causal(proto, b"upper_left"), "UPPER_LEFT"),
    "no causal kind": (lambda proto: set_causal(proto, b"none"), "NONE"),
    "misspelt attribute": (misspelt, "not LOWER_RIGHT"),
    "caches of two layers swapped": (swapped_caches, "present_key_0 is not the update of past_key_0 but of past_key_1"),
    "keys of another layer": (keys_of_another_layer, "key comes from present_key_0, not from present_key_1"),
    "a cache that is no output": (cache_is_no_output, "present_key_1 is no output"),
    "lengths from elsewhere": (foreign_lengths, "lengths do not follow from write_indices"),
    "the order of an older schema": (older_argument_order, "has no lengths"),
    "no mask and a second scale": (no_mask_and_a_scale, "not LOWER_RIGHT"),
    "caches written at the start": (no_write_indices, "not written at write_indices"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_named(name: str, make_graph: MakeGraph, trt: Any, tmp_path: Path) -> None:
    graph = make_graph("lower_right")
    mutate, expected = MUTANTS[name]
    proto = copy.deepcopy(graph.proto)
    mutate(proto)
    path = graph.path.with_name(f"{name.replace(' ', '-')}.onnx")  # beside the weights
    path.write_bytes(proto.SerializeToString())
    found = problems(trt, graph, path)
    assert any(expected in problem for problem in found), found


def test_a_wrong_kind_and_dtype_are_named(make_graph: MakeGraph, trt: Any) -> None:
    graph = make_graph("mask")
    parsed = Parsed(trt, graph.path)
    layers = graph.config.model.num_layers
    with pytest.raises(EngineUnsupportedError, match="no engine was built of it: .*not LOWER_RIGHT"):
        check_network(trt, parsed.network, layers, "lower_right", "float16")
    with pytest.raises(EngineUnsupportedError, match="where the model is bfloat16"):
        check_network(trt, parsed.network, layers, "mask", "bfloat16")
    with pytest.raises(EngineUnsupportedError, match=f"{layers} attention layers for {layers + 1} layers"):
        check_network(trt, parsed.network, layers + 1, "mask", "float16")
