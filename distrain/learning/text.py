"""Models over token ids, in rows of different length, padded with a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distrain.config import ModelConfig
from distrain.learning.layers import ACTIVATIONS, hidden_layers

_FEED_FORWARD = 4  # times the embedding's width, as in Vaswani et al. 2017
_LONGEST_WAVE = 10_000.0


def build_text(config: ModelConfig, num_outputs: int) -> nn.Module:
    """The text model that the configuration names."""
    return (TextTransformer if config.encoder == "transformer" else TextBag)(config, num_outputs)


class TextBag(nn.Module):
    """The mean of a row's embeddings, then the layers of an mlp: int64 [rows, width] and its mask ->
    [rows, num_outputs]. A row without tokens counts as zeros."""

    def __init__(self, config: ModelConfig, num_outputs: int) -> None:
        super().__init__()
        assert config.vocabulary is not None
        self.padding = config.vocabulary  # one more row of the table, which is left out of every mean
        self.embedding = nn.EmbeddingBag(self.padding + 1, config.embedding, mode="mean", padding_idx=self.padding)
        self.head = _head(config, num_outputs)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embedding(torch.where(mask, features, self.padding)))


class TextTransformer(nn.Module):
    """A transformer encoder (Vaswani et al. 2017; normalization first, Xiong et al. 2020), the mean of a row's tokens,
    then the layers of an mlp: int64 [rows, width] and its mask -> [rows, num_outputs].

    Positions are sines and cosines, so that rows may have any length. Padding is never attended to.
    """

    def __init__(self, config: ModelConfig, num_outputs: int) -> None:
        super().__init__()
        assert config.vocabulary is not None
        width = config.embedding
        self.embedding = nn.Embedding(config.vocabulary, width)
        # Not nn.TransformerEncoder, which begins with equal weights in every layer.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, _FEED_FORWARD * width, config.dropout, ACTIVATIONS[config.activation](),
                batch_first=True, norm_first=True,
            )
            for _ in range(config.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = _head(config, num_outputs)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(features)
        hidden = hidden + positions(features.shape[1], self.embedding.embedding_dim).to(hidden.device)
        # A row without tokens attends to its padding, since a softmax over nothing is not a number.
        padding = ~mask & mask.any(1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        hidden = self.norm(hidden) * mask.unsqueeze(2)
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines of each position, float32 [length, width] (Vaswani et al. 2017, section 3.5; the cosines behind
    the sines)."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half) * (-math.log(_LONGEST_WAVE) / half))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def _head(config: ModelConfig, num_outputs: int) -> nn.Sequential:
    layers, width = hidden_layers(
        config.embedding, config.hidden, config.activation, config.dropout, config.normalization
    )
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))
