"""Forward propagation and backpropagation of a multilayer perceptron from the matrix equations, in float64 NumPy.

Goodfellow, Bengio, Courville, "Deep Learning" (2016), algorithms 6.3 and 6.4. For layer l with input H_{l-1} of
[rows, in]: A_l = H_{l-1} W_l + b_l, H_l = f(A_l); and backwards G_l = dJ/dA_l, dJ/dW_l = H_{l-1}^T G_l, dJ/db_l = sum
of rows of G_l, G_{l-1} = (G_l W_l^T) * f'(A_{l-1}).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ACTIVATIONS = {
    "relu": (lambda a: np.maximum(a, 0.0), lambda a: (a > 0).astype(np.float64)),
    "tanh": (np.tanh, lambda a: 1.0 - np.tanh(a) ** 2),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
}


class NumpyMLP:
    """`weights` are [in, out] and `biases` [out], layer by layer; the last layer is linear."""

    def __init__(self, weights: list[Array], biases: list[Array], activation: str, loss: str) -> None:
        self.weights, self.biases, self.loss = weights, biases, loss
        self.function, self.derivative = _ACTIVATIONS[activation]

    def loss_and_gradients(self, features: Array, label: Array) -> tuple[float, list[Array]]:
        """The mean loss over the rows, and its gradients: weight, bias, weight, bias, ... in layer order."""
        inputs, sums = [features], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            sums.append(inputs[-1] @ weight + bias)
            inputs.append(self.function(sums[-1]))
        loss, upstream = self._loss(sums[-1], label)
        gradients: list[Array] = []
        for layer in reversed(range(len(self.weights))):
            gradients = [inputs[layer].T @ upstream, upstream.sum(0), *gradients]
            if layer:
                upstream = (upstream @ self.weights[layer].T) * self.derivative(sums[layer - 1])
        return loss, gradients

    def _loss(self, outputs: Array, label: Array) -> tuple[float, Array]:
        """The mean loss and its gradient with respect to the outputs [rows, out]."""
        rows = len(outputs)
        if self.loss == "mse":
            error = outputs - label.reshape(outputs.shape)
            return float((error**2).mean(1).mean()), 2 * error / error.size
        shifted = outputs - outputs.max(1, keepdims=True)
        probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        chosen = np.eye(outputs.shape[1])[label.astype(int)]
        return float(-np.log((probabilities * chosen).sum(1)).mean()), (probabilities - chosen) / rows
