"""What workers ask Ray for, and what is said where it is not there. No Ray is started."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrain import placement
from distrain.config import WorkersConfig
from distrain.errors import ClusterError, Interrupted
from distrain.placement import Cluster, Placement, bundle, check_local_room
from tests.support.jobs import distrain, write_job


@pytest.mark.parametrize(
    ("workers", "bundles"),
    [
        ({"count": 2, "cpus": 2}, [{"CPU": 2}, {"CPU": 2}]),
        ({"count": 2, "gpus": 1}, [{"CPU": 1, "GPU": 1}] * 2),
        ({"count": 2, "gpus": 0.5}, [{"CPU": 1, "GPU": 0.5}] * 2),
        ({"count": 3, "gpus": 1, "gpu_count": 1}, [{"CPU": 1, "GPU": 1}, {"CPU": 1}, {"CPU": 1}]),
    ],
)
def test_a_worker_asks_for_its_gpu_or_its_part_of_one_or_none(workers: dict, bundles: list[dict[str, float]]):
    config = WorkersConfig(**workers)
    assert [bundle(config, rank) for rank in range(config.count)] == bundles


def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ClusterError, match=r"^asked for 1.5 GPUs \(3 workers of 0.5\), this machine has 1"):
        check_local_room(WorkersConfig(count=3, gpus=0.5))
    room = check_local_room(WorkersConfig(count=2, gpus=0.5))
    assert (room.asked_gpus, room.there_gpus) == (1.0, 1.0)


class Room:
    """A placement group that never comes, but for one."""

    def __init__(self, comes: bool) -> None:
        self.comes = comes

    def wait(self, timeout_seconds: float) -> bool:
        if not self.comes:
            time.sleep(timeout_seconds)
        return self.comes


@pytest.mark.parametrize("comes", [3, None])
def test_a_ray_that_is_started_anew_for_room_takes_nothing_from_the_wait(
    monkeypatch: pytest.MonkeyPatch, comes: int | None
):
    class Slow(placement.Cluster):
        starts = 0

        def _start_local(self) -> None:
            self.starts += 1
            if self.starts > 1:
                time.sleep(0.5)

    rooms = [Room(number == comes) for number in range(1, 9)]
    monkeypatch.setattr(placement, "_RESERVE_SECONDS", 0.4)
    monkeypatch.setattr(placement, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: rooms.pop(0))
    lost = {"state": "PENDING", "stats": {"scheduling_state": "QUEUED"}}
    monkeypatch.setattr(placement, "placement_group_table", lambda _: lost)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    cluster = Slow("local", WorkersConfig(count=2))
    if comes is None:
        with pytest.raises(ClusterError, match=r"no room came free within 0.4 s: 0 of 2 CPUs are free"):
            cluster._await_room(print, lambda: False)
        assert cluster.starts == 4  # after 0.05, 0.1 and 0.2 s of waiting
    else:
        assert cluster._await_room(print, lambda: False).comes and cluster.starts == 3


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a cluster has that this process is connected to."""
    there = {"CPU": 1.0}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("ray.available_resources", lambda: there)
    return there


def test_a_small_cluster_is_refused_unless_it_may_grow(attached: dict[str, float]):
    with pytest.raises(ClusterError, match=r"asked for 2 CPUs.*has 1\. .*cluster\.wait_seconds"):
        Cluster("here", WorkersConfig(count=2))
    with pytest.raises(ClusterError, match="asked for 1 GPUs"):
        Cluster("here", WorkersConfig(count=1, gpus=1))
    assert Cluster("here", WorkersConfig(count=2, gpus=1), wait_seconds=9).resources.there_cpus == 1


def test_a_cluster_that_was_refused_is_left(monkeypatch: pytest.MonkeyPatch, attached: dict[str, float]):
    calls: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: bool(calls))
    monkeypatch.setattr("ray.init", lambda **_: calls.append("init"))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("shutdown"))
    with pytest.raises(ClusterError, match="asked for 2 CPUs"):
        Cluster("a-cluster", WorkersConfig(count=2))
    assert calls == ["init", "shutdown"]


def test_waiting_for_room_is_told_and_ends_where_the_run_is_to_stop(
    monkeypatch: pytest.MonkeyPatch, attached: dict[str, float]
):
    monkeypatch.setattr(placement, "_PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(placement, "placement_group", lambda *_, **__: Room(False))
    monkeypatch.setattr(placement, "placement_group_table", lambda _: {"state": "PENDING", "stats": {
        "scheduling_state": "QUEUED"}})  # fmt: skip
    monkeypatch.setattr(placement, "remove_placement_group", lambda _: None)
    notes: list[str] = []
    cluster = Cluster("here", WorkersConfig(count=2), wait_seconds=30)
    assert cluster.reserve(notes.append, lambda: bool(notes)) is None
    assert notes == ["waiting up to 30 s for room for 2 workers of 1 CPUs: 1 of 1 CPUs are free"]


def test_a_sigterm_that_ray_takes_is_no_failure_of_the_cluster(monkeypatch: pytest.MonkeyPatch):
    def init(**_: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    for address in ("a-cluster", "local"):
        with pytest.raises(Interrupted) as stopped:
            Cluster(address, WorkersConfig(count=1))
        assert stopped.value.exit_code == 143


class State:
    """Of a cluster, as the GCS has it."""

    draining: dict[str, int]

    def __init__(self, address: str) -> None:
        pass

    def get_draining_nodes(self) -> dict[str, int]:
        return self.draining


class TestRooms:
    """Where workers are, on a cluster that is made of values: groups of bundles, and the node of each."""

    @pytest.fixture(autouse=True)
    def cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tables: dict[int, dict[int, str]] = {}  # group -> bundle -> node
        self.alive = {"a", "b", "c"}
        self.removed: list[int] = []
        State.draining = {}
        monkeypatch.setattr(placement, "GcsClient", State)
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
        monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": node, "Alive": True} for node in sorted(self.alive)])
        monkeypatch.setattr(placement, "placement_group", lambda bundles, **_: self.group({}))
        monkeypatch.setattr(placement, "remove_placement_group", lambda group: self.removed.append(group.number))
        monkeypatch.setattr(placement, "placement_group_table", self.table)

    def group(self, nodes: dict[int, str]) -> SimpleNamespace:
        number = len(self.tables)
        self.tables[number] = nodes
        return SimpleNamespace(number=number)

    def table(self, group: SimpleNamespace) -> dict:
        nodes = self.tables[group.number]
        state = "CREATED" if nodes and all(nodes.values()) else "PENDING"
        return {"state": state, "stats": {"scheduling_state": "QUEUED"}, "bundles_to_node_id": nodes}

    def placed(self, nodes: dict[int, str], stopping: bool = False, wait_s: float = 0.5) -> Placement:
        first = self.group(nodes)
        workers = WorkersConfig(count=len(nodes))
        return Placement(first, len(nodes), workers, [first], False, wait_s, lambda: stopping)

    def test_a_room_is_given_back_once_nobody_has_it(self):
        rooms = self.placed({0: "a", 1: "b"})
        rooms.ask(1)
        assert rooms.awaits(1) and rooms.arrived() == []
        self.tables[1] = {0: "c"}
        assert rooms.arrived() == [1] and not rooms.awaits(1) and rooms.nodes() == {0: "a", 1: "c"}
        rooms.give_back()
        assert self.removed == [], "rank 0 is in it still"
        rooms.ask(0)
        self.tables[2] = {0: "b"}
        rooms.arrived()
        rooms.give_back()
        assert self.removed == [0]

    def test_the_room_of_a_worker_that_has_moved_is_not_waited_for(self):
        rooms = self.placed({0: "a", 1: "b"})
        rooms.ask(1)
        self.tables[1] = {0: "c"}
        rooms.arrived()
        self.alive.remove("b")
        self.tables[0][1] = ""  # Ray looks for other room for it, and there is none
        assert rooms.settle() and rooms.server_node in {"a", "c"}

    def test_the_room_of_before_is_taken_back_where_it_is_there_again(self):
        rooms = self.placed({0: "a", 1: "b"})
        rooms.ask(1)
        State.draining = {"b": 0}
        assert not rooms.take_back(1), "it is about to go"
        State.draining = {}
        self.alive.remove("b")
        assert not rooms.take_back(1) and rooms.awaits(1)
        self.tables[0][1] = "c"  # where Ray has found other room for it
        assert rooms.take_back(1) and not rooms.awaits(1) and self.removed == [1]

    def test_other_room_that_came_counts_when_a_server_takes_over(self):
        rooms = self.placed({0: "a", 1: "b"})
        rooms.ask(1)
        self.alive.remove("b")
        self.tables[0][1], self.tables[1] = "", {0: "c"}
        assert rooms.settle() and rooms.nodes() == {0: "a", 1: "c"}

    def test_room_that_was_lost_is_waited_for_until_the_run_is_to_stop(self):
        with pytest.raises(ClusterError, match=r"no room for 2 workers of 1 CPUs came free within 0\.5 s"):
            self.placed({0: "a", 1: ""}).settle()
        assert not self.placed({0: "a", 1: ""}, stopping=True).settle()

    def test_a_node_without_a_deadline_goes_when_it_is_empty(self):
        rooms = self.placed({0: "a"})
        State.draining = {"a": 0, "b": 5_000}
        assert rooms.draining() == {"a": math.inf, "b": 5.0}


def test_a_machine_without_gpus_says_so_before_ray_starts(tmp_path: Path):
    done = distrain("train", str(write_job(tmp_path)), "workers.gpus=1", cwd=tmp_path)
    assert done.code == 3
    assert "asked for 2 GPUs (2 workers of 1), this machine has 0 (its torch" in done.stderr
