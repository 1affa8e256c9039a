"""A worker: microbatch -> gradient -> push. Knows the model, the loss and its readers; nobody else."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.dataset import Dataset
from distrain.data.plan import Plan
from distrain.data.reader import Reader
from distrain.devices import Arithmetic, Device, HostDevice, Intake, Key
from distrain.errors import DataError, DistrainError, DivergenceError, LinkError, TrainingDataError, TrainingError
from distrain.exchange.doorbell import Doorbell
from distrain.exchange.layout import Layout, Span
from distrain.exchange.link import Address, Frame, Kind, Link, SocketLink, connect, unpack_microbatches
from distrain.exchange.memory import Published, PushSlots
from distrain.exchange.wire import WIRES, WireDtype
from distrain.learning.clipping import global_norm
from distrain.learning.diagnostics import ActivationProbe, is_look
from distrain.learning.losses import LabelError, Loss
from distrain.learning.metrics import Metrics
from distrain.learning.nonfinite import rows_without_finite_gradient, rows_without_finite_loss
from distrain.reduction import Block, Finish, Merge, Partial, TreeSum
from distrain.study.noise_scale import EVERY_STEPS

Batch = dict[str, Tensor]
Final = Callable[[Span], None]
"""Told of values of a microbatch's vector that nothing is added to any more."""

_NAMED_ROWS = 3  # in a message
_ALIVE_SECONDS = 1.0  # between signs of life within a task


@dataclass(frozen=True)
class Source:
    """A data set and the plan that deals its rows out."""

    dataset: Dataset
    plan: Plan


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker goes about its work. With `skip_nonfinite` it leaves out microbatches whose loss or gradient is not
    finite, and says so; else they end the run."""

    skip_nonfinite: bool = False
    look_every_steps: int | None = None  # how often it looks at activations
    wire_dtype: WireDtype = "fp32"  # of the run: what gradients are rounded to


class Readers:
    """One reader for each shard that this worker is asked for, opened on first use."""

    def __init__(self, source: Source) -> None:
        self.plan = source.plan
        self._dataset = source.dataset
        self._readers: dict[int, Reader] = {}
        self._last_used: dict[int, int] = {}

    def microbatch(self, step: int, shard: int, piece: int | None = None) -> Batch:
        """The rows of one microbatch, or of a piece of it: tensors of [rows, ...]."""
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = Reader(self._dataset, self.plan, shard)
        self._last_used[shard] = step
        return reader.microbatch(*self.plan.position(step), piece)

    def num_pieces(self, step: int, shard: int) -> int:
        """In how many pieces a microbatch is computed."""
        return self.plan.num_pieces(self.plan.position(step)[1], shard)

    def first_row(self, step: int, shard: int, piece: int) -> int:
        """The place of a piece's first row in its microbatch."""
        place = self.plan.position(step)[1]
        return self.plan.piece(place, shard, piece)[0] - self.plan.cut(place, shard)[0]

    def place(self, step: int, shard: int, index: int) -> str:
        """File, row group and row of a microbatch's row."""
        row_group, row = self.plan.row(*self.plan.position(step), shard, index)
        return f"{self._dataset.place(row_group)}, row {row}"

    def located(self, error: LabelError, label: Tensor, step: int, shard: int, first: int) -> DataError:
        """The same error, with the file, row group, column and row that the label came from. `label` are those from row
        `first` of the microbatch on."""
        index = first + int((label == error.value).reshape(len(label), -1).any(1).int().argmax())
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

    `model` is built as the server built it; `device` (default: the host) takes it over and lets its parameters follow
    the published vector. `num_shards` is the run's; `seed` the run's.
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
        device: Device | None = None,
        arithmetic: Arithmetic | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        self.rank = rank
        self._options = options or WorkerOptions()
        self._is_checking = False
        self._probe = ActivationProbe(model) if self._options.look_every_steps is not None else None
        self.layout = Layout.of(model)
        self._wire = WIRES[self._options.wire_dtype](self.layout)
        self._model = model
        self._loss = loss
        self._metrics = metrics
        self._train = Readers(train)
        self._validation = Readers(validation) if validation is not None else None
        self._num_shards = train.plan.num_shards
        self._asked = -1  # the round of the last task
        self._said_at = 0.0  # time.perf_counter() of the last sign of life
        self._seed = seed
        self._device = device or HostDevice()
        self._intake = Intake(self._device)
        self._arithmetic = arithmetic or Arithmetic()
        self._scale = 0.0  # of the loss, in this task; 0: none

    def join(self, address: Address, same_node: bool, token: str, launch: int = 0, timeout_s: float = 60.0) -> None:
        """Join a server: prove the token, take over or make the buffers. `launch` tells processes of a rank apart.

        Raises LinkError when the server cannot be reached or built another model.
        """
        hello = {
            "rank": self.rank,
            "launch": launch,
            "layout": self.layout.digest,
        }
        link = connect(address, same_node, token, hello)
        welcome = link.receive(timeout_s)
        if welcome is None or welcome.kind is not Kind.WELCOME:
            raise LinkError("the parameter server did not welcome this worker in time")
        count = welcome.version
        given = link.receive_descriptors(count + 1 + Doorbell.NUM_FDS, timeout_s) if same_node else []
        fds: Sequence[int | None] = given or [None] * (count + 1)
        self.attach(
            link,
            [Published(self.layout, fd) for fd in fds[:count]],
            PushSlots(self.layout, self._num_shards, welcome.slot, fds[count]),
            welcome.incarnation,
            tells_early=bool(welcome.read),
        )
        if same_node:
            link.wait_for(Doorbell(given[count + 1 :]), self.rank)
        else:
            link.sink = self._place_parameters

    def attach(
        self,
        link: Link,
        published: Sequence[Published],
        slots: PushSlots,
        incarnation: int,
        tells_early: bool = False,
    ) -> None:
        """Take up a link and buffers. `tells_early`: say READY of what is computed of a push before it is whole."""
        is_one_piece = len(list(self.layout.pieces(self.layout.whole))) == 1  # of which the push says it all
        self._tells_early = tells_early and not is_one_piece
        self._link = link
        self._shared = not isinstance(link, SocketLink) or link.shared
        self._incarnation = incarnation
        self._published = published
        self._slots = slots
        for vector in published:
            vector.buffer.close()
        slots.buffer.close()
        self._free: list[list[int]] = [[] for _ in range(slots.num_sets)]
        self._pushed: list[dict[int, Block]] = [{} for _ in range(slots.num_sets)]  # by slot
        self._rounds = [-1] * slots.num_sets
        self._device.open(self._model, self.layout, published, slots, self._tells_early)
        self._loss.to(next(self._model.parameters()).device)

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
            if not self._is_over():
                raise
        except DistrainError as error:
            report = {"error": type(error).__name__, "message": error.message}
            with suppress(LinkError):  # where the run is over: another worker may have met the same
                self._link.send(Frame(Kind.FAILED, self._asked, payload=json.dumps(report).encode()))
            raise
        finally:
            self.close()

    def _is_over(self) -> bool:
        """Whether the server said stop before it closed the link, which a worker in mid-task has not read."""
        try:
            while (frame := self._link.receive(0.0)) is not None:
                if frame.kind is Kind.STOP:
                    return True
        except LinkError:
            pass
        return False

    def close(self) -> None:
        """Stop the readers, and leave the device."""
        self._device.close()
        self._train.close()
        if self._validation is not None:
            self._validation.close()

    def handle(self, frame: Frame) -> None:
        """Do what one frame asks for, and push the result."""
        self._asked = frame.round
        if frame.kind in (Kind.TRAIN, Kind.CHECK):
            self._is_checking = frame.kind is Kind.CHECK
            self._compute(frame, self._train, self._gradient)
            self._train.keep_recent(frame.step, 1 + self._slots.num_sets)
        elif frame.kind is Kind.VALIDATE and self._validation is not None:
            self._compute(frame, self._validation, self._evaluate)
        elif frame.kind is not Kind.PUBLISH:
            raise LinkError(f"a worker cannot answer a {frame.kind.name} frame")

    def _compute(self, frame: Frame, readers: Readers, work: Work) -> None:
        """Sum `work` over the microbatches asked for, as far as the tree allows, and push each block.

        A microbatch's vector is rounded and added up a piece at a time, while it is in the cache, and those that hear
        of pieces have the first of them while the others are under way.
        """
        self._device.read(frame.version, frame.round)
        self._scale = frame.loss
        free = self._free_slots(frame)
        wanted = unpack_microbatches(frame)
        finish = self._wire.rounding(wanted[0][0]) if frame.kind is not Kind.VALIDATE else None
        tree = TreeSum(frame.samples, finish)
        data_s, num_bytes = 0.0, 0
        start = self._said_at = time.perf_counter()
        following = [*wanted[1:], (wanted[0][0] + 1, wanted[0][1])]
        for place, (step, shard) in enumerate(wanted, start=frame.first):
            pieces = Pieces(readers, step, shard, self._intake)
            pieces.following = following[place - frame.first]
            block, part = Block(place, place + 1), self._empty(frame, free)
            merges = tree.plan(block, part)
            tells = self._tells_early and place + 1 == frame.stop and frame.kind is not Kind.VALIDATE
            tell = self._teller(frame, tree) if tells else None
            work(pieces, step, shard, part, self._final(block, part, finish, merges, tell))
            data_s += pieces.data_s
            num_bytes += pieces.num_bytes
            for merge in merges:
                merge.add_numbers()
                free.append(merge.right.slot)
        compute_s = time.perf_counter() - start - data_s
        for block, part in tree:
            payload: Any = b""
            if frame.kind is Kind.VALIDATE:
                payload = part.vector.numpy()
            else:
                self._pushed[frame.slot][part.slot] = block
                if not self._shared:
                    payload = self._slots.bytes(part.slot)
            push = self._about(
                Kind.PUSH,
                frame,
                block,
                part,
                samples=part.samples,
                data_bytes=num_bytes,
                loss=part.loss,
                weight=part.weight,
                squares=part.squares,
                data_s=data_s,
                compute_s=compute_s,
                payload=payload,
            )
            self._link.send(push)
            data_s, compute_s, num_bytes = 0.0, 0.0, 0  # told with the first block

    def _about(self, kind: Kind, task: Frame, block: Block, part: Partial, **rest: Any) -> Frame:
        """What is said of a push. It is known by its round, block, worker and slot."""
        return Frame(kind, task.round, task.step, block.first, block.stop, self._incarnation, part.slot, **rest)

    def _free_slots(self, frame: Frame) -> list[int]:
        """The push slots that a training task may use: all those of its set at the round's first task. What is asked
        for again of a round had not counted, or is lost, so that the slot it was pushed in is free."""
        if frame.kind is Kind.VALIDATE:
            return []
        free, pushed = self._free[frame.slot], self._pushed[frame.slot]
        if self._rounds[frame.slot] != frame.round:
            self._rounds[frame.slot] = frame.round
            free[:] = list(self._slots.of_set(frame.slot))[::-1]
            pushed.clear()
        for slot in [slot for slot, b in pushed.items() if b.first < frame.stop and frame.first < b.stop]:
            del pushed[slot]
            free.insert(0, self._slots.renumbered(slot))
        return free

    def _empty(self, frame: Frame, free: list[int]) -> Partial:
        """What a microbatch is to give: sums of metrics, or a gradient, in a push slot that is free."""
        if frame.kind is Kind.VALIDATE:
            return Partial(torch.zeros(self._metrics.num_sums, dtype=torch.float64), 0, 0.0, 0.0)
        slot = free.pop()
        return Partial(self._slots[slot], 0, 0.0, 0.0, slot)

    def _teller(self, frame: Frame, tree: TreeSum) -> Final:
        """Says which values of what is to be pushed are there, once nothing but the last microbatch is missing."""

        def tell(span: Span, block: Block, part: Partial) -> None:
            self._link.send(self._about(Kind.READY, frame, block, part, read=span.start, samples=span.stop))

        *others, (last, of_last) = tree
        for block, part in others:
            tell(self.layout.whole, block, part)
        return lambda span: tell(span, last, of_last)

    def _final(
        self, block: Block, part: Partial, finish: Finish | None, merges: Sequence[Merge], tell: Final | None
    ) -> Final:
        """What is done, piece by piece, with values of a microbatch once they are final: they are rounded and added to
        those of its siblings, and whoever is to hear of them does."""

        def final(span: Span) -> None:
            for piece in self.layout.pieces(span):
                values = slice(piece.start, piece.stop)
                if finish is not None:
                    finish(block, part.vector[values], piece.start)
                for merge in merges:
                    merge.add(values)
                if tell is not None:
                    tell(piece)

        return final

    def _gradient(self, pieces: Pieces, step: int, shard: int, part: Partial, final: Final) -> None:
        """The gradient of one microbatch's summed loss. Pieces add up in order, whoever computes them."""
        rows, value, weight = 0, 0.0, 0.0
        coming: list[Callable[[], float]] = []  # the value of a piece's loss
        held: list[Span] = []
        squares: list[float] = []

        def value_until_now() -> float:
            nonlocal value
            while coming:
                value += coming.pop()()
            return value

        def give(span: Span) -> None:
            if step % EVERY_STEPS == 0:
                gradient = part.vector[span.start : min(span.stop, self.layout.num_gradients)]
                squares.append(torch.dot(gradient, gradient).item())
            final(span)

        def there(span: Span) -> None:
            is_suspect = self._is_checking or not math.isfinite(value_until_now())
            (held.append if is_suspect else give)(span)

        self._device.begin(self._slots.place(part.slot), self._scale, there)
        self._device.load_buffers()
        self._model.train()
        self._device.seed(microbatch_seed(self._seed, step, shard))
        probe = self._probe if is_look(step, self._options.look_every_steps) else None
        if probe is not None:
            probe.begin()
        for batch in pieces:
            if not len(batch["label"]):
                if probe is not None:
                    probe.end()
                self._leave_out(part, final)
                return
            with self._blame(pieces, step, shard):
                loss, share = self._loss.total(self._outputs(batch), batch)
                coming.append(self._device.value(loss))
                self._device.backward(loss, pieces.is_last)
            pieces.bring_next()
            value_until_now()  # waits for a device that is ahead: what is on its way takes memory
            if probe is not None:
                probe.passed()
            rows, weight = rows + len(batch["label"]), weight + share
        seen = probe.end() if probe is not None else None
        self._device.finish(rows)
        if held:
            if not math.isfinite(value) or not math.isfinite(global_norm(part.vector)):
                self._nonfinite(value, pieces.readers, step, shard)
                self._leave_out(part, final)
                return
            for span in held:
                give(span)
        if seen is not None:
            report = json.dumps({"shard": shard, "layers": seen}).encode()
            self._link.send(Frame(Kind.LOOKED, self._asked, step, incarnation=self._incarnation, payload=report))
        part.samples, part.loss, part.weight, part.squares = rows, value, weight, math.fsum(squares)

    def _leave_out(self, part: Partial, final: Final) -> None:
        """A microbatch gives nothing."""
        part.vector.zero_()
        final(self.layout.whole)

    def _nonfinite(self, loss: float, readers: Readers, step: int, shard: int) -> None:
        """Tell the server that a microbatch is left out, or raise DivergenceError. Either names the rows whose loss or
        gradient is not finite, where a second look, with the same dropout, shows any."""
        what = "gradient is not finite" if math.isfinite(loss) else f"loss is not finite ({loss:g})"
        where = ""
        self._device.seed(microbatch_seed(self._seed, step, shard))
        for number in range(count := readers.num_pieces(step, shard)):
            rows = readers.microbatch(step, shard, number if count > 1 else None)
            batch = self._device.take(self._device.bring(rows))
            look = rows_without_finite_gradient if math.isfinite(loss) else rows_without_finite_loss
            if bad := look(self._model, self._outputs, self._loss, batch):
                first = readers.first_row(step, shard, number)
                places = "; ".join(readers.place(step, shard, first + row) for row in bad[:_NAMED_ROWS])
                where = f", first at {places} ({len(bad)} of {len(batch['label'])} rows)"
                break
        message = f"step {step + 1}, shard {shard}: the {what}{where}"
        if not self._options.skip_nonfinite:
            raise DivergenceError(
                f"{message}; the parameters were left as they were. Try a lower optimizer.lr, or clip: {{norm: 1.0}}; "
                "on_nonfinite: skip goes on without such rows"
            )
        report = json.dumps({"shard": shard, "message": message}).encode()
        self._link.send(Frame(Kind.SKIPPED, self._asked, step, incarnation=self._incarnation, payload=report))

    def _evaluate(self, pieces: Pieces, step: int, shard: int, part: Partial, final: Final) -> None:
        """Loss and metric sums of one microbatch: float64 [metrics]."""
        self._device.load_buffers()
        self._model.eval()
        for batch in pieces:
            if not len(batch["label"]):
                break
            with torch.no_grad(), self._blame(pieces, step, shard):
                outputs = self._outputs(batch)
                loss, weight = self._loss.total(outputs, batch, torch.float64)
                sums = torch.tensor(self._metrics.sums(outputs, batch["label"]), dtype=torch.float64)
            part.add(Partial(sums, len(batch["label"]), loss.item(), weight))
        final(Span(0, len(part.vector)))

    def _outputs(self, batch: Batch) -> Tensor:
        self._say_alive()
        return self._arithmetic.outputs(self._model, batch, self._device.type)

    def _say_alive(self) -> None:
        """Tell the server that a task is under way, every now and then."""
        now = time.perf_counter()
        if now - self._said_at > _ALIVE_SECONDS:
            self._said_at = now
            self._link.send(Frame(Kind.ALIVE, self._asked))

    def _place_parameters(self, frame: Frame) -> memoryview | None:
        return self._published[frame.version].bytes() if frame.kind is Kind.PUBLISH else None

    def _blame(self, pieces: Pieces, step: int, shard: int) -> _Blame:
        return _Blame(pieces, step, shard)


class Pieces:
    """A microbatch's rows, a piece at a time, and what it took to read them. Most microbatches are one piece.

    `batch` is the piece given last, and `first` the place of its first row in the microbatch. `following` is the
    (step, shard) likely to come next.
    """

    def __init__(self, readers: Readers, step: int, shard: int, intake: Intake) -> None:
        self.readers, self._step, self._shard, self._intake = readers, step, shard, intake
        self.data_s, self.num_bytes = 0.0, 0
        self.batch: Batch = {}
        self.first = 0
        self.following = (step, shard)
        self._number, self._count = 0, readers.num_pieces(step, shard)

    @property
    def is_last(self) -> bool:
        """Whether no piece comes after this one."""
        return self._number + 1 >= self._count

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._count):
            self._number = number
            asked = time.perf_counter()
            try:
                self.batch = self._intake.take(self._key(self._step, self._shard, number, self._count))
            except DataError as error:
                raise error.during_training() from error
            self.first = self.readers.first_row(self._step, self._shard, number) if number else 0
            self.data_s += time.perf_counter() - asked
            self.num_bytes += sum(tensor.nbytes for tensor in self.batch.values())
            yield self.batch

    def bring_next(self) -> None:
        """Have the next piece come in while this one computes; after the last, the first one of what follows."""
        if not self._intake.is_ahead:
            return
        if self.is_last:
            self._intake.bring_next(self._key(*self.following, 0, self.readers.num_pieces(*self.following)))
        else:
            self._intake.bring_next(self._key(self._step, self._shard, self._number + 1, self._count))

    def _key(self, step: int, shard: int, number: int, count: int) -> Key:
        return self.readers, step, shard, number if count > 1 else None


class _Blame:
    """Turns what the user's model or loss raises into a TrainingError that says where, with their traceback; and says
    where a label lies that the loss cannot take."""

    def __init__(self, pieces: Pieces, step: int, shard: int) -> None:
        self._pieces, self._step, self._shard = pieces, step, shard

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        pieces = self._pieces
        if isinstance(error, LabelError):
            label = pieces.batch["label"]
            raise pieces.readers.located(error, label, self._step, self._shard, pieces.first) from error
        if isinstance(error, Exception) and not isinstance(error, DistrainError):
            shapes = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in pieces.batch.items())
            text = "".join(traceback.format_exception(error)).rstrip()
            raise TrainingError(
                f"step {self._step + 1}, shard {self._shard}: the model or the loss raised {type(error).__name__}: "
                f"{error} (microbatch: {shapes})\n{text}"
            ) from error


Work = Callable[[Pieces, int, int, Partial, Final], None]
"""Computes a microbatch: its rows, step and shard, what it gives, and who is told of that."""


def microbatch_seed(seed: int, step: int, shard: int) -> int:
    """The seed of a microbatch's random draws (dropout): a function of (seed, step, shard) alone."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, shard), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
