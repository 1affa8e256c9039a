"""A model's computational graph with shapes, as torch.export sees it, and the backward pass as autograd records it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from distrain.errors import TrainingError
from distrain.learning.models import inputs_of
from distrain.learning.task import Task

Batch = dict[str, Tensor]
Shape = tuple[int, ...]
Module = tuple[str, str]  # path in the model, and class

MOST_NODES = 40  # that a picture of a forward pass shows; more are drawn as modules
INPUT, OPERATION, LOSS, BACKWARD = "input", "operation", "loss", "backward"
_WITHOUT_DETAIL = (nn.MultiheadAttention,)  # beside modules without modules of their own


@dataclass(frozen=True)
class Node:
    """One operation: of the forward pass, an input, the loss, or the backward pass of the node `of`.

    `shape` is that of what it gives: of a backward node the gradient with respect to what its node takes. `parameters`
    are those it uses, or whose gradients it gives. `modules` are the modules around it, outermost first.
    """

    name: str
    label: str
    kind: str
    shape: Shape
    dtype: str
    parameters: dict[str, Shape] = field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    of: str | None = None


@dataclass(frozen=True)
class Edge:
    """A tensor of `shape` that flows from one node to another."""

    source: str
    target: str
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run, and edges."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def to_json(self) -> dict[str, Any]:
        return {"nodes": [asdict(node) for node in self.nodes], "edges": [asdict(edge) for edge in self.edges]}

    def directed(self, *kinds: str) -> nx.DiGraph:
        """The nodes of these kinds and the edges between them, for networkx."""
        graph = nx.DiGraph()
        graph.add_nodes_from(node.name for node in self.nodes if node.kind in kinds)
        graph.add_edges_from((e.source, e.target) for e in self.edges if {e.source, e.target} <= set(graph))
        return graph


def trace(task: Task, batch: Batch, backward: bool = False, most_nodes: int = MOST_NODES) -> Graph:
    """The graph of a task's model and loss on a microbatch, in training mode.

    A module of torch.nn without modules of its own is one node; where there would be more than `most_nodes`, so are
    the deepest modules that bring it below that. Raises TrainingError where torch.export does not understand the model.
    """
    model = task.model.train()
    inputs = inputs_of(batch)
    positional = inputs.keys() == {"features"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments: tuple[Tensor, ...] = (inputs["features"],) if positional else ()
            program = torch.export.export(model, arguments, None if positional else inputs).module()
            recorder = _Recorder(program)
            with torch.enable_grad():
                outputs = recorder.run(*inputs.values())
    except Exception as error:  # it raises what it likes, errors of the user's code included
        raise TrainingError(
            f"torch.export does not understand the model: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    traced = _Traced(model, recorder, inputs)
    keys = traced.keys(most_nodes)
    nodes, edges = _forward(traced, keys)
    nodes, edges = _with_loss(nodes, edges, task, batch, keys[traced.last], outputs)
    if backward:
        nodes, edges = _with_backward(nodes, edges, {keys[n] for n in traced.differentiable})
    return Graph(tuple(nodes), tuple(edges))


class _Recorder(fx.Interpreter):
    """Runs an exported model, and notes what each of its nodes gave."""

    def __init__(self, program: nn.Module) -> None:
        assert isinstance(program, fx.GraphModule)
        super().__init__(program, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self.values[n] = super().run_node(n)
        return value


class _Traced:
    """What of an exported graph matters: the operations between inputs and output, and their parameters."""

    def __init__(self, model: nn.Module, recorder: _Recorder, inputs: Batch) -> None:
        self.values = recorder.values
        self._model = model
        nodes = list(recorder.values)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.input_names = dict(zip(self.inputs, inputs, strict=True))
        reached = _closure(self.inputs, lambda node: node.users)
        output = next(node for node in nodes if node.op == "output")
        wanted = _closure([output], lambda node: node.all_input_nodes)
        operations = [n for n in nodes if n.op == "call_function" and n in reached and n in wanted]
        self.inputs = [node for node in self.inputs if node in wanted]
        self.last = operations[-1]
        # What is done to a mask or the like is left out: it stands for itself wherever it is used.
        beside = self._beside(operations)
        self.operations = [node for node in operations if node not in beside]
        self._stands_for = beside
        self._drawn = {*self.operations, *self.inputs}
        self.parameters = {str(n.target): tuple(recorder.values[n].shape) for n in nodes if n.op == "get_attr"
                           and isinstance(recorder.values[n], nn.Parameter)}  # fmt: skip

    @property
    def differentiable(self) -> list[fx.Node]:
        """The operations that autograd goes back through."""
        return [n for n in self.operations if isinstance(v := self.values[n], Tensor) and v.grad_fn is not None]

    def modules(self, node: fx.Node) -> tuple[Module, ...]:
        """The modules around an operation, outermost first, without the model itself."""
        stack = (node.meta.get("nn_module_stack") or {}).values()
        paths = ((str(path).partition("@")[0], str(kind)) for path, kind in stack)
        return tuple((path, kind.rpartition(".")[2].rstrip("'>")) for path, kind in paths if path)

    def _beside(self, operations: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Operations on nothing but inputs that are no floating point numbers and that autograd does not go back
        through, each with those inputs."""
        plain: dict[fx.Node, list[fx.Node]] = {n: [n] for n in self.inputs if not self.values[n].is_floating_point()}
        known = {*operations, *self.inputs}
        for node in operations:
            sources = [source for source in node.all_input_nodes if source in known]
            value = self.values[node]
            if isinstance(value, Tensor) and value.grad_fn is None and all(source in plain for source in sources):
                plain[node] = list(dict.fromkeys(each for source in sources for each in plain[source]))
        return {node: plain[node] for node in operations if node in plain and node is not self.last}

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """The operations and inputs that a node takes tensors from."""
        for source in node.all_input_nodes:
            for each in self._stands_for.get(source, [source]):
                if each in self._drawn:
                    yield each

    def parameters_of(self, node: fx.Node) -> dict[str, Shape]:
        """The parameters that a node uses, also by way of operations on nothing but parameters."""
        found: dict[str, Shape] = {}
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) in self.parameters:
                found[str(source.target)] = self.parameters[str(source.target)]
            elif source.op == "call_function" and source not in self._drawn:
                found |= self.parameters_of(source)
        return found

    def keys(self, most: int) -> dict[fx.Node, str]:
        """The name of the drawn node that each operation belongs to: the finest with at most so many of them."""
        depths = range(max((len(self.modules(n)) for n in self.operations), default=0), 0, -1)
        keys = self._keys(None)
        for depth in depths:
            if len(set(keys.values())) <= most:
                break
            keys = self._keys(depth)
        return keys

    def _keys(self, depth: int | None) -> dict[fx.Node, str]:
        """Operations in a row inside of one module that is not looked into are one; a second call is another."""
        keys = {node: node.name for node in self.inputs}
        before: str | None = None
        calls: dict[str, int] = {}
        for node in self.operations:
            modules = self.modules(node)
            inside: str | None = None
            if modules and depth is not None and len(modules) >= depth:
                inside = modules[depth - 1][0]
            elif modules and self._is_one(modules[-1][0]):
                inside = modules[-1][0]
            if inside is None:
                keys[node] = node.name
            else:
                calls[inside] = calls.get(inside, 0) + (inside != before)
                keys[node] = inside if calls[inside] == 1 else f"{inside}@{calls[inside]}"
            before = inside
        if nx.is_directed_acyclic_graph(nx.DiGraph(self._edges(keys))):
            return keys
        return {node: node.name for node in keys}

    def _is_one(self, path: str) -> bool:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return False
        return isinstance(module, _WITHOUT_DETAIL) or not any(True for _ in module.children())

    def _edges(self, keys: dict[fx.Node, str]) -> set[tuple[str, str]]:
        return {(keys[s], keys[n]) for n in self.operations for s in self.sources(n) if keys[s] != keys[n]}


def _closure(start: list[fx.Node], following: Any) -> dict[fx.Node, None]:
    found, waiting = dict.fromkeys(start), list(start)
    while waiting:
        for node in following(waiting.pop()):
            if node not in found:
                found[node] = None
                waiting.append(node)
    return found


def _forward(traced: _Traced, keys: dict[fx.Node, str]) -> tuple[list[Node], list[Edge]]:
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], Edge] = {}
    for node in traced.inputs:
        value = traced.values[node]
        nodes[keys[node]] = Node(keys[node], traced.input_names[node], INPUT, tuple(value.shape), _dtype(value))
    for node in traced.operations:
        key, value, modules = keys[node], traced.values[node], traced.modules(node)
        inside = next((place for place, (path, _) in enumerate(modules) if path == key.partition("@")[0]), None)
        label = str(node.target).removeprefix("aten.").partition(".")[0].strip("_")
        if inside is not None:
            own = key.partition("@")[0].rpartition(".")[2]
            label, modules = modules[inside][1] + ("" if own.isdigit() else f" {own}"), modules[:inside]
        before = nodes[key].parameters if key in nodes else {}
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        nodes.pop(key, None)  # to stand where its last operation does
        nodes[key] = Node(key, label, OPERATION, shape, _dtype(value), before | traced.parameters_of(node), modules)
        for source in traced.sources(node):
            if keys[source] != key:
                passed = traced.values[source]
                flows = tuple(passed.shape) if isinstance(passed, Tensor) else ()
                edges[keys[source], key] = Edge(keys[source], key, flows)
    return list(nodes.values()), list(edges.values())


def _with_loss(
    nodes: list[Node], edges: list[Edge], task: Task, batch: Batch, last: str, outputs: Any
) -> tuple[list[Node], list[Edge]]:
    """The label and the loss beside the model: a mean over the rows."""
    label = batch["label"]
    loss = Node("loss", f"{task.loss.name or 'loss'}, mean", LOSS, (), _dtype(outputs))
    nodes = [*nodes, Node("label", "label", INPUT, tuple(label.shape), _dtype(label)), loss]
    given = tuple(outputs.shape) if isinstance(outputs, Tensor) else ()
    return nodes, [*edges, Edge(last, "loss", given), Edge("label", "loss", tuple(label.shape))]


def _with_backward(nodes: list[Node], edges: list[Edge], differentiable: set[str]) -> tuple[list[Node], list[Edge]]:
    """The backward pass: a node for each that autograd goes back through, and each tensor's gradient, of its shape."""
    through = {*differentiable, "loss"}
    back = [
        Node(f"{n.name}.backward", f"{n.label} backward", BACKWARD, n.shape, n.dtype, n.parameters, n.modules, n.name)
        for n in reversed(nodes)
        if n.name in through
    ]
    gradients = [
        Edge(f"{e.target}.backward", f"{e.source}.backward", e.shape)
        for e in reversed(edges)
        if e.source in through and e.target in through
    ]
    return [*nodes, *back], [*edges, *gradients]


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
