"""A computational graph as a picture: the forward pass from top to bottom, the backward pass beside it, upwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import networkx as nx
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from distrain.study.graph import BACKWARD, INPUT, LOSS, OPERATION, Edge, Graph, Node, Shape

Place = tuple[float, float]

_FILL = {INPUT: "#eaeef2", OPERATION: "#ddf4ff", LOSS: "#fff1e5", BACKWARD: "#fff1e5"}
_LINE = {INPUT: "#57606a", OPERATION: "#1f6feb", LOSS: "#d1580f", BACKWARD: "#d1580f"}
_FORWARD_ARROW, _BACKWARD_ARROW, _MODULE = "#1f6feb", "#d1580f", "#8c959f"
_WIDTH, _HEIGHT = 2.5, 0.56  # of a box, in inches, as all lengths here
_COLUMN, _ROW = 3.1, 1.0  # from box to box
_MARGIN = 0.6
_TALLEST = 200.0


def draw(graph: Graph, title: str) -> Figure:
    """Boxes are operations with their parameters, arrows tensors with their shapes, frames the modules around them."""
    places = _layout(graph)
    nodes = {node.name: node for node in graph.nodes}
    left, right = min(x for x, _ in places.values()), max(x for x, _ in places.values())
    bottom = min(y for _, y in places.values())
    bows = _bows(graph.edges, places)
    reach = max([*(abs(bow) for bow in bows.values()), 0.0])
    top = max(y for _, y in places.values())
    x_limits = (left - _WIDTH / 2 - _MARGIN - reach, right + _WIDTH / 2 + _MARGIN + reach)
    y_limits = (bottom - _HEIGHT / 2 - 0.2, _HEIGHT / 2 + _MARGIN + top)
    size = (x_limits[1] - x_limits[0], y_limits[1] - y_limits[0])
    figure = Figure(figsize=(max(size[0], 5.0), min(size[1], _TALLEST)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=x_limits, ylim=y_limits, aspect="equal")
    axes.axis("off")
    axes.text((left + right) / 2, y_limits[1] - 0.12, title, ha="center", va="top", fontsize=12)
    for kinds in ((OPERATION,), (BACKWARD,)):
        _frames(axes, [node for node in graph.nodes if node.kind in kinds], places)
    for node in graph.nodes:
        if node.of is not None:  # what the forward pass keeps for the backward pass
            (x, y), (x_back, _) = places[node.of], places[node.name]
            axes.plot([x + _WIDTH / 2, x_back - _WIDTH / 2], [y, y], ":", color=_MODULE, linewidth=0.9, zorder=1)
    for edge in graph.edges:
        _arrow(axes, edge, places, nodes[edge.source].kind, nodes[edge.target].kind, bows.get(edge, 0.0))
    for node in graph.nodes:
        _box(axes, node, places[node.name])
    return figure


def _layout(graph: Graph) -> dict[str, Place]:
    """The middle of each node's box: a row for each layer of the graph, so that arrows point down, or up in the
    backward pass, which lies to the right of the forward pass in the same rows."""
    forward = graph.directed(INPUT, OPERATION, LOSS)
    rows: dict[str, int] = {}
    for row, layer in enumerate(nx.topological_generations(forward)):
        rows |= dict.fromkeys(layer, row)
    for name in forward:  # what nothing comes before stands right above what takes it
        if not forward.in_degree(name):
            rows[name] = min(rows[target] for target in forward.successors(name)) - 1
    by_row: dict[int, list[str]] = defaultdict(list)
    for name in forward:
        by_row[rows[name]].append(name)
    inputs = {node.name for node in graph.nodes if node.kind == INPUT}
    columns: dict[str, float] = {}
    for row in sorted(by_row):
        operations = [name for name in by_row[row] if name not in inputs]
        wanted = {n: _mean([columns[s] for s in forward.predecessors(n) if s not in inputs]) for n in by_row[row]}
        # A lone operation stands below what it comes from; several side by side, in the order of what they come from.
        middle = round(_mean([wanted[name] for name in operations]))
        for place, name in enumerate(sorted(operations, key=lambda name: wanted[name])):
            columns[name] = middle + place - (len(operations) - 1) // 2
        others = [name for name in by_row[row] if name in inputs]
        first = min((columns[name] for name in operations), default=1)  # inputs stand to the left
        columns |= {name: first - 1 - place for place, name in enumerate(others)}
    places = {name: (_COLUMN * columns[name], -_ROW * rows[name]) for name in forward}
    shift = _COLUMN * (max(columns.values()) - min(columns.values())) + _COLUMN + 0.9
    for node in graph.nodes:
        if node.of is not None:
            places[node.name] = places[node.of][0] + shift, places[node.of][1]
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _bows(edges: Sequence[Edge], places: dict[str, Place]) -> dict[Edge, float]:
    """How far arrows over several rows swing out, so as not to run through the boxes between."""
    taken = {(round(x, 3), round(y, 3)) for x, y in places.values()}
    bows: dict[Edge, float] = {}
    for edge in edges:
        (x, y), (x_end, y_end) = places[edge.source], places[edge.target]
        if x < x_end:  # an input on the left
            continue
        rows = round(abs(y - y_end) / _ROW)
        between = [(x + (x_end - x) * i / rows, y + (y_end - y) * i / rows) for i in range(1, rows)]
        if any(abs(a - c) < _WIDTH / 2 and abs(b - d) < 0.1 for a, b in between for c, d in taken):
            bows[edge] = _WIDTH / 2 + 0.3 + 0.08 * rows
    return bows


def _arrow(axes: Axes, edge: Edge, places: dict[str, Place], source: str, target: str, bow: float) -> None:
    up = source == BACKWARD or target == BACKWARD
    (x, y), (x_end, y_end) = places[edge.source], places[edge.target]
    half = _HEIGHT / 2 if y_end < y else -_HEIGHT / 2
    side = 1 if up else -1  # where arrows over several rows run: right of the backward pass, left of the forward pass
    edge_x = _WIDTH / 2 * side
    begin, end, out = (x, y - half), (x_end, y_end + half), 0.0
    if bow:
        begin, end, out = (x + edge_x, y), (x_end + edge_x, y_end), bow - _WIDTH / 2
    elif source == INPUT and x < x_end:
        end = (x_end - _WIDTH / 2, y_end)
    length = max(1e-9, ((begin[0] - end[0]) ** 2 + (begin[1] - end[1]) ** 2) ** 0.5)
    # arc3's middle lies rad x length / 2 off the straight line, on the same side whether it goes up or down.
    style = f"arc3,rad={2 * out / length:.4f}"
    color = _BACKWARD_ARROW if up else _FORWARD_ARROW
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.1,
                                   connectionstyle=style, shrinkA=0, shrinkB=0, zorder=2))  # fmt: skip
    at = ((begin[0] + end[0]) / 2 + side * out, (begin[1] + end[1]) / 2)
    slanted = begin[0] != end[0] or bool(bow)
    axes.text(at[0] + (0 if slanted else 0.07), at[1], _shape(edge.shape), fontsize=7.5, color=color, va="center",
              ha="center" if slanted else "left", zorder=5,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})  # fmt: skip


def _box(axes: Axes, node: Node, place: Place) -> None:
    x, y = place
    axes.add_patch(FancyBboxPatch((x - _WIDTH / 2, y - _HEIGHT / 2), _WIDTH, _HEIGHT, zorder=3,
                                  boxstyle="round,pad=0,rounding_size=0.1", facecolor=_FILL[node.kind],
                                  edgecolor=_LINE[node.kind], linewidth=1.1))  # fmt: skip
    below = _parameters(node)
    if node.kind == INPUT:
        below = f"{_shape(node.shape)}  {node.dtype}"
    axes.text(x, y + (0.12 if below else 0), _short(node.label, 34), ha="center", va="center", fontsize=9, zorder=4)
    if below:
        axes.text(x, y - 0.14, below, ha="center", va="center", fontsize=7, color="#57606a", zorder=4)


def _parameters(node: Node) -> str:
    """Parameters and their shapes, with a gradient's sign in the backward pass."""
    sign = "∂" if node.kind == BACKWARD else ""
    shown = [f"{sign}{name.rpartition('.')[2]} {_shape(shape)}" for name, shape in node.parameters.items()]
    if len(shown) > 2:
        total = sum(_count(shape) for shape in node.parameters.values())
        return f"{len(shown)} parameters, {total:,} values"
    return _short(", ".join(shown), 46)


def _frames(axes: Axes, nodes: Sequence[Node], places: dict[str, Place]) -> None:
    """A frame around the nodes of each module that holds several."""
    members: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in nodes:
        for module in node.modules:
            members[module].append(node)
    frames = {module: inside for module, inside in members.items() if len(inside) > 1}
    for module, inside in frames.items():
        deeper = sum(
            other != module and other[0].startswith(f"{module[0]}.") and set(map(id, more)) <= set(map(id, inside))
            for other, more in frames.items()
        )
        pad, above = 0.17 + 0.16 * min(deeper, 3), 0.08 + 0.05 * min(deeper, 2)
        xs, ys = [places[n.name][0] for n in inside], [places[n.name][1] for n in inside]
        x, y = min(xs) - _WIDTH / 2 - pad, min(ys) - _HEIGHT / 2 - above
        width, height = max(xs) + _WIDTH / 2 + pad - x, max(ys) + _HEIGHT / 2 + above - y
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", zorder=0,
                                      facecolor="#f6f8fa", edgecolor=_MODULE, linewidth=0.8, alpha=0.9))  # fmt: skip
        axes.text(x + width - 0.02, y + height - 0.1, f"{module[0]}  {module[1]}", fontsize=6.5, color="#57606a",
                  rotation=-90, va="top", ha="right", zorder=5)  # fmt: skip


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape)) if shape else "scalar"


def _count(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
