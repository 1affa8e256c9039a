"""Starts or attaches to Ray, and reserves room for the workers."""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]  # as Ray Serve does
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distrain.config import WorkersConfig
from distrain.devices.cuda import cuda_problem
from distrain.errors import ClusterError, DistrainError, Interrupted
from distrain.ray_guard import RayGuard
from distrain.signals import handlers_kept

_LOCAL_WORKERS_PER_CORE = 4  # a Ray of our own lends a core to this many workers, more slowly
_OBJECT_STORE_BYTES = 128 * 1024 * 1024  # only checkpoints pass through it
_RESERVE_SECONDS = 30.0
_PATIENCE_SECONDS = 2.0  # after which a Ray of our own, which nobody else uses, has lost the room; doubled each time
_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_GROW_SECONDS = 2.0  # for workers beyond those that are needed, at the start


@dataclass(frozen=True)
class Resources:
    """What workers ask for, and what there is. `shared_cores`: a local Ray whose cores several workers share."""

    asked_cpus: float
    there_cpus: float
    shared_cores: bool
    asked_gpus: float = 0.0
    there_gpus: float = 0.0


def bundle(workers: WorkersConfig, rank: int) -> dict[str, float]:
    """What the worker of this rank asks Ray for."""
    gpus = workers.gpus_of(rank)
    return {"CPU": workers.cpus, "GPU": gpus} if gpus else {"CPU": workers.cpus}


def check_local_room(workers: WorkersConfig) -> Resources:
    """What a Ray of our own on this machine offers. Raises ClusterError when far too little."""
    asked, cores = workers.all_cpus, float(os.cpu_count() or 1)
    if asked > cores * _LOCAL_WORKERS_PER_CORE:
        raise ClusterError(
            f"asked for {asked:g} CPUs ({workers.count} workers of {workers.cpus:g}), this machine has {cores:g}; a "
            f"local Ray shares a core among at most {_LOCAL_WORKERS_PER_CORE} workers. Lower workers.count or "
            "workers.cpus, or give the address of a cluster (cluster.address)"
        )
    asked_gpus = workers.all_gpus
    there_gpus = float(torch.cuda.device_count()) if asked_gpus else 0.0
    _check_gpus(workers, workers.count, there_gpus, f"this machine has {there_gpus:g}")
    return Resources(asked, cores, asked > cores, asked_gpus, there_gpus)


def _each(workers: WorkersConfig) -> str:
    """What a worker asks for, in words."""
    return f"{workers.cpus:g} CPUs" + (f" and {workers.gpus:g} GPUs" if workers.gpus else "")


def _check_gpus(workers: WorkersConfig, count: int, there: float, says: str) -> None:
    """Raises ClusterError when so many workers ask for more GPUs than there are."""
    asked = sum(workers.gpus_of(rank) for rank in range(count))
    if asked > there:
        some = sum(workers.gpus_of(rank) > 0 for rank in range(count))
        why = cuda_problem() if says.startswith("this machine") else None
        raise ClusterError(
            f"asked for {asked:g} GPUs ({some} workers of {workers.gpus:g}), {says}{f' ({why})' if why else ''}. "
            "Lower workers.gpus or workers.gpu_count (0 and null: compute on CPUs), or add nodes with GPUs"
        )


def token_source() -> str:
    """Where Ray takes a cluster's token from, in words. Raises ClusterError where it is told to and there is none."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        return "none is used (RAY_AUTH_MODE=disabled)"
    try:
        is_there = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise ClusterError(str(error).partition(". ")[0]) from error
    if not is_there:
        if mode == "token":
            raise ClusterError("RAY_AUTH_MODE=token, and there is no token")
        return "none yet; a Ray of its own makes one"
    if "RAY_AUTH_TOKEN" in os.environ:
        return "from RAY_AUTH_TOKEN"
    return f"from {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"


def submitted_job_id() -> str | None:
    """The id of the submitted job whose driver this is; Ray tells it in a variable."""
    job: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job_id: str | None = job.get("metadata", {}).get("job_submission_id")
    return job_id


def check_answers(address: str) -> None:
    """Raises ClusterError where no Ray cluster answers at HOST:PORT, or not to this token.

    To be asked before `ray.init`, which ends the whole program where there is no answer, and asks again for a minute
    where the token is wrong. What names no host and port is left to Ray.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "//" in host or not port.isdigit():
        return
    with closing(http.client.HTTPConnection(host, int(port), timeout=_ANSWER_SECONDS)) as connection:
        try:
            connection.connect()
        except OSError as error:
            raise ClusterError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as ray.init does
        GcsClient(address=address)
    except Exception as error:
        if isinstance(error, AuthenticationError) or "Unauthenticated" in str(error):
            raise ClusterError(
                f"the cluster at {address} wants its token, and got none or another: it is looked for in "
                "RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
            ) from error
        raise ClusterError(f"no Ray cluster answers as it should at {address}: {error}") from error


def _init(failed: str, **settings: Any) -> None:
    """`ray.init`, which leaves this process its signal handlers: Ray's SIGTERM handler ends the program.

    Raises ClusterError, which begins with what has `failed`, and Interrupted where a SIGTERM comes before the handlers
    are given back.
    """
    with handlers_kept():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **settings)
        except SystemExit as stopped:
            raise Interrupted("stopped while Ray started", signal.SIGTERM) from stopped
        except Exception as error:
            raise ClusterError(f"{failed}: {error}") from error


def _free() -> str:
    """How much of the cluster is free, in words."""
    free, there = (found.get("CPU", 0.0) for found in (ray.available_resources(), ray.cluster_resources()))
    return f"{free:g} of {there:g} CPUs are free"


def _alive() -> set[str]:
    """The nodes that Ray has not given up."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _is_lost(table: dict[str, Any]) -> bool:
    """Whether Ray lost a call as it gave a group room. It then tries again for ever, and holds up every other group."""
    return bool(table["state"] != "CREATED" and table["stats"]["scheduling_state"] == "FAILED_TO_COMMIT_RESOURCES")


class Cluster:
    """A Ray cluster for one run: attached to where there is one, else a Ray of our own that ends with the run.

    `address`: None takes RAY_ADDRESS if set and else starts a Ray of our own; "local" never attaches. A Ray that this
    process is already connected to is used as it is. It has to have room for as many workers as a run needs to begin,
    or to get it within `wait_seconds`; None: it gets no new machines, and others may take 30 s to leave. A Ray of our
    own has room for `num_runs` such runs side by side.
    """

    def __init__(
        self, address: str | None, workers: WorkersConfig, wait_seconds: float | None = None, num_runs: int = 1
    ) -> None:
        self._workers = workers
        self._grows, self._wait_s = wait_seconds is not None, _RESERVE_SECONDS if wait_seconds is None else wait_seconds
        self._needed, self._most, self._num_runs = workers.needed, workers.most, num_runs
        self._temporary: str | None = None
        self._guard: RayGuard | None = None
        self._owned = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.is_local = self._owned and address == "local"
        self._groups: list[PlacementGroup] = []
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about GPUs
        if self.is_local:
            self.resources = check_local_room(workers)
            self._start_local()
        elif self._owned:
            self._attach(address)
        if not self.is_local:
            try:
                self.resources = self._check_room()
            except ClusterError:
                self.close()  # the next run in this process may be meant for another cluster
                raise

    def _start_local(self) -> None:
        self._temporary = tempfile.mkdtemp(prefix="distrain-ray-")
        self._guard = RayGuard(self._temporary)
        try:
            _init(
                "a local Ray could not be started",
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(self._num_runs * self.resources.asked_cpus)),
                num_gpus=int(self.resources.there_gpus) or None,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=self._temporary,
                _system_config={"worker_niceness": 0},  # Ray's 15 lets anything else on the machine go first
            )
        except DistrainError:
            self.close()
            raise

    def _attach(self, address: str) -> None:
        check_answers(address)
        try:
            _init(f"no Ray cluster could be reached at {address}", address=address)
        except DistrainError:
            self._owned = False
            raise

    def _check_room(self) -> Resources:
        all_there = ray.cluster_resources()
        there, gpus = all_there.get("CPU", 0.0), all_there.get("GPU", 0.0)
        needed = self._needed * self._workers.cpus
        found = Resources(self._workers.all_cpus, there, False, self._workers.all_gpus, gpus)
        if self._grows:
            return found
        if needed > there:
            key = "workers.count" if self._needed == self._workers.count else "workers.min"
            raise ClusterError(
                f"asked for {needed:g} CPUs ({self._needed} workers of {self._workers.cpus:g}), the cluster has "
                f"{there:g}. Lower {key} or workers.cpus, or add nodes; where something adds them when they are asked "
                "for, cluster.wait_seconds says how long that may take"
            )
        _check_gpus(self._workers, self._needed, gpus, f"the cluster has {gpus:g}")
        return found

    def reserve(
        self, note: Callable[[str], None] = lambda message: None, stopping: Callable[[], bool] = lambda: False
    ) -> Placement | None:
        """Reserve room for the workers that are needed, together; None where `stopping` came first. `note` is told
        that it is waited for. Raises ClusterError when there is none within the time for it."""
        group = self._await_room(note, stopping)
        if group is None:
            return None
        may_grow = self._needed < self._most
        placement = Placement(group, self._needed, self._workers, self._groups, may_grow, self._wait_s, stopping)
        if not placement.settle():
            return None
        for rank in range(self._needed, self._most):
            placement.ask(rank)
        until = time.monotonic() + _GROW_SECONDS
        while len(placement.ranks) < self._workers.count and time.monotonic() < until:
            placement.arrived()
            time.sleep(0.05)
        return placement

    def _await_room(self, note: Callable[[str], None], stopping: Callable[[], bool]) -> PlacementGroup | None:
        """A placement group that is there. What Ray loses of the calls that make it is asked for again."""
        until, patience, group = time.monotonic() + self._wait_s, _PATIENCE_SECONDS, None
        is_told = self.is_local
        while not stopping():
            if group is None:
                group = placement_group([bundle(self._workers, rank) for rank in range(self._needed)], strategy="PACK")
                self._groups.append(group)
            if group.wait(max(min(patience, until - time.monotonic()), 0.0)):
                return group
            if time.monotonic() >= until:
                raise ClusterError(
                    f"asked for {self._needed} workers of {_each(self._workers)}, and no room came free within "
                    f"{self._wait_s:g} s: {_free()}. Others use the cluster, or no node has as much for one worker"
                )
            if not is_told:
                is_told = True
                note(
                    f"waiting up to {self._wait_s:g} s for room for {self._needed} workers of {_each(self._workers)}: "
                    f"{_free()}"
                )
            if _is_lost(placement_group_table(group)):
                self._groups.remove(group)
                remove_placement_group(group)
                group = None
            elif self.is_local:
                # A call's answer was lost: the node holds the room, and nobody knows. Only a new Ray gets it back.
                began = time.monotonic()
                self.close()
                self._start_local()
                until += time.monotonic() - began  # its start may take 20 s where calls are lost, and is no waiting
                group, patience = None, 2 * patience
        return None

    def close(self) -> None:
        """Give the room back; end a Ray of our own and remove its files."""
        if ray.is_initialized():
            for group in self._groups:
                remove_placement_group(group)
            if self._owned:
                ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None
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
        self,
        group: PlacementGroup,
        num_workers: int,
        workers: WorkersConfig,
        groups: list[PlacementGroup],
        may_grow: bool,
        wait_s: float,
        stopping: Callable[[], bool],
    ) -> None:
        self._needed, self._workers, self._groups, self._may_grow = num_workers, workers, groups, may_grow
        self._wait_s, self._stopping = wait_s, stopping
        self._rooms = {rank: _Room(group, rank) for rank in range(num_workers)}
        self._asked: dict[int, PlacementGroup] = {}
        self._cluster_state = GcsClient(address=ray.get_runtime_context().gcs_address)
        self.server_node = ""

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

    def settle(self) -> bool:
        """Choose the server's node: that of the most workers, so that it shares memory with as many as it can.

        After a node died this waits for Ray to find other room for the workers that are needed. False where the run was
        asked to stop meanwhile. Raises ClusterError when there is none within the time for it.
        """
        until = time.monotonic() + self._wait_s
        while True:
            self.arrived()
            nodes, alive = self.nodes(), _alive()
            if all(nodes.get(rank) in alive for rank in range(self._needed)):
                break
            if self._stopping():
                return False
            if time.monotonic() > until:
                raise ClusterError(
                    f"the cluster has lost nodes, and no room for {self._needed} workers of {_each(self._workers)} "
                    f"came free within {self._wait_s:g} s"
                )
            time.sleep(_LOOK_SECONDS)
        leaving = self.draining()
        counts = Counter(node for node in nodes.values() if node in alive)
        candidates = [node for node, _ in counts.most_common() if node not in leaving] or list(alive - leaving.keys())
        self.server_node = candidates[0] if candidates else next(iter(alive))
        return True

    def nodes_of_slices(self, count: int) -> list[str]:
        """The nodes of so many servers of slices, beside the server's: each on another one where there are enough,
        those of the most workers first, as they have relays anyway."""
        leaving = self.draining()
        workers = Counter(self.nodes().values())
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        nodes.sort(key=lambda node: (node == self.server_node, -workers[node]))
        nodes = nodes or [self.server_node]
        return [nodes[number % len(nodes)] for number in range(count)]

    def ask(self, rank: int) -> None:
        """Ask for room for a worker, or for other room than it has. It comes when the cluster has it: see `arrived`."""
        if rank not in self._asked:
            self._asked[rank] = placement_group([bundle(self._workers, rank)])
            self._groups.append(self._asked[rank])

    def awaits(self, rank: int) -> bool:
        """Whether other room was asked for, and has not come."""
        return rank in self._asked

    def take_back(self, rank: int) -> bool:
        """Whether a rank's room of before is there again, on a node that stays: then no other is waited for."""
        if self.nodes().get(rank) not in _alive() - self.draining().keys():
            return False
        self._groups.remove(group := self._asked.pop(rank))
        remove_placement_group(group)
        return True

    def give_back(self) -> None:
        """Give back the groups of rooms that nobody has any more, with whoever is in one still: where all who moved
        have left. (The workers that are needed have one group: it is kept until the last of them has moved.)"""
        kept = {id(group) for group in [*(room.group for room in self._rooms.values()), *self._asked.values()]}
        for group in [group for group in self._groups if id(group) not in kept]:
            self._groups.remove(group)
            remove_placement_group(group)

    def arrived(self) -> list[int]:
        """The ranks whose room has come since the last call."""
        tables = {rank: placement_group_table(group) for rank, group in self._asked.items()}
        for rank in [rank for rank, table in tables.items() if _is_lost(table)]:
            self._groups.remove(group := self._asked.pop(rank))
            remove_placement_group(group)
            self.ask(rank)
        ranks = [rank for rank, table in tables.items() if table["state"] == "CREATED"]
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
        """The nodes that are about to go (spot preemption, scaling down), each with the Unix seconds of its end, which
        are infinite where it goes when it is empty."""
        deadlines: dict[str, int] = self._cluster_state.get_draining_nodes()
        return {node: deadline / 1000 if deadline else math.inf for node, deadline in deadlines.items()}

    def for_worker(self, rank: int) -> PlacementGroupSchedulingStrategy:
        room = self._rooms[rank]
        return PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=room.bundle)

    def for_server(self) -> NodeAffinitySchedulingStrategy:
        return self.on(self.server_node)

    def on(self, node: str) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(node, soft=False)
