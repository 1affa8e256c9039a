"""Starts or attaches to Ray, and reserves room for the workers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distrain.errors import ClusterError

_LOCAL_WORKERS_PER_CORE = 4  # a Ray of our own lends a core to this many workers, more slowly
_OBJECT_STORE_BYTES = 128 * 1024 * 1024  # only checkpoints pass through it
_RESERVE_SECONDS = 30.0


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
    process is already connected to is used as it is.
    """

    def __init__(self, address: str | None, num_workers: int, cpus: float) -> None:
        self._num_workers, self._cpus = num_workers, cpus
        self._temporary: str | None = None
        self._owned = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.is_local = self._owned and address == "local"
        self._groups: list[PlacementGroup] = []
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about GPUs
        if self.is_local:
            self.resources = check_local_room(num_workers, cpus)
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
        if asked > there:
            raise ClusterError(
                f"asked for {asked:g} CPUs ({self._num_workers} workers of {self._cpus:g}), the cluster has {there:g}. "
                "Lower workers.count or workers.cpus, or add nodes"
            )
        return Resources(asked, there, False)

    def reserve(self) -> Placement:
        """Reserve room for the workers, together. Raises ClusterError when it is not to be had within 30 s."""
        group = placement_group([{"CPU": self._cpus}] * self._num_workers, strategy="PACK")
        self._groups.append(group)
        if not group.wait(_RESERVE_SECONDS):
            free = ray.available_resources().get("CPU", 0.0)
            raise ClusterError(
                f"asked for {self._num_workers} workers of {self._cpus:g} CPUs, and no room came free within "
                f"{_RESERVE_SECONDS:g} s: {free:g} of {self.resources.there_cpus:g} CPUs are free. Others use the "
                "cluster, or no node has that many CPUs"
            )
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return Placement(group, tuple(nodes[i] for i in range(self._num_workers)))

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


@dataclass(frozen=True)
class Placement:
    """Room for the workers: a bundle for each rank, and the node each bundle lies on."""

    group: PlacementGroup
    nodes: tuple[str, ...]

    @property
    def server_node(self) -> str:
        """The node with the most workers: there the server shares memory with as many as possible."""
        return Counter(self.nodes).most_common(1)[0][0]

    @property
    def workers_beside_server(self) -> int:
        """How many workers share the server's node."""
        return self.nodes.count(self.server_node)

    @property
    def spans_nodes(self) -> bool:
        return len(set(self.nodes)) > 1

    def for_worker(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)

    def for_server(self) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(self.server_node, soft=False)
