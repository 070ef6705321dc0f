"""What must be true of a network before an engine is built of it.

TensorRT builds an engine of nearly anything: a parser that drops an input, a causal mask anchored in the wrong corner
or two swapped caches give wrong tokens, and no error. Each rule here stands for such a network. None needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtllm_core.backends.linear.context import AttentionKind
from trtllm_core.backends.linear.contract import cache_names
from trtllm_core.backends.tensorrt.network import NetworkGraph
from trtllm_core.errors import EngineUnsupportedError

WRITE = "write_indices"


def check_network(trt: Any, network: Any, layers: int, kind: AttentionKind, dtype: str) -> None:
    """Hold a parsed network against the padded, linear contract.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        network: ``INetworkDefinition``, parsed.
        layers: of the model.
        kind: of attention that was asked for.
        dtype: of the model and its caches.

    Raises:
        EngineUnsupportedError: naming all that is wrong with it.
    """
    problems = list(network_problems(trt, network, layers, kind, dtype))
    if problems:
        raise EngineUnsupportedError(
            f"TensorRT's parser made a wrong network, and no engine was built of it: {'; '.join(problems)}"
        )


def network_problems(trt: Any, network: Any, layers: int, kind: AttentionKind, dtype: str) -> Iterator[str]:
    """The problems that ``check_network`` would name, one by one."""
    graph = NetworkGraph(trt, network)
    yield from _unused_inputs(trt, graph)
    yield from _caches(trt, graph, layers, dtype)
    attentions = graph.attentions()
    if len(attentions) != layers:
        yield f"it has {len(attentions)} attention layers for {layers} layers of the model"
    for i, attention in enumerate(attentions):
        who = f"attention {i}"
        if kind == "lower_right":
            yield from _lower_right(trt, graph, attention, who)
        else:
            yield from _masked(trt, graph, attention, who)
        if attention.norm_op != trt.AttentionNormalizationOp.SOFTMAX:
            yield f"{who} normalises by {attention.norm_op}, not by softmax"
        for j, what in ((1, "key"), (2, "value")):
            yield from _reads_cache(trt, graph, attention.get_input(j), f"present_{what}_{i}", f"{who}'s {what}")


def _unused_inputs(trt: Any, graph: NetworkGraph) -> Iterator[str]:
    used = set().union(*(graph.sources(tensor) for tensor in graph.outputs.values()))
    used |= {layer.get_input(0).name for layer in graph.of_type("SHAPE")}
    for name in graph.inputs.keys() - used:
        yield f"its input {name!r} is used by nothing: the parser dropped what read it"


def _caches(trt: Any, graph: NetworkGraph, layers: int, dtype: str) -> Iterator[str]:
    wanted = dict(zip(cache_names(layers, "present"), cache_names(layers, "past"), strict=True))
    found = {}
    for layer in graph.of_type("KV_CACHE_UPDATE"):
        cache, update, write = (layer.get_input(i) for i in range(3))
        present = layer.get_output(0).name
        found[present] = cache.name
        if cache.name not in graph.inputs:
            yield f"the cache that {present} updates is no input of the network"
        if present not in graph.outputs:
            yield f"{present} is no output of the network, so it cannot be updated in place"
        if write is None or graph.sources(write) != {WRITE}:
            yield f"{present} is not written at {WRITE}"
        if tuple(cache.shape)[2] < 0:
            yield f"the length of {cache.name} is not fixed"
        if cache.dtype != getattr(trt, dtype) or update.dtype != cache.dtype:
            yield f"{cache.name} is {cache.dtype} and is given {update.dtype}, where the model is {dtype}"
    for present, past in wanted.items():
        if found.get(present) != past:
            yield f"{present} is not the update of {past} but of {found.get(present)}"
    for name in found.keys() - wanted.keys():
        yield f"it updates a cache {name} that the model does not have"


def _lower_right(trt: Any, graph: NetworkGraph, attention: Any, who: str) -> Iterator[str]:
    if attention.causal_kind != trt.CausalMaskKind.LOWER_RIGHT:
        yield f"{who} has the causal mask {attention.causal_kind}, not LOWER_RIGHT: a token would see the wrong entries"
    lengths = attention.key_value_lengths
    if lengths is None:
        yield f"{who} has no lengths: its mask would end at the end of the whole cache"
    elif WRITE not in graph.sources(lengths):
        yield f"{who}'s lengths do not follow from {WRITE}"
    if attention.mask is not None:
        yield f"{who} has a mask beside its causal mask"


def _masked(trt: Any, graph: NetworkGraph, attention: Any, who: str) -> Iterator[str]:
    if attention.mask is None:
        yield f"{who} has no mask"
    elif WRITE not in graph.sources(attention.mask):
        yield f"{who}'s mask does not follow from {WRITE}"
    if attention.causal_kind != trt.CausalMaskKind.NONE:
        yield f"{who} has the causal mask {attention.causal_kind} beside its mask"


def _reads_cache(trt: Any, graph: NetworkGraph, tensor: Any, present: str, who: str) -> Iterator[str]:
    caches = frozenset(layer.get_output(0).name for layer in graph.of_type("KV_CACHE_UPDATE"))
    read = graph.sources(tensor, caches) & caches
    if read != {present}:
        yield f"{who} comes from {', '.join(sorted(read)) or 'no cache'}, not from {present}"
    while tensor.name not in caches and (layer := graph.maker(tensor)) is not None:
        if layer.type == trt.LayerType.ELEMENTWISE:
            yield f"{who} is scaled after it was cached: the parser added a scale of its own"
            return
        tensor = layer.get_input(0)
