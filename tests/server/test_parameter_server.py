"""What the server does to the sums of a step, beside what whole runs show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distrain.config import AveragingConfig, OptimizerConfig
from distrain.exchange.layout import Layout, Span, views
from distrain.exchange.slices import cut
from distrain.learning.clipping import total_norm
from distrain.learning.optimizers import optimizer_names
from distrain.reduction import Partial
from distrain.server.parameter_server import Gathered, ParameterServer


def model() -> nn.Module:
    """Parameters of more than two blocks, the last of them odd, and buffers behind them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 701), nn.BatchNorm1d(701), nn.Linear(701, 301))


def some_sum(layout: Layout, seed: int) -> torch.Tensor:
    """A pushed vector: random where a tensor's values are, 0 between tensors, and whole batches counted."""
    generator, vector = torch.Generator().manual_seed(seed), torch.zeros(layout.num_floats)
    for view in views(vector, (*layout.parameters, *layout.float_buffers)):
        view.normal_(generator=generator)
    for view in views(vector, layout.int_buffers):
        view.fill_(10.0)
    return vector


@pytest.mark.parametrize("num_halves", [1, 2])
def test_an_average_is_the_same_to_the_bit_in_blocks_and_at_once(num_halves: int):
    server = ParameterServer(model(), OptimizerConfig(name="SGD", lr=1.0))
    layout = server.layout
    before = server.current.floats.clone()
    sums = [some_sum(layout, seed) for seed in range(num_halves)]
    update = server.apply(Gathered(tuple(Partial(vector.clone(), 10, 1.0, 3.0) for vector in sums)), 1)

    whole = sum(sums[1:], sums[0])
    gradient = whole[: layout.num_gradients] * torch.tensor(1 / (3.0 * num_halves), dtype=torch.float32)
    changes = whole[layout.num_gradients :] * torch.tensor(1 / (10.0 * num_halves), dtype=torch.float32)
    stop = layout.int_buffers[0].start
    after = before.clone()
    after[: layout.num_gradients] -= gradient
    after[layout.num_gradients : stop] += changes[: stop - layout.num_gradients]
    assert torch.equal(server.current.floats[:stop], after[:stop])
    norm = torch.linalg.vector_norm(whole[: layout.num_gradients].double()).item() / (3.0 * num_halves)
    assert update.grad_norm == pytest.approx(norm, rel=1e-12)


def test_the_squared_norms_do_not_depend_on_the_slices():
    """Each slice gives those of its own pieces, and all pieces together are those of one server."""

    def squares(num_slices: int) -> list[float]:
        found: list[float] = []
        for number in range(num_slices):
            layout = Layout.of(model())
            span = cut(layout, num_slices)[number]
            server = ParameterServer(model(), OptimizerConfig(), span=span)
            server.share = lambda values: found.extend(values) or values
            vector = some_sum(layout, 2)
            server.apply(Gathered((Partial(vector[span.start : span.stop].clone(), 10, 1.0, 10.0),)), 1)
        return found

    assert squares(1) == squares(3)
    assert math.isfinite(total_norm(squares(3)))


def partly_frozen() -> nn.Module:
    """A part of it, as it is updated below, has no parameter that is trained."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 5))
    made[2].requires_grad_(False)
    return made


@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "Muon"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_parameters_updated_part_by_part_are_those_updated_at_once(monkeypatch, name: str, staleness: int):
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 32)
    decay = (
        {"weight_decay": 0.1} if name not in ("Rprop",) else {}
    )  # in groups of their own: biases and norms go without
    config = OptimizerConfig(name=name, lr=0.01, **decay)
    averaging = AveragingConfig()
    at_once, in_parts = (
        ParameterServer(partly_frozen(), config, staleness=staleness, averaging=averaging) for _ in range(2)
    )
    layout = at_once.layout
    for step in range(1, 4):
        told: list[Span] = []

        def publish(read: int, span: Span, told=told, step=step) -> None:
            assert read == step
            values = slice(span.start, span.stop)
            assert torch.equal(
                in_parts.published[step % (staleness + 1)].floats[values], in_parts.current.floats[values]
            )
            told.append(span)

        in_parts.publish = publish
        for server in (at_once, in_parts):
            server.apply(Gathered((Partial(some_sum(layout, step), 10, 1.0, 3.0),)), step)
        assert len(told) > 3 and [span.start for span in told] == [0, *(span.stop for span in told[:-1])]
        assert told[-1].stop == layout.num_floats
        for ours, theirs in zip(in_parts.readable, at_once.readable, strict=True):
            assert torch.equal(ours.floats, theirs.floats) and torch.equal(ours.ints, theirs.ints)


def test_only_what_a_buffer_was_at_first_may_be_infinite():
    made = nn.Linear(2, 1)
    made.register_buffer("mask", torch.tensor([0.0, -math.inf, math.nan]))
    server = ParameterServer(made, OptimizerConfig())
    assert server.is_finite
    mask = server.current.named()["mask"]
    for place, value in ((0, -math.inf), (1, math.nan), (1, math.inf)):
        before = mask[place].item()
        mask[place] = value
        assert not server.is_finite
        mask[place] = before
    assert server.is_finite
    server.current.named()["weight"][0, 0] = math.nan
    assert not server.is_finite
