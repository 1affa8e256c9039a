"""Models by name: their shapes, their arithmetic against NumPy, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distrain.config import ModelConfig, TrainConfig
from distrain.errors import ConfigError
from distrain.learning.layers import ACTIVATIONS
from distrain.learning.models import build_model, initialize


def build(num_features: int = 64, num_outputs: int = 3, **config) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(**config), num_features, num_outputs)


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_a_linear_model_is_one_matrix_and_a_bias(name: str):
    model = build(name=name)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    rows = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    np.testing.assert_allclose(model(torch.from_numpy(rows)).detach(), rows @ weight.T + bias, rtol=1e-4, atol=1e-5)


def convolved(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution that keeps height and width, from its definition: [channels, height, width] of one image."""
    out, _, size, _ = weight.shape
    padded = np.pad(image, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    height, width = image.shape[1:]
    result = np.empty((out, height, width))
    for y in range(height):
        for x in range(width):
            result[:, y, x] = (weight * padded[:, y : y + size, x : x + size]).sum((1, 2, 3)) + bias
    return result


def test_a_cnn_is_convolution_activation_pooling_and_linear_layers():
    model = build(name="cnn", image_shape=[1, 8, 8], channels=[2, 3], hidden=[5]).eval()
    rows = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    linear = [m for m in model if isinstance(m, nn.Linear)]
    for row, outputs in zip(rows, model(torch.from_numpy(rows)).detach().numpy(), strict=True):
        image = row.reshape(1, 8, 8)
        for layer in convolutions:
            image = np.maximum(convolved(image, layer.weight.detach().numpy(), layer.bias.detach().numpy()), 0)
            channels, height, width = image.shape
            image = image.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))
        hidden = image.reshape(-1)
        for number, layer in enumerate(linear):
            hidden = layer.weight.detach().numpy() @ hidden + layer.bias.detach().numpy()
            hidden = np.maximum(hidden, 0) if number == 0 else hidden
        np.testing.assert_allclose(outputs, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "layer", "group"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_and_normalization_goes_with_every_model(activation: str, normalization: str):
    rows = torch.randn(6, 48)
    for shape in ({"name": "mlp"}, {"name": "cnn", "image_shape": [3, 4, 4], "channels": [4, 4, 4, 4]}):
        model = build(48, hidden=[8], activation=activation, normalization=normalization, dropout=0.1, **shape)
        assert model(rows).shape == (6, 3)


def test_initialization_is_torchs_by_name():
    model = build(name="mlp", hidden=[200], initialization="he_normal")
    first, last = model[0], model[-1]
    assert float(first.weight.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert not first.bias.any() and not last.bias.any()
    orthogonal = build(name="linear", initialization="orthogonal").weight
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(3), atol=1e-5, rtol=0)
    assert not build(name="linear", initialization="zeros").weight.any()
    bound = (6 / (64 + 3)) ** 0.5
    xavier = build(name="linear", initialization="xavier_uniform").weight.abs().max()
    assert 0.9 * bound < float(xavier) <= bound
    torch.manual_seed(1)
    initialize(model, "kaiming_normal")
    before = first.weight.clone()
    torch.manual_seed(1)
    initialize(model, "he")
    assert torch.equal(before, first.weight)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"activation": "rellu"}, "did you mean relu"),
        ({"initialization": "he_norml"}, "torch.nn.init has no 'he_norml'"),
        ({"initialization": "orthogonl"}, "did you mean orthogonal"),
        ({"name": "cnn"}, r"cnn needs image_shape: \[channels, height, width\]"),
        ({"name": "cnn", "image_shape": [1, 8, 9]}, "1 x 8 x 9 is 72 values, and a row has 64 features"),
        ({"name": "ccn"}, "did you mean cnn"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        build(**config)


def test_logistic_regression_takes_no_squared_error():
    with pytest.raises(ConfigError, match="logistic gives logits, which mse does not take"):
        TrainConfig(data={"train": "x", "label": "y"}, model={"name": "logistic"}, loss="mse")
