"""The computational graph: its nodes, shapes and edges, and the backward pass that autograd runs."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import torch
from click.testing import CliRunner
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from distrain.cli import main
from distrain.config import LossConfig, ModelConfig, load_config
from distrain.learning.losses import Loss
from distrain.learning.metrics import Metrics
from distrain.learning.task import Task, TaskSpec, build_task
from distrain.study.graph import BACKWARD, INPUT, LOSS, OPERATION, Graph, trace
from distrain.study.graph_figure import draw
from distrain.study.job_graph import job_graph
from tests.support.jobs import write_job

LOSS_CONFIG = LossConfig(name="cross_entropy")


def task(module: nn.Module) -> Task:
    return Task(module, Loss(LOSS_CONFIG), Metrics(LOSS_CONFIG))


def batch(**inputs: Tensor) -> dict[str, Tensor]:
    return {**inputs, "label": torch.tensor([0, 1, 2, 0])}


def edges(graph: Graph, kind: str) -> set[tuple[str, str, tuple[int, ...]]]:
    labels = {node.name: node.label for node in graph.nodes if node.kind == kind or kind != BACKWARD}
    return {(labels[e.source], labels[e.target], e.shape) for e in graph.edges
            if e.source in labels and e.target in labels}  # fmt: skip


def test_an_mlp_with_shapes_and_parameters():
    built = build_task(TaskSpec(ModelConfig(hidden=[8], dropout=0.1), LOSS_CONFIG, 5, 3, False, 0))
    graph = trace(built, batch(features=torch.rand(4, 5)))
    assert [(n.label, n.shape) for n in graph.nodes if n.kind == OPERATION] == [
        ("Linear", (4, 8)), ("ReLU", (4, 8)), ("Dropout", (4, 8)), ("Linear", (4, 3))]  # fmt: skip
    first = next(node for node in graph.nodes if node.label == "Linear")
    assert first.parameters == {"0.weight": (8, 5), "0.bias": (8,)}
    assert [(n.label, n.shape, n.dtype) for n in graph.nodes if n.kind == INPUT] == [
        ("features", (4, 5), "float32"), ("label", (4,), "int64")]  # fmt: skip
    assert ("features", "Linear", (4, 5)) in edges(graph, OPERATION)
    assert ("Linear", "cross_entropy, mean", (4, 3)) in edges(graph, OPERATION)
    assert nx.is_directed_acyclic_graph(graph.directed(INPUT, OPERATION, LOSS))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused, self.act = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.second(self.act(self.first(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.block(features))


def test_the_backward_pass_mirrors_what_autograd_goes_through():
    module = Residual()
    graph = trace(task(module), batch(features=torch.rand(4, 5)), backward=True)
    back = [node for node in graph.nodes if node.kind == BACKWARD]
    assert [node.label for node in back] == [
        "cross_entropy, mean backward", "Linear head backward", "Tanh act backward", "add backward",
        "Linear second backward", "Tanh act backward", "Linear first backward"]  # fmt: skip
    # Every parameter that gets a gradient is there once, with its shape; none other is.
    gradients = {name: shape for node in back for name, shape in node.parameters.items()}
    module(torch.rand(4, 5)).sum().backward()
    assert gradients == {name: tuple(p.shape) for name, p in module.named_parameters() if p.grad is not None}
    assert {e for e in edges(graph, BACKWARD) if e[0] == "add backward"} == {
        ("add backward", "Linear second backward", (4, 5))}  # fmt: skip
    assert nx.is_directed_acyclic_graph(graph.directed(BACKWARD))


def test_a_module_called_twice_is_drawn_twice_and_modules_are_around_their_operations():
    graph = trace(task(Residual()), batch(features=torch.rand(4, 5)))
    assert sum(node.label == "Tanh act" for node in graph.nodes) == 2
    around = {node.label: node.modules for node in graph.nodes}
    assert around["Linear first"] == around["add"] == (("block", "Block"),) and around["Linear head"] == ()


def test_a_large_model_is_drawn_by_its_modules_and_a_mask_stands_for_itself():
    config = ModelConfig(name="text", vocabulary=9, encoder="transformer", embedding=8, heads=2, layers=2, hidden=[4])
    built = build_task(TaskSpec(config, LOSS_CONFIG, None, 3, False, 0))
    rows = batch(features=torch.ones(4, 6, dtype=torch.int64), mask=torch.ones(4, 6, dtype=torch.bool))
    fine, coarse = trace(built, rows, most_nodes=40), trace(built, rows, most_nodes=12)
    operations = [n.label for n in coarse.nodes if n.kind == OPERATION]
    assert "TransformerEncoderLayer" in operations and len(operations) <= 12
    assert "MultiheadAttention self_attn" in [n.label for n in fine.nodes]
    assert ("mask", "MultiheadAttention self_attn", (4, 6)) in edges(fine, OPERATION)
    whole = sum(p.numel() for p in built.model.parameters())
    for graph in (fine, coarse):
        found = {k: v for n in graph.nodes for k, v in n.parameters.items()}
        assert sum(torch.Size(shape).numel() for shape in found.values()) == whole


def test_boxes_do_not_overlap(tmp_path: Path):
    graph = trace(task(Residual()), batch(features=torch.rand(4, 5)), backward=True)
    figure = draw(graph, "a title")
    figure.savefig(tmp_path / "graph.png")
    boxes = [p.get_bbox() for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch) and p.get_zorder() == 3]
    assert len(boxes) == len(graph.nodes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_of_a_large_microbatch_only_the_first_piece_is_read(tmp_path: Path):
    graph = job_graph(load_config(write_job(tmp_path, batch_size="full", max_forward_rows=20, shards=1)))
    assert [(node.label, node.shape) for node in graph.nodes if node.kind == INPUT] == [
        ("features", (20, 4)), ("label", (20,))]  # fmt: skip


def test_the_command_draws_a_file_and_prints_the_graph(tmp_path: Path):
    job = write_job(tmp_path)
    path = tmp_path / "graph.png"
    done = CliRunner().invoke(main, ["graph", str(job), "--backward", "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {node["kind"] for node in found["nodes"]} == {INPUT, OPERATION, LOSS, BACKWARD}
    assert path.read_bytes()[:4] == b"\x89PNG"
    refused = CliRunner().invoke(main, ["graph", str(job), "-o", str(tmp_path / "graph.xyz")])
    assert refused.exit_code == 2 and "the picture cannot be written" in refused.output
