"""A worker: microbatch -> gradient -> push. Knows the model, the loss and its readers; nobody else."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.dataset import Dataset
from distrain.data.plan import Plan
from distrain.data.reader import Reader
from distrain.errors import DataError, DistrainError, DivergenceError, LinkError, TrainingDataError, TrainingError
from distrain.exchange.link import Address, Frame, Kind, Link, SocketLink, connect, unpack_microbatches
from distrain.exchange.memory import Layout, Published, PushSlots, views
from distrain.learning.losses import LabelError, Loss
from distrain.learning.metrics import Metrics
from distrain.learning.models import forward
from distrain.reduction import Block, Partial, TreeSum
from distrain.study.noise_scale import EVERY_STEPS

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A data set and the plan that deals its rows out."""

    dataset: Dataset
    plan: Plan


class Readers:
    """One reader for each shard that this worker is asked for, opened on first use."""

    def __init__(self, source: Source) -> None:
        self.plan = source.plan
        self._dataset = source.dataset
        self._readers: dict[int, Reader] = {}
        self._last_used: dict[int, int] = {}

    def microbatch(self, step: int, shard: int) -> Batch:
        """The rows of one microbatch: tensors of [rows, ...]."""
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = Reader(self._dataset, self.plan, shard)
        self._last_used[shard] = step
        return reader.microbatch(*self.plan.position(step))

    def place(self, step: int, shard: int, index: int) -> str:
        """File, row group and row of a microbatch's row."""
        row_group, row = self.plan.row(*self.plan.position(step), shard, index)
        return f"{self._dataset.place(row_group)}, row {row}"

    def located(self, error: LabelError, label: Tensor, step: int, shard: int) -> DataError:
        """The same error, with the file, row group, column and row that the label came from."""
        index = int((label == error.value).reshape(len(label), -1).any(1).int().argmax())
        row_group, row = self.plan.row(*self.plan.position(step), shard, index)
        columns = ", ".join(repr(name) for name in self._dataset.columns.labels)
        where = f"{self._dataset.place(row_group)}, column {columns}, row {row}"
        return TrainingDataError(f"{where}: {error.message}")

    def keep_recent(self, step: int, steps: int) -> None:
        """Close the readers of shards that went to somebody else, since their windows cost memory: those not asked for
        in the last so many steps up to `step`."""
        for shard in [shard for shard, used in self._last_used.items() if used < step - steps]:
            self._readers.pop(shard).close()
            del self._last_used[shard]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._last_used.clear()


class Worker:
    """Computes what the server asks for over a link, until it says stop.

    `model` is built as the server built it; its parameters become views into the published vector. `num_shards` is the
    run's; `seed` the run's.
    """

    def __init__(
        self,
        rank: int,
        model: nn.Module,
        loss: Loss,
        metrics: Metrics,
        train: Source,
        validation: Source | None,
        seed: int,
    ) -> None:
        self.rank = rank
        self.layout = Layout.of(model)
        self._model = model
        self._loss = loss
        self._metrics = metrics
        self._train = Readers(train)
        self._validation = Readers(validation) if validation is not None else None
        self._num_shards = train.plan.num_shards
        self._asked = -1  # the round of the last task
        self._seed = seed
        named = dict(model.named_buffers())
        self._buffers = [named[entry.name] for entry in self.layout.float_buffers]
        self._counters = [named[entry.name] for entry in self.layout.int_buffers]
        self._version = -1

    def join(self, address: Address, same_node: bool, token: str, launch: int = 0, timeout_s: float = 60.0) -> None:
        """Join a server: prove the token, take over or make the buffers. `launch` tells processes of a rank apart.

        Raises LinkError when the server cannot be reached or built another model.
        """
        hello = {
            "rank": self.rank,
            "launch": launch,
            "layout": self.layout.digest,
            "shared": same_node,
            "pid": os.getpid(),
        }
        link = connect(address, same_node, token, hello)
        welcome = link.receive(timeout_s)
        if welcome is None or welcome.kind is not Kind.WELCOME:
            raise LinkError("the parameter server did not welcome this worker in time")
        count = welcome.version
        fds = link.receive_descriptors(count + 1, timeout_s) if same_node else [None] * (count + 1)
        self.attach(
            link,
            [Published(self.layout, fd) for fd in fds[:count]],
            PushSlots(self.layout, self._num_shards, welcome.slot, fds[count]),
            welcome.incarnation,
        )
        if not same_node:
            link.sink = self._place_parameters

    def attach(self, link: Link, published: Sequence[Published], slots: PushSlots, incarnation: int) -> None:
        """Take up a link and buffers."""
        self._link = link
        self._shared = not isinstance(link, SocketLink) or link.shared
        self._incarnation = incarnation
        self._published = published
        self._slots = slots
        for vector in published:
            vector.buffer.close()
        slots.buffer.close()
        self._free: list[list[int]] = [[] for _ in range(slots.num_sets)]
        self._rounds = [-1] * slots.num_sets
        self._read_from(0)
        self._gradients = [views(slots[i], self.layout.parameters) for i in range(slots.num_slots)]
        self._changes = [views(slots[i], self.layout.float_buffers) for i in range(slots.num_slots)]
        self._counts = [views(slots[i], self.layout.int_buffers) for i in range(slots.num_slots)]

    def _read_from(self, version: int) -> None:
        """Make the model's parameters views into this one of the published vectors."""
        if version == self._version:
            return
        self._version, published = version, self._published[version]
        published.adopt_parameters(self._model, copy_in=False)
        self._published_buffers = views(published.floats, self.layout.float_buffers)
        self._published_counters = published.int_views()

    def run(self) -> None:
        """Serve until the server says stop. Raises LinkError when it goes away, and the user's errors, after telling
        the server."""
        try:
            while True:
                frame = self._link.receive()
                if frame is None or frame.kind is Kind.STOP:
                    return
                self.handle(frame)
        except LinkError:
            raise
        except DistrainError as error:
            report = {"error": type(error).__name__, "message": error.message}
            self._link.send(Frame(Kind.FAILED, self._asked, payload=json.dumps(report).encode()))
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Stop the readers."""
        self._train.close()
        if self._validation is not None:
            self._validation.close()

    def handle(self, frame: Frame) -> None:
        """Do what one frame asks for, and push the result."""
        self._asked = frame.round
        if frame.kind is Kind.TRAIN:
            self._compute(frame, self._train, self._gradient)
            self._train.keep_recent(frame.step, 1 + self._slots.num_sets)
        elif frame.kind is Kind.VALIDATE and self._validation is not None:
            self._compute(frame, self._validation, self._evaluate)
        elif frame.kind is not Kind.PUBLISH:
            raise LinkError(f"a worker cannot answer a {frame.kind.name} frame")

    def _compute(self, frame: Frame, readers: Readers, work: Callable[[Batch, int, int, list[int]], Partial]) -> None:
        """Sum `work` over the microbatches asked for, as far as the tree allows, and push each block."""
        self._read_from(frame.version)
        free = self._free_slots(frame)
        tree = TreeSum(frame.samples)
        data_s, num_bytes = 0.0, 0
        start = time.perf_counter()
        for place, (step, shard) in enumerate(unpack_microbatches(frame), start=frame.first):
            asked = time.perf_counter()
            batch = self._read(readers, step, shard)
            data_s += time.perf_counter() - asked
            num_bytes += sum(tensor.nbytes for tensor in batch.values())
            try:
                part = work(batch, step, shard, free)
            except LabelError as error:
                raise readers.located(error, batch["label"], step, shard) from error
            free += [freed.slot for freed in tree.put(Block(place, place + 1), part)]
        answer = Frame(
            Kind.PUSH,
            frame.round,
            frame.step,
            incarnation=self._incarnation,
            data_s=data_s,
            compute_s=time.perf_counter() - start - data_s,
            data_bytes=num_bytes,
        )
        for block, part in tree:
            payload: Any = b""
            if frame.kind is Kind.VALIDATE:
                payload = part.vector.numpy()
            elif not self._shared:
                payload = self._slots.bytes(part.slot)
            self._link.send(
                replace(
                    answer,
                    first=block.first,
                    stop=block.stop,
                    slot=part.slot,
                    samples=part.samples,
                    loss=part.loss,
                    weight=part.weight,
                    squares=part.squares,
                    payload=payload,
                )
            )
            answer = replace(answer, data_s=0.0, compute_s=0.0, data_bytes=0)

    def _free_slots(self, frame: Frame) -> list[int]:
        """The push slots that a training task may use, all those of its set at the round's first task."""
        if frame.kind is Kind.VALIDATE:
            return []
        if self._rounds[frame.slot] != frame.round:
            self._rounds[frame.slot] = frame.round
            self._free[frame.slot] = list(self._slots.of_set(frame.slot))[::-1]
        return self._free[frame.slot]

    def _read(self, readers: Readers, step: int, shard: int) -> Batch:
        try:
            return readers.microbatch(step, shard)
        except DataError as error:
            raise error.during_training() from error

    def _gradient(self, batch: Batch, step: int, shard: int, free: list[int]) -> Partial:
        """The gradient of one microbatch's summed loss, written into a push slot that is free."""
        slot = free.pop()
        vector = self._slots[slot]
        rows = len(batch["label"])
        if rows == 0:
            return Partial(vector.zero_(), 0, 0.0, 0.0, slot)
        for parameter in self._model.parameters():
            parameter.grad = None
        self._load_buffers()
        self._model.train()
        # torch.manual_seed would seed the other devices too, which takes 0.9 ms and, without one, piles up calls.
        torch.default_generator.manual_seed(microbatch_seed(self._seed, step, shard))
        with self._blame(batch, step, shard):
            loss, weight = self._loss.total(forward(self._model, batch), batch)
            loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(value, batch, step, shard)
        # Copying the gradients costs less than letting backward add them to zeroed views (4.8 against 5.4 ms a step
        # of an MLP 784-512-512-10 with 128 rows): autograd then hands its own tensors over instead of adding.
        for parameter, view in zip(self._model.parameters(), self._gradients[slot], strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        for change, local, published in zip(self._changes[slot], self._buffers, self._published_buffers, strict=True):
            torch.sub(local, published, out=change).mul_(rows)
        for count, local, published in zip(self._counts[slot], self._counters, self._published_counters, strict=True):
            count.copy_(local - published).mul_(rows)
        squares = 0.0
        if step % EVERY_STEPS == 0:
            gradient = vector[: self.layout.num_gradients]
            squares = torch.dot(gradient, gradient).item()
        return Partial(vector, rows, value, weight, slot, squares)

    def _diverged(self, loss: float, batch: Batch, step: int, shard: int) -> DivergenceError:
        """Names the first row whose loss is not finite, where a second look, with the same dropout, shows one."""
        torch.default_generator.manual_seed(microbatch_seed(self._seed, step, shard))
        with torch.no_grad():
            values = self._loss.per_sample(forward(self._model, batch), batch["label"])
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        where = f", first at {self._train.place(step, shard, bad[0])} ({len(bad)} of {len(values)} rows)" if bad else ""
        return DivergenceError(
            f"step {step + 1}, shard {shard}: the loss is not finite ({loss:g}){where}; the parameters were left as "
            "they were. Try a lower optimizer.lr, or clip: {norm: 1.0}"
        )

    def _evaluate(self, batch: Batch, step: int, shard: int, _: list[int]) -> Partial:
        """Loss and metric sums of one microbatch: float64 [1 + metrics]."""
        rows = len(batch["label"])
        sums = torch.zeros(self._metrics.num_sums, dtype=torch.float64)
        if rows == 0:
            return Partial(sums, 0, 0.0, 0.0)
        self._load_buffers()
        self._model.eval()
        with torch.no_grad(), self._blame(batch, step, shard):
            outputs = forward(self._model, batch)
            loss, weight = self._loss.total(outputs, batch, torch.float64)
            sums[:] = torch.tensor(self._metrics.sums(outputs, batch["label"]), dtype=torch.float64)
        return Partial(sums, rows, loss.item(), weight)

    def _load_buffers(self) -> None:
        for local, published in zip(self._buffers, self._published_buffers, strict=True):
            local.copy_(published)
        for local, published in zip(self._counters, self._published_counters, strict=True):
            local.copy_(published)

    def _place_parameters(self, frame: Frame) -> memoryview | None:
        return self._published[frame.version].bytes() if frame.kind is Kind.PUBLISH else None

    def _blame(self, batch: Batch, step: int, shard: int) -> _Blame:
        return _Blame(batch, step, shard)


class _Blame:
    """Turns what the user's model or loss raises into a TrainingError that says where, with their traceback."""

    def __init__(self, batch: Batch, step: int, shard: int) -> None:
        self._batch, self._step, self._shard = batch, step, shard

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DistrainError):
            shapes = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in self._batch.items())
            text = "".join(traceback.format_exception(error)).rstrip()
            raise TrainingError(
                f"step {self._step + 1}, shard {self._shard}: the model or the loss raised {type(error).__name__}: "
                f"{error} (microbatch: {shapes})\n{text}"
            ) from error


def microbatch_seed(seed: int, step: int, shard: int) -> int:
    """The seed of a microbatch's random draws (dropout): a function of (seed, step, shard) alone."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, shard), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
