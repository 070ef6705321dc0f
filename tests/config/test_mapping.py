"""Every rule of features.md 1.3, its worked example, and properties that hold for all worlds."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_core.config.mapping import Mapping, WorldConfig
from trtllm_core.errors import ConfigError

worlds = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))


def every_rank(tp: int, pp: int, gpus_per_node: int = 8) -> list[Mapping]:
    return [Mapping(tp * pp, rank, gpus_per_node, tp, pp) for rank in range(tp * pp)]


# Mapping


def test_defaults_are_a_world_of_one() -> None:
    one = Mapping()
    assert (one.world_size, one.rank, one.gpus_per_node, one.tp_size, one.pp_size) == (1, 0, 8, 1, 1)
    assert not one.has_tp()
    assert not one.has_pp()
    assert one.is_first_pp_rank()
    assert one.is_last_pp_rank()
    assert one.prev_pp_rank() == one.next_pp_rank() == 0
    assert one.tp_group == one.pp_group == [0]
    assert one.pp_layers(3) == one.ep_experts(3) == [0, 1, 2]


def test_worked_example() -> None:
    mapping = Mapping(4, 3, 4, 2, 2)
    assert mapping.tp_groups == [[0, 1], [2, 3]]
    assert mapping.pp_groups == [[0, 2], [1, 3]]
    assert (mapping.tp_rank, mapping.pp_rank) == (1, 1)
    assert (mapping.prev_pp_rank(), mapping.next_pp_rank()) == (1, 1)
    assert mapping.tp_group == [2, 3]
    assert mapping.pp_group == [1, 3]
    assert mapping.has_tp()
    assert mapping.has_pp()
    assert mapping.is_last_pp_rank()
    assert not mapping.is_first_pp_rank()
    assert mapping.world().device == 3


def test_the_stage_before_the_first_is_the_last() -> None:
    assert [m.prev_pp_rank() for m in every_rank(2, 3)] == [4, 5, 0, 1, 2, 3]
    assert [m.next_pp_rank() for m in every_rank(2, 3)] == [2, 3, 4, 5, 0, 1]


def test_node_and_local_rank() -> None:
    mapping = Mapping(16, 13, 8, 16, 1)
    assert (mapping.node_rank, mapping.local_rank) == (1, 5)


def test_positional_and_keyword_are_alike_and_frozen() -> None:
    mapping = Mapping(4, 3, 4, 2, 2)
    assert mapping == Mapping(world_size=4, rank=3, gpus_per_node=4, tp_size=2, pp_size=2)
    assert mapping == Mapping.model_validate_json(mapping.model_dump_json())
    assert mapping == pickle.loads(pickle.dumps(mapping))
    assert hash(mapping) == hash(Mapping(4, 3, 4, 2, 2))
    assert mapping.replace(rank=1).rank == 1
    with pytest.raises(ValueError, match="frozen"):
        mapping.rank = 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 4, "tp_size": 2}, r"2 \* 1 is not 4"),
        ({"tp_size": 2}, "world_size"),
        ({"world_size": 2, "tp_size": 2, "rank": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"rank": -1}, "rank"),
        ({"world_size": 0}, "world_size"),
        ({"tp_size": 0}, "tp_size"),
        ({"pp_size": 0}, "pp_size"),
        ({"gpus_per_node": 0}, "gpus_per_node"),
        ({"cp_size": 1}, "no field 'cp_size'"),
    ],
)
def test_mapping_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Mapping(**fields)
    assert isinstance(caught.value, ValueError)


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    assert [m.pp_layers(7) for m in every_rank(1, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [m.pp_layers(1) for m in every_rank(1, 2)] == [[0], []]
    with pytest.raises(ConfigError, match="negative"):
        Mapping().pp_layers(-1)


def test_experts() -> None:
    assert [m.ep_experts(4) for m in every_rank(2, 2)] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    for number in (3, -2):
        with pytest.raises(ConfigError, match="experts"):
            Mapping(2, 0, 8, 2, 1).ep_experts(number)


@given(worlds)
def test_groups_partition_the_ranks(world: tuple[int, int, int]) -> None:
    tp, pp, gpus = world
    for mapping in every_rank(tp, pp, gpus):
        for groups in (mapping.tp_groups, mapping.pp_groups):
            assert sorted(rank for group in groups for rank in group) == list(range(tp * pp))
        assert mapping.tp_group[mapping.tp_rank] == mapping.rank == mapping.pp_group[mapping.pp_rank]
        assert mapping.pp_group[(mapping.pp_rank + 1) % pp] == mapping.next_pp_rank()
        assert mapping.pp_group[mapping.pp_rank - 1] == mapping.prev_pp_rank()
        assert mapping.node_rank * gpus + mapping.local_rank == mapping.rank
        assert mapping.world().mapping() == mapping


@given(worlds, st.integers(0, 100))
def test_stages_cover_all_layers_in_order(world: tuple[int, int, int], layers: int) -> None:
    tp, pp, gpus = world
    ranks = every_rank(tp, pp, gpus)
    shares = [ranks[rank].pp_layers(layers) for rank in ranks[0].pp_group]
    assert [layer for share in shares for layer in share] == list(range(layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# WorldConfig


def test_world_defaults() -> None:
    world = WorldConfig()
    assert (world.size, world.rank, world.last_rank, world.gpus_per_group, world.device) == (1, 0, 0, 8, 0)
    assert not world.is_tensor_parallel
    assert not world.is_pipeline_parallel
    assert world.mapping() == Mapping()


def test_world_worked_example() -> None:
    world = WorldConfig(2, 2, 3, 4)
    assert (world.size, world.last_rank, world.gpus_per_group, world.device) == (4, 3, 4, 3)
    assert (world.tensor_parallel_rank, world.pipeline_parallel_rank) == (1, 1)
    assert world.tensor_parallel_group == [2, 3]
    assert world.pipeline_parallel_group == [1, 3]
    assert world.is_tensor_parallel
    assert world.is_pipeline_parallel
    assert world.is_last_pipeline_parallel_rank
    assert not world.is_first_pipeline_parallel_rank
    assert world.mapping() == Mapping(4, 3, 4, 2, 2)


def test_devices_repeat_on_each_machine() -> None:
    world = WorldConfig(4, 1, 3, 4, [1, 2])
    assert world.gpus_per_group == 2
    assert [world.device_of(rank) for rank in range(4)] == [1, 2, 1, 2]
    assert world.device == 2
    assert [WorldConfig(4, 1, 0, 2).device_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert WorldConfig(2, 1, 0, 2, [1, 0]).device == 1
    assert Mapping(2, 1, 4, 2, 1).world([2, 3]).device == 3


def test_gaps_between_devices_draw_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"\[0, 2\] are not contiguous") as caught:
        WorldConfig(2, 1, 0, 4, [0, 2])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WorldConfig(2, 1, 0, 4, [2, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallelism": 0}, "tensor_parallelism"),
        ({"pipeline_parallelism": -1}, "pipeline_parallelism"),
        ({"tensor_parallelism": 2, "rank": 2}, r"rank must be in \[0, 2\)"),
        ({"gpus_per_node": 2, "device_ids": [0, 1, 2]}, "1 to 2"),
        ({"device_ids": []}, "got 0"),
        ({"gpus_per_node": 2, "device_ids": [2]}, r"in \[0, 2\)"),
        ({"device_ids": [-1]}, r"in \[0, 8\)"),
        ({"device_ids": [1, 1]}, "unique"),
        ({"deviceIds": [1]}, "no field 'deviceIds'"),
    ],
)
def test_world_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**fields)


# MPI and torchrun


def fake_mpi(monkeypatch: pytest.MonkeyPatch, size: int, rank: int) -> None:
    module = ModuleType("mpi4py")
    world = SimpleNamespace(Get_size=lambda: size, Get_rank=lambda: rank)
    module.MPI = SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", module)


def test_mpi_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpi(monkeypatch, 2, 1)
    assert WorldConfig.mpi() == WorldConfig(2, 1, 1, 8)
    assert WorldConfig.mpi(4, pipeline_parallelism=2) == WorldConfig(1, 2, 1, 4)
    assert WorldConfig.mpi(4, 2, 1, [2, 3]).device == 3
    assert WorldConfig.mpi().valid_mpi_config()
    assert not WorldConfig().valid_mpi_config()
    for tp, pp in [(1, 1), (2, 2), (None, 3), (3, None)]:
        with pytest.raises(ConfigError, match="MPI started 2 ranks"):
            WorldConfig.mpi(8, tp, pp)
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        WorldConfig.mpi(8, -2, -1)


def test_mpi_on_five_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpi(monkeypatch, 5, 4)
    assert WorldConfig.mpi() == WorldConfig(5, 1, 4, 8)
    assert WorldConfig.mpi(pipeline_parallelism=5) == WorldConfig(1, 5, 4, 8)
    with pytest.raises(ConfigError, match=r"MPI started 5 ranks, .* 2 \* pipeline_parallelism 2 needs 4"):
        WorldConfig.mpi(pipeline_parallelism=2)


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"pip install trtllm-core\[mpi\]"):
        WorldConfig.mpi()
    with pytest.raises(ConfigError, match=r"pip install trtllm-core\[mpi\]"):
        WorldConfig().valid_mpi_config()


def test_real_mpi() -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    code = """if True:
        try:
            from mpi4py import MPI
        except RuntimeError as error:  # no MPI library on this machine
            raise SystemExit(77)
        from trtllm_core.config.mapping import WorldConfig
        world = WorldConfig.mpi()
        assert world == WorldConfig(1, 1, 0, 8) and world.valid_mpi_config(), world
    """
    # A process of its own: starting MPI cannot be undone, and may end the process.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("mpi4py finds no MPI library")
    assert done.returncode == 0, done.stderr


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert WorldConfig.from_env() == WorldConfig(4, 1, 3, 2)
    assert WorldConfig.from_env(pipeline_parallelism=2) == WorldConfig(2, 2, 3, 2)
    with pytest.raises(ConfigError, match="torchrun started 4 ranks"):
        WorldConfig.from_env(tensor_parallelism=3)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert WorldConfig.from_env() == WorldConfig(4, 1, 3, 8)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="rank must be in"):
        WorldConfig.from_env()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK must be a whole number, got 'first'"):
        WorldConfig.from_env()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        WorldConfig.from_env()


def test_imports_neither_torch_nor_mpi() -> None:
    code = "import sys, trtllm_core.config.mapping; assert not {'torch', 'mpi4py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
