"""Text models: their arithmetic against NumPy, and padding that changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distrain.config import ModelConfig, TrainConfig
from distrain.errors import ConfigError
from distrain.learning.models import build_model
from distrain.learning.text import positions

SIZES = {"name": "text", "vocabulary": 9, "embedding": 8, "hidden": [6]}


def build(**config) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(**{**SIZES, **config}), None, 3).eval()


def rows(lists: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    features = torch.tensor([row + [0] * (width - len(row)) for row in lists])
    return features, torch.arange(width) < torch.tensor([len(row) for row in lists])[:, None]


def head(model: nn.Module, pooled: np.ndarray) -> np.ndarray:
    first, last = (layer for layer in model.head if isinstance(layer, nn.Linear))
    hidden = np.maximum(pooled @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    return hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()


def test_a_bag_is_the_mean_of_its_embeddings():
    model, lists = build(), [[1, 2, 2], [8], [], [0, 3]]
    table = model.embedding.weight.detach().numpy()
    pooled = np.stack([table[row].mean(0) if row else np.zeros(8) for row in lists])
    np.testing.assert_allclose(model(*rows(lists, 4)).detach(), head(model, pooled), rtol=1e-5, atol=1e-6)


def normalized(x: np.ndarray, layer: nn.LayerNorm) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def attended(x: np.ndarray, layer: nn.MultiheadAttention) -> np.ndarray:
    """Multi-head self-attention of one row, [tokens, width], from its definition."""
    stacked = x @ layer.in_proj_weight.detach().numpy().T + layer.in_proj_bias.detach().numpy()
    heads = []
    for q, k, v in zip(*(np.split(part, layer.num_heads, 1) for part in np.split(stacked, 3, 1)), strict=True):
        scores = q @ k.T / np.sqrt(q.shape[1])
        shares = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(shares / shares.sum(1, keepdims=True) @ v)
    return np.concatenate(heads, 1) @ layer.out_proj.weight.detach().numpy().T + layer.out_proj.bias.detach().numpy()


def test_a_transformer_is_attention_over_its_own_tokens():
    model, lists = build(encoder="transformer"), [[1, 2, 2, 7], [8], [0, 3]]
    table = model.embedding.weight.detach().numpy()
    pooled = []
    for row in lists:
        x = table[row] + positions(len(row), 8).numpy()
        for layer in model.layers:
            x = x + attended(normalized(x, layer.norm1), layer.self_attn)
            inner = normalized(x, layer.norm2) @ layer.linear1.weight.detach().numpy().T
            inner = np.maximum(inner + layer.linear1.bias.detach().numpy(), 0)
            x = x + inner @ layer.linear2.weight.detach().numpy().T + layer.linear2.bias.detach().numpy()
        pooled.append(normalized(x, model.norm).mean(0))
    outputs = model(*rows(lists, 5)).detach()
    np.testing.assert_allclose(outputs, head(model, np.stack(pooled)), rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_falling_rate():
    found = positions(7, 6).numpy()
    place = np.arange(7)
    np.testing.assert_allclose(found[:, 1], np.sin(place / 10_000 ** (1 / 3)), atol=1e-6)
    np.testing.assert_allclose(found[:, 5], np.cos(place / 10_000 ** (2 / 3)), atol=1e-6)
    assert positions(3, 5).shape == (3, 5)


@pytest.mark.parametrize("encoder", ["bag", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_and_what_stands_in_it_change_nothing_and_an_empty_row_is_finite(encoder: str, training: bool):
    model = build(encoder=encoder, activation="gelu").train(training)
    lists = [[1, 2, 3], [4], []]
    features, mask = rows(lists, 7)
    outputs = model(*rows(lists, 3))
    torch.testing.assert_close(model(features.masked_fill(~mask, 5), mask), outputs, rtol=1e-4, atol=1e-5)
    outputs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len({float(layer.linear1.weight[0, 0]) for layer in getattr(model, "layers", [])}) in (0, 2)


def test_the_transformer_sees_order_and_the_bag_does_not():
    one, other = rows([[1, 2, 3]], 3), rows([[3, 2, 1]], 3)
    bag, transformer = build(), build(encoder="transformer")
    torch.testing.assert_close(bag(*one), bag(*other))
    assert (transformer(*one) - transformer(*other)).abs().max() > 1e-3


def test_initialization_reaches_the_attention():
    model = build(encoder="transformer", initialization="zeros")
    attention = model.layers[0].self_attn
    assert not attention.in_proj_weight.any() and not attention.out_proj.weight.any()
    assert not model.layers[1].linear2.weight.any() and model.embedding.weight.any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "text"}}, "text needs vocabulary: the number of token ids"),
        ({"model": {"name": "mlp", "vocabulary": 9}}, "vocabulary goes with name: text, not with mlp"),
        ({"model": {**SIZES, "encoder": "transformer", "heads": 3}}, "embedding is 8, no multiple of the 3 heads"),
        ({"model": {**SIZES, "encoder": "transfomer"}}, "did you mean transformer"),
        ({"model": SIZES, "data": {"standardize": True}}, "no fixed features to measure where rows differ in length"),
        ({"model": SIZES, "data": {"transform": "a:b"}}, "model: text go without it"),
        ({"data": {"ragged": True}}, "model: mlp takes rows of one length; data.ragged goes with text or a factory"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**{**changes, "data": {"train": "-", "label": "y", **changes.get("data", {})}})
