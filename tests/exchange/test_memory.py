"""Buffers are shared without a name, and hold a model."""

from __future__ import annotations

import os

import torch
from torch import nn

from distrain.exchange.layout import ALIGNMENT_BYTES, Layout
from distrain.exchange.memory import Published, PushSlots, SharedBuffer


def model_with_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def test_a_shared_buffer_is_seen_through_its_descriptor():
    ours = SharedBuffer(100)
    theirs = SharedBuffer(100, os.dup(ours.fd))
    ours.floats(0, 4).copy_(torch.arange(4.0))
    ours.close()
    theirs.close()
    assert theirs.floats(0, 4).tolist() == [0, 1, 2, 3]
    theirs.ints(64, 2)[1] = 2**40
    assert ours.ints(64, 2).tolist() == [0, 2**40]
    assert ours.ints(0, 0).numel() == 0


def test_adopted_parameters_live_in_the_published_vector():
    model = model_with_buffers()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    published = Published(Layout.of(model))
    published.adopt_parameters(model, copy_in=True)
    model[1].num_batches_tracked.fill_(2**30 + 1)
    published.store_buffers(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in expected.items() if "num_batches" not in n)
    published.floats.add_(1.0)
    assert torch.equal(model[0].weight, expected["0.weight"] + 1)
    assert published.int_views()[0].item() == 2**30 + 1  # float32 could not hold it
    assert all(p.data_ptr() % ALIGNMENT_BYTES == 0 for p in model.parameters())


def test_slots_do_not_overlap_and_cost_nothing_untouched():
    layout = Layout.of(nn.Linear(1000, 1000))
    slots = PushSlots(layout, 64)
    blocks = lambda: os.fstat(slots.buffer.fd).st_blocks * 512  # noqa: E731
    assert blocks() == 0
    slots[1].fill_(1.0)
    slots[2].fill_(2.0)
    assert slots[1].sum().item() == layout.num_floats
    assert blocks() < 2.1 * layout.vector_bytes
    assert len(slots.bytes(3)) == layout.vector_bytes
    assert bytes(slots.bytes(1)[:4]) == b"\x00\x00\x80?"


def test_a_slot_that_is_used_again_has_another_number():
    slots = PushSlots(Layout.of(nn.Linear(2, 3)), 2, 3)
    for number in slots.of_set(2):
        again = slots.renumbered(number)
        slots[again].fill_(number)
        assert again not in range(slots.num_slots) and slots.place(again) == slots.place(number) == number
        assert torch.equal(slots[number], slots[again]) and slots.bytes(number) == slots.bytes(again)
    assert len({tuple(slots[number].tolist()) for number in slots.of_set(2)}) == 2


def test_tensors_are_found_by_name():
    model = model_with_buffers()
    published = Published(Layout.of(model))
    published.adopt_parameters(model, copy_in=True)
    model[1].num_batches_tracked.fill_(2**30 + 1)
    published.store_buffers(model)
    named = published.named()
    assert named.keys() == model.state_dict().keys()
    assert all(torch.equal(named[name], value) for name, value in model.state_dict().items())
    published.floats.zero_()
    assert not named["0.weight"].any()
