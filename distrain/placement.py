"""Starts or attaches to Ray, and reserves room for the workers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # whom Ray Serve asks for draining nodes
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distrain.config import WorkersConfig
from distrain.errors import ClusterError

_LOCAL_WORKERS_PER_CORE = 4  # a Ray of our own lends a core to this many workers, more slowly
_OBJECT_STORE_BYTES = 128 * 1024 * 1024  # only checkpoints pass through it
_RESERVE_SECONDS = 30.0
_GROW_SECONDS = 2.0  # for workers beyond those that are needed, at the start


@dataclass(frozen=True)
class Resources:
    """What workers ask for, and what there is. `shared_cores`: a local Ray whose cores several workers share."""

    asked_cpus: float
    there_cpus: float
    shared_cores: bool


def check_local_room(num_workers: int, cpus: float) -> Resources:
    """What a Ray of our own on this machine offers. Raises ClusterError when far too little."""
    asked, cores = num_workers * cpus, float(os.cpu_count() or 1)
    if asked > cores * _LOCAL_WORKERS_PER_CORE:
        raise ClusterError(
            f"asked for {asked:g} CPUs ({num_workers} workers of {cpus:g}), this machine has {cores:g}; a local Ray "
            f"shares a core among at most {_LOCAL_WORKERS_PER_CORE} workers. Lower workers.count or workers.cpus, or "
            "give the address of a cluster (cluster.address)"
        )
    return Resources(asked, cores, asked > cores)


class Cluster:
    """A Ray cluster for one run: attached to where there is one, else a Ray of our own that ends with the run.

    `address`: None takes RAY_ADDRESS if set and else starts a Ray of our own; "local" never attaches. A Ray that this
    process is already connected to is used as it is. There has to be room for as many
    workers as a run needs to begin.
    """

    def __init__(self, address: str | None, workers: WorkersConfig) -> None:
        self._num_workers, self._cpus = workers.count, workers.cpus
        self._needed, self._most = workers.needed, workers.most
        self._temporary: str | None = None
        self._owned = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.is_local = self._owned and address == "local"
        self._groups: list[PlacementGroup] = []
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about GPUs
        if self.is_local:
            self.resources = check_local_room(workers.count, workers.cpus)
            self._start_local()
        elif self._owned:
            self._attach(address)
        if not self.is_local:
            self.resources = self._check_room()
        # The id of a submitted job; Ray tells its driver in this variable.
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        self.job_id: str | None = job.get("metadata", {}).get("job_submission_id")

    def _start_local(self) -> None:
        self._temporary = tempfile.mkdtemp(prefix="distrain-ray-")
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, int(-(-self.resources.asked_cpus // 1))),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _temp_dir=self._temporary,
                _system_config={"worker_niceness": 0},  # Ray's 15 lets anything else on the machine go first
            )
        except Exception as error:
            self.close()
            raise ClusterError(f"a local Ray could not be started: {error}") from error

    def _attach(self, address: str) -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:
            self._owned = False
            raise ClusterError(f"no Ray cluster could be reached at {address}: {error}") from error

    def _check_room(self) -> Resources:
        asked, there = self._num_workers * self._cpus, ray.cluster_resources().get("CPU", 0.0)
        needed = self._needed * self._cpus
        if needed > there:
            key = "workers.count" if self._needed == self._num_workers else "workers.min"
            raise ClusterError(
                f"asked for {needed:g} CPUs ({self._needed} workers of {self._cpus:g}), the cluster has {there:g}. "
                f"Lower {key} or workers.cpus, or add nodes"
            )
        return Resources(asked, there, False)

    def reserve(self) -> Placement:
        """Reserve room for the workers that are needed, together. Raises ClusterError when it is not to be had within
        30 s."""
        group = placement_group([{"CPU": self._cpus}] * self._needed, strategy="PACK")
        self._groups.append(group)
        if not group.wait(_RESERVE_SECONDS):
            free = ray.available_resources().get("CPU", 0.0)
            raise ClusterError(
                f"asked for {self._needed} workers of {self._cpus:g} CPUs, and no room came free within "
                f"{_RESERVE_SECONDS:g} s: {free:g} of {self.resources.there_cpus:g} CPUs are free. Others use the "
                "cluster, or no node has that many CPUs"
            )
        placement = Placement(group, self._needed, self._cpus, self._groups, may_grow=self._needed < self._most)
        for rank in range(self._needed, self._most):
            placement.ask(rank)
        until = time.monotonic() + _GROW_SECONDS
        while len(placement.ranks) < self._num_workers and time.monotonic() < until:
            placement.arrived()
            time.sleep(0.05)
        return placement

    def close(self) -> None:
        """Give the room back; end a Ray of our own and remove its files."""
        if ray.is_initialized():
            for group in self._groups:
                remove_placement_group(group)
            if self._owned:
                ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._groups = []


@dataclass(frozen=True, slots=True)
class _Room:
    """Room for one worker: a bundle of a placement group."""

    group: PlacementGroup
    bundle: int


class Placement:
    """Room for workers, by rank: the first `num_workers` reserved together, others as the cluster gains room.

    Each further one is asked for as a placement group of its own, which an autoscaler sees. `groups` gets them, to be
    given back at the end.
    """

    def __init__(
        self, group: PlacementGroup, num_workers: int, cpus: float, groups: list[PlacementGroup], may_grow: bool
    ) -> None:
        self._group, self._cpus, self._groups, self._may_grow = group, cpus, groups, may_grow
        self._rooms = {rank: _Room(group, rank) for rank in range(num_workers)}
        self._asked: dict[int, PlacementGroup] = {}
        self._cluster_state = GcsClient(address=ray.get_runtime_context().gcs_address)
        self.server_node = ""
        self.settle()

    @property
    def ranks(self) -> list[int]:
        """The ranks that there is room for."""
        return sorted(self._rooms)

    @property
    def workers_beside_server(self) -> int:
        """How many workers share the server's node."""
        return list(self.nodes().values()).count(self.server_node)

    @property
    def spans_nodes(self) -> bool:
        """Whether workers are on other nodes than the server, or may come to be."""
        return self._may_grow or len(set(self.nodes().values())) > 1 or len(ray.nodes()) > 1

    def settle(self) -> None:
        """Choose the server's node: that of the most workers, so that it shares memory with as many as it can.

        After a node died this waits for Ray to find other room. Raises ClusterError when it finds none.
        """
        if not self._group.wait(_RESERVE_SECONDS):
            raise ClusterError(
                f"the cluster has lost nodes, and no room for {len(self._rooms)} workers of {self._cpus:g} CPUs came "
                f"free within {_RESERVE_SECONDS:g} s"
            )
        leaving = self.draining()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        counts = Counter(node for node in self.nodes().values() if node in alive)
        candidates = [node for node, _ in counts.most_common() if node not in leaving] or list(alive - leaving.keys())
        self.server_node = candidates[0] if candidates else next(iter(alive))

    def ask(self, rank: int) -> None:
        """Ask for room for a worker, or for other room than it has. It comes when the cluster has it: see `arrived`."""
        if rank not in self._asked:
            self._asked[rank] = placement_group([{"CPU": self._cpus}])
            self._groups.append(self._asked[rank])

    def arrived(self) -> list[int]:
        """The ranks whose room has come since the last call."""
        ranks = [rank for rank, group in self._asked.items() if placement_group_table(group)["state"] == "CREATED"]
        for rank in ranks:
            self._rooms[rank] = _Room(self._asked.pop(rank), 0)
        return ranks

    def nodes(self) -> dict[int, str]:
        """The node of each rank's room, where it has one now."""
        tables = {id(room.group): placement_group_table(room.group) for room in self._rooms.values()}
        found: dict[int, str] = {}
        for rank, room in self._rooms.items():
            nodes = tables[id(room.group)]["bundles_to_node_id"]
            if room.bundle in nodes:
                found[rank] = nodes[room.bundle]
        return found

    def draining(self) -> dict[str, float]:
        """The nodes that are about to go (spot preemption, scaling down), each with the Unix seconds of its end."""
        deadlines: dict[str, int] = self._cluster_state.get_draining_nodes()
        return {node: deadline / 1000 for node, deadline in deadlines.items()}

    def for_worker(self, rank: int) -> PlacementGroupSchedulingStrategy:
        room = self._rooms[rank]
        return PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=room.bundle)

    def for_server(self) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(self.server_node, soft=False)
