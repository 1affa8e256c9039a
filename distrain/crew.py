"""The Ray actors of one run: a server and its workers, started, watched and replaced. No Ray call belongs to a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from distrain.actors import (
    Ready,
    RelayActor,
    Restored,
    RunSpec,
    ServerActor,
    SpareActor,
    UpdateSpec,
    WorkerActor,
    worker_failure,
)
from distrain.config import WorkersConfig
from distrain.errors import ClusterError, DistrainError, LinkError, ServerLost, TrainingError
from distrain.placement import Placement
from distrain.records import Report
from distrain.server.loop import Outcome
from distrain.supervision import Fail, GiveUp, Replace, Supervision

_POLL_SECONDS = 0.25
_END_SECONDS = 2.0
_LOOK_SECONDS = 1.0  # how often the cluster is looked at for room gained and nodes about to go
_BEFORE_THE_END_S = 5.0  # a worker for which no other room was found leaves its node so long before that goes
MOVING = "moving to another node"


@dataclass(slots=True)
class _Relay:
    """A node's relay, and its calls under way. `is_lost`: the server has given it up."""

    launch: int
    node: str
    slice: int | None
    actor: Any
    ready: Any
    running: Any
    is_lost: bool = False


class Crew:
    """One parameter server and its workers.

    `start`, then `await_server`, `train`, and `watch` until it gives the outcome. After ServerLost, `dismiss` what is
    left and `start` again. `note` is told what a person should know.
    """

    def __init__(
        self,
        placement: Placement,
        run: RunSpec,
        update: UpdateSpec,
        workers: WorkersConfig,
        note: Callable[[str], None],
    ) -> None:
        self._placement, self._run, self._update, self._config, self._note = placement, run, update, workers, note
        self._supervision = Supervision(workers.most, workers.min)
        self._server: Any = None
        self._ready: Any = None  # the server's call that makes it ready
        self._running: Any = None  # the server's call that trains
        self._relays: list[_Relay] = []
        self._workers: dict[int, Any] = {}  # by launch
        self._launches = 0  # of workers and relays
        self._num_reports = self._num_snapshots = 0  # had from the server
        self._worker_calls: dict[Any, tuple[int, int]] = {}  # the call under way on each worker -> (rank, launch)
        self._told: dict[Any, tuple[int, str]] = {}  # the server's answer to a worker's end -> (rank, cause)
        self._due: list[tuple[float, int]] = []  # replacements: (monotonic seconds, rank)
        self._step = 0  # the last that the server reported
        self._has_begun = False  # some step was done
        self._stop_sent = False
        self._looked_at = 0.0
        self._peak_bytes = 0  # the most memory of a worker that has ended
        self._nodes: dict[int, str] = {}  # launch -> the node of the room it was started in
        self._leaving: dict[int, int] = {}  # launch on a node that is about to go -> rank
        self._joining: set[int] = set()  # launches that have not joined yet
        self._losing: set[str] = set()  # nodes that lost a worker
        self._spares: dict[str, Any] = {}  # by such a node: who takes the next one's place

    @property
    def failures(self) -> int:
        """How many workers ended before the run did."""
        return self._supervision.failures

    def start(self, restored: Restored | None, spent_s: float) -> None:
        """Start the server, to go on from `restored` after `spent_s` seconds of training, and the workers. Does not
        wait for them."""
        self._step = restored.step if restored is not None else 0
        self._stop_sent = False
        self._server = ray.remote(ServerActor).options(
            num_cpus=0,
            max_concurrency=4,
            max_restarts=0,
            max_task_retries=-1,  # a call that got lost; the actor minds that it may have been made
            scheduling_strategy=self._placement.for_server(),
        ).remote()  # fmt: skip
        self._num_reports = self._num_snapshots = 0
        update = replace(self._update, loop=replace(self._update.loop, spent_s=spent_s))
        self._ready = self._server.prepare.remote(self._run, update, restored)
        for slice_, node in enumerate(self._placement.nodes_of_slices(self._update.loop.slices - 1)):
            self._start_relay(node, slice_)
        for rank in range(self._config.most):
            if rank in self._placement.ranks:
                if self._placement.awaits(rank):
                    self._placement.take_back(rank)
                self._start_worker(rank)
            else:
                self._placement.ask(rank)

    def await_server(self, should_stop: Callable[[], bool]) -> Ready | None:
        """Wait until the server has built the model, or says what is wrong with it. None when told to stop."""
        while not ray.wait([self._ready], timeout=_POLL_SECONDS)[0]:
            if should_stop():
                return None
        return _get(self._ready)

    def train(self) -> None:
        """Have the server begin. Does not wait."""
        self._running = self._server.run.remote()

    def watch(self, stop_reason: str | None) -> Outcome | None:
        """Wait a moment, replace who ended, pass `stop_reason` on. Gives the outcome when the run is over.

        Raises what the server's run raised, ServerLost when the server is dead.
        """
        self._forget_ended_relays()
        done, _ = ray.wait([self._running, *self._worker_calls, *self._told], timeout=_POLL_SECONDS)
        if self._running in done:
            outcome: Outcome = _get(self._running)
            return outcome
        if stop_reason is not None and not self._stop_sent:
            self._server.stop.remote(stop_reason)
            self._stop_sent = True
        for call in done:
            if call in self._told:
                self._decide(call)
            else:
                self._worker_ended(call)
        now = time.monotonic()
        for due in [due for due in self._due if due[0] <= now]:
            self._due.remove(due)
            self._start_worker(due[1])
        self._start_spares()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            self._look_at_cluster()
        return None

    def report(self) -> Report:
        """What the server has to say since it was last asked. Raises ServerLost when it is dead."""
        report: Report = _get(self._server.poll.remote(self._num_reports))
        self._num_reports += 1
        if report.steps:
            self._has_begun = True
            self._step = report.steps[-1].step
        for event in report.events:
            if event.kind == "joined":
                self._joining.discard(event.launch)
                self._supervision.joined(event.rank, event.step)
                for launch, rank in self._leaving.items():
                    if rank == event.rank and launch != event.launch:  # its replacement is there
                        self._server.retire.remote(launch)
            elif event.kind in ("lost", "lost_host"):
                self._end(event.launch)
        return report

    def _end(self, launch: int) -> None:
        """End a worker or relay that the server has given up: it may only hang."""
        if launch in self._workers:
            ray.kill(self._workers[launch])
        for relay in [relay for relay in self._relays if relay.launch == launch]:
            relay.is_lost = True  # its calls may end a while later
            ray.kill(relay.actor)

    def _next_launch(self) -> int:
        self._launches += 1
        return self._launches - 1

    def _look_at_cluster(self) -> None:
        """Start workers for which room came; move what runs on nodes that are about to go."""
        for rank in self._placement.arrived():
            for other, launch in self._worker_calls.values():
                if other == rank:  # it has this rank's room of before
                    self._leaving.setdefault(launch, rank)
            self._start_worker(rank)
        alive = {rank for rank, _ in self._worker_calls.values()} | {rank for rank, _ in self._told.values()}
        for rank in self._supervision.taken - alive - {rank for _, rank in self._due}:
            if self._placement.awaits(rank) and self._placement.take_back(rank):
                self._start_worker(rank)
        ends = self._placement.draining()
        servers = {self._placement.server_node, *(relay.node for relay in self._relays if relay.slice is not None)}
        if not servers.isdisjoint(ends) and not self._stop_sent:
            self._server.stop.remote(MOVING)
            self._stop_sent = True
        for launch in [launch for launch, node in self._nodes.items() if node in ends and launch in self._workers]:
            rank = next(rank for rank, number in self._worker_calls.values() if number == launch)
            if launch not in self._leaving:
                self._leaving[launch] = rank
                self._placement.ask(rank)
                self._note(f"the node of worker {rank} is about to go; it moves as soon as there is other room")
            elif time.time() > ends[self._nodes[launch]] - _BEFORE_THE_END_S:
                self._server.retire.remote(launch)

    def take_snapshot(self) -> Any:
        """The oldest snapshot waiting at the server, or None. Raises ServerLost when it is dead."""
        snapshot = _get(self._server.take_snapshot.remote(self._num_snapshots))
        self._num_snapshots += 1
        return snapshot

    def peak_worker_bytes(self) -> int:
        """The most memory that a worker ever held, once the run is over; 0 where none said it in time."""
        calls = list(self._worker_calls)
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=_END_SECONDS) if calls else ([], [])
        for call in ended:
            with suppress(RayError, DistrainError):
                self._peak_bytes = max(self._peak_bytes, ray.get(call, timeout=0))
        return self._peak_bytes

    def move(self) -> bool:
        """End all actors, so that `start` can start them elsewhere. False where the run was asked to stop meanwhile."""
        self.close()
        self._placement.give_back()
        return self._placement.settle()

    def dismiss(self, lost: ServerLost, furthest_step: int) -> bool:
        """End what is left after the server died, and wait as long as is wise before the next start.

        `furthest_step` is the last that any server of the run reported. False where the run was asked to stop
        meanwhile. Raises TrainingError when it died too often without getting further.
        """
        self.close()
        decision = self._supervision.server_ended(lost.message, furthest_step)
        if isinstance(decision, Fail):
            raise TrainingError(decision.message)
        time.sleep(decision.after_s)
        self._placement.give_back()
        return self._placement.settle()

    def close(self) -> None:
        """End every actor that is left."""
        if self._server is None:
            return
        relays = [relay.actor for relay in self._relays]
        for actor in [self._server, *relays, *self._workers.values(), *self._spares.values()]:
            ray.kill(actor)
        self._relays.clear()
        self._spares.clear()
        self._losing.clear()
        self._joining.clear()
        calls = list(self._worker_calls)
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=_END_SECONDS)
        for call in calls:  # Ray prints the errors of calls that nobody asks for
            with suppress(RayError, DistrainError):
                ray.get(call, timeout=0)
        self._server = None
        self._workers.clear()
        self._worker_calls.clear()
        self._told.clear()
        self._due.clear()
        self._nodes.clear()
        self._leaving.clear()

    def _start_relay(self, node: str, slice_: int | None = None) -> _Relay:
        """Start a relay on a node, to own a slice if one is given."""
        actor = ray.remote(RelayActor).options(
            num_cpus=0, max_restarts=0, scheduling_strategy=self._placement.on(node)
        ).remote()  # fmt: skip
        ready = actor.prepare.remote(self._run, self._update, self._ready, slice_)
        launch = self._next_launch()
        self._relays.append(_Relay(launch, node, slice_, actor, ready, actor.run.remote(launch)))
        return self._relays[-1]

    def _forget_ended_relays(self) -> None:
        """Workers of a relay's node, which end with it, get a new one. The server hears of an owner's end here, if not
        by its link: it may never have come to join."""
        for relay in [relay for relay in self._relays if ray.wait([relay.running], timeout=0)[0]]:
            self._relays.remove(relay)
            try:
                ray.get([relay.ready, relay.running])  # why it could not begin comes first
            except (RayError, DistrainError) as error:
                if relay.slice is not None:
                    lost = f"the server of slice {relay.slice} is lost: {worker_failure(error)}"
                    self._server.abort.remote(ServerLost(lost))

    def _relay_for(self, node: str) -> _Relay | None:
        """The relay by which workers of this node join; none on the server's, in asynchronous training, where pushes
        are not added up, and where the node is not known yet."""
        if node in ("", self._placement.server_node) or self._update.loop.asynchronous:
            return None
        self._forget_ended_relays()
        there = (relay for relay in self._relays if relay.node == node and not relay.is_lost)
        return next(there, None) or self._start_relay(node)

    def _start_worker(self, rank: int) -> None:
        """Start a worker in its room, or as soon as Ray has found other room where that was lost with its node. A spare
        that waits there takes the place: most of a worker's start is imports."""
        gpus = self._config.gpus_of(rank)
        self._supervision.started(rank)
        node = self._placement.nodes().get(rank, "")
        actor = self._spares.pop(node, None) if not gpus else None
        if actor is None:
            actor = ray.remote(WorkerActor).options(
                num_cpus=self._config.cpus,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=self._placement.for_worker(rank),
            ).remote()  # fmt: skip
        threads = worker_threads(self._config.cpus)
        launch = self._next_launch()
        relay = self._relay_for(node)
        by = (relay.ready, relay.node) if relay is not None else (None, "")
        call = actor.run.options(name="WorkerActor.run").remote(  # which its process is called from now on
            rank, launch, self._run, self._ready, self._placement.server_node, threads, gpus > 0, *by
        )
        self._workers[launch] = actor
        self._joining.add(launch)
        self._nodes[launch] = node
        self._worker_calls[call] = (rank, launch)

    def _note_loss(self, node: str, is_spare_useless: bool) -> None:
        """A process died on a node, which may lose more. No spare helps where memory is short, or where workers have
        GPUs, which Ray assigns to an actor as it starts."""
        if node and not is_spare_useless:
            self._losing.add(node)
            return
        self._losing.discard(node)
        if node in self._spares:
            ray.kill(self._spares.pop(node))

    def _start_spares(self) -> None:
        """Have a spare ready on each node that lost a worker, as soon as it holds up at most one worker's start."""
        if len(self._joining) > 1:
            return
        for node in self._losing - self._spares.keys():
            self._spares[node] = ray.remote(SpareActor).options(
                num_cpus=0, max_restarts=0, scheduling_strategy=self._placement.on(node)
            ).remote()  # fmt: skip

    def _worker_ended(self, call: Any) -> None:
        """Tell the server of a worker's end. What follows is decided when that has answered: where it is dead, or the
        run is over, its workers end with it, which is no failure of theirs."""
        rank, launch = self._worker_calls.pop(call)
        actor = self._workers.pop(launch)
        node = self._nodes.pop(launch)
        self._joining.discard(launch)
        has_moved = self._leaving.pop(launch, None) is not None
        if has_moved and not self._leaving:
            self._placement.give_back()
        try:
            self._peak_bytes = max(self._peak_bytes, ray.get(call))
            return  # told to stop: the run is over, or it has moved
        except RayTaskError as error:
            cause: Exception = error.cause
            is_own = isinstance(cause, DistrainError) and not isinstance(cause, LinkError)
            if is_own and ray.wait([self._running], timeout=1.0)[0]:
                return  # it told the server, which ends the run
        except RayError as error:  # it died, or ran out of memory, or is only out of reach
            cause = error
            ray.kill(actor)
            self._note_loss(node, isinstance(error, OutOfMemoryError) or self._config.gpus_of(rank) > 0)
        if has_moved and any(other == rank for other, _ in self._worker_calls.values()):
            return  # its replacement is there or starts
        if isinstance(cause, ClusterError) and not self._has_begun:  # the same would happen to a replacement
            self._server.abort.remote(cause)
            return
        failure = worker_failure(cause)
        # Its link need not have ended, if its node is out of reach.
        self._told[self._server.give_up.remote(launch, failure)] = (rank, failure)

    def _decide(self, call: Any) -> None:
        """Replace a worker whose end the server knows of, or not."""
        rank, failure = self._told.pop(call)
        try:
            if not ray.get(call):
                return  # the run is over, as its own call is about to say
        except RayError:
            return  # the server is dead, as its own call is about to say
        match self._supervision.ended(rank, failure, self._step):
            case Replace(after_s=after_s):
                self._note(f"worker {rank} is replaced: {failure}")
                if not self._placement.awaits(rank):
                    self._due.append((time.monotonic() + after_s, rank))
            case GiveUp(message=message):
                self._note(message)
            case Fail(message=message):
                self._server.abort.remote(TrainingError(message))


def worker_threads(cpus: float) -> int:
    """How many threads a worker computes with. Bits of a gradient depend on it."""
    return max(1, int(cpus))


def _get(ref: Any) -> Any:
    """`ray.get` with errors for people: ours as they are, a dead server as ServerLost."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DistrainError) else error) from None
    except (RayActorError, OutOfMemoryError) as error:
        raise ServerLost(f"the parameter server died: {worker_failure(error)}") from error
    except RayError as error:
        raise ClusterError(f"the Ray cluster failed: {error}") from error
