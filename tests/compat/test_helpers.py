"""What old scripts import beside the runtime: dtypes, ranks, the mapping, logger and profiler."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch

from trtllm_core.compat.tensorrt_llm import _utils as utils
from trtllm_core.compat.tensorrt_llm import profiler
from trtllm_core.compat.tensorrt_llm.logger import Logger
from trtllm_core.compat.tensorrt_llm.mapping import Mapping, core_mapping
from trtllm_core.compat.tensorrt_llm.quantization import QuantMode
from trtllm_core.compat.tensorrt_llm.runtime import loading
from trtllm_core.errors import ConfigError


def test_dtypes_there_and_back():
    for name in ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"):
        dtype = utils.str_dtype_to_torch(name)
        assert utils.torch_dtype_to_str(dtype) == name
        assert utils.np_dtype_to_torch(utils.torch_dtype_to_np(dtype)) == dtype
        assert utils.trt_dtype_to_torch(utils.str_dtype_to_trt(name)) == dtype
    for wrong, function in (("float17", utils.str_dtype_to_torch), (torch.complex64, utils.torch_dtype_to_str)):
        with pytest.raises(ConfigError, match="there is no"):
            function(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_tensors_to_numpy_and_back(dtype):
    tensor = torch.tensor([[1.5, -2.0], [3.25, 0.0]]).to(dtype)
    array = utils.torch_to_numpy(tensor.requires_grad_(dtype.is_floating_point))
    assert array.shape == (2, 2)
    assert torch.equal(utils.numpy_to_torch(array), tensor.detach())
    assert (array.dtype == utils.np_bfloat16) is (dtype == torch.bfloat16)


def test_arrays_and_json(tmp_path):
    assert utils.int32_array([1, 2]).dtype == np.int32
    assert utils.fp32_array([1, 2]).dtype == np.float32
    utils.to_json_file({"b": 1, "a": 2}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    assert utils.pad_vocab_size(97, 4) == 100


def test_ranks(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_SIZE")
    for name in (*names, "PMIX_RANK", "MPI_LOCALRANKID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (utils.mpi_world_size(), utils.mpi_rank(), utils.local_mpi_rank()) == (1, 0, 0)
    utils.mpi_barrier()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (utils.mpi_world_size(), utils.mpi_rank(), utils.local_mpi_rank()) == (4, 3, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert utils.local_mpi_rank() == 1
    with pytest.raises(ConfigError, match="the ranks have not met yet"):
        utils.mpi_barrier()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(utils, "mpi_world", lambda: (2, 1))
    assert (utils.mpi_world_size(), utils.mpi_rank()) == (2, 1), "mpirun comes first"


class Comm:
    """``MPI.COMM_WORLD`` of two ranks in one process: rank 1 gets what rank 0 broadcast before."""

    said = None

    def __init__(self, rank):
        self.rank = rank

    def Get_rank(self):  # noqa: N802
        return self.rank

    def bcast(self, value, root):
        if self.rank == root:
            Comm.said = value
        return Comm.said


def test_ranks_that_mpirun_started_meet_where_rank_0_says(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    places = []
    for rank in range(2):
        monkeypatch.setattr(utils, "mpi_comm", lambda rank=rank: Comm(rank))
        places.append(loading._meeting_place())
    assert places[0] == places[1]
    assert re.fullmatch(r"tcp://\S+:\d+", places[0])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert loading._meeting_place() is None, "torchrun said where"


def test_the_mapping_is_mutable_and_derives_at_once():
    mapping = Mapping(4, 3, 4, 2, 2)
    assert (mapping.tp_rank, mapping.pp_rank, mapping.prev_pp_rank(), mapping.next_pp_rank()) == (1, 1, 1, 1)
    assert mapping.tp_groups == [[0, 1], [2, 3]]
    mapping.rank = 0
    assert (mapping.tp_rank, mapping.is_first_pp_rank()) == (0, True)
    assert core_mapping(mapping).rank == 0
    assert mapping == Mapping(4, 0, 4, 2, 2)
    assert "rank=0" in repr(mapping)
    assert core_mapping(None) is None
    mapping.tp_size = 3
    with pytest.raises(ValueError, match="must be world_size"):
        mapping.tp_rank  # noqa: B018
    with pytest.raises(ValueError, match="must be world_size"):
        Mapping(world_size=3, tp_size=2)
    with pytest.raises(ConfigError, match="cp_size is not honoured"):
        Mapping(cp_size=2)
    assert Mapping(moe_tp_size=-1) == Mapping()
    with pytest.raises(AttributeError):
        Mapping().nonsense  # noqa: B018


def test_the_logger_writes_what_is_severe_enough(caplog):
    logger = Logger()
    with caplog.at_level(logging.DEBUG, "tensorrt_llm"):
        logger.set_level("info")
        logger.info("a", 1)
        logger.debug("no")
        logger.set_level("verbose")
        logger.verbose("b")
        logger.error("c")
        logger.critical("d")
    assert caplog.messages == ["a 1", "b", "c", "d"]
    assert logger.level == "verbose"
    with pytest.raises(KeyError):
        logger.set_level("loud")


def test_the_profiler_adds_up(caplog):
    profiler.reset()
    assert profiler.elapsed_time_in_sec("x") is None
    profiler.stop("x")
    assert "'x' was not started" in caplog.text
    for _ in range(2):
        profiler.start("x")
        profiler.stop("x")
    assert profiler.elapsed_time_in_sec("x") > 0
    with caplog.at_level(logging.INFO, "tensorrt_llm"):
        profiler.summary()
    assert "x: 0.00" in caplog.text
    profiler.reset()


def test_quant_mode():
    assert not QuantMode(0).has_any_quant()
    assert QuantMode.INT8_WEIGHTS.has_any_quant()
    assert QuantMode.INT8_KV_CACHE.has_any_quant()
    assert not QuantMode.INT8_KV_CACHE.has_any_quant(exclude_kv_cache=True)
    assert QuantMode.FP8_KV_CACHE.has_kv_cache_quant()
