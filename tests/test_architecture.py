"""Imports point one way, and each outside library has its doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distrain"

# A module imports only modules of its own layer or a lower one. The longest matching prefix counts.
LAYERS = {
    "distrain": 6,
    "distrain.cli": 6,
    "distrain.study": 5,
    "distrain.trainer": 4,
    "distrain.inference": 4,
    "distrain.planning": 4,
    "distrain.final_model": 4,
    "distrain.doctor": 4,
    "distrain.jobs": 3,
    "distrain.monitoring": 3,
    "distrain.actors": 3,
    "distrain.crew": 4,
    "distrain.placement": 3,
    "distrain.preparation": 3,
    "distrain.bench_core": 4,
    "distrain.worker": 2,
    "distrain.relay": 2,
    "distrain.server": 2,
    "distrain.checkpoint": 1,
    "distrain.checkpoint_writer": 2,
    "distrain.tracking": 2,
    "distrain.progress": 2,
    "distrain.ray_guard": 0,
    "distrain.signals": 0,
    "distrain.history": 1,
    "distrain.data": 1,
    "distrain.learning": 1,
    "distrain.exchange": 1,
    "distrain.devices": 1,
    "distrain.figures": 1,
    "distrain.manifest": 1,
    "distrain.objects": 1,
    "distrain.storage": 1,
    "distrain.run_lock": 2,
    "distrain.data.plan": 0,
    "distrain.server.ledger": 0,
    "distrain.server.dealing": 0,
    "distrain.server.agenda": 0,
    "distrain.server.skipping": 0,
    "distrain.server.loss_scale": 0,
    "distrain.reduction": 0,
    "distrain.supervision": 0,
    "distrain.config": 0,
    "distrain.config_file": 0,
    "distrain.credentials": 0,
    "distrain.errors": 0,
    "distrain.study.advice": 0,
    "distrain.study.claims": 0,
    "distrain.study.critical_batch": 0,
    "distrain.study.forecast": 0,
    "distrain.study.grid": 0,
    "distrain.study.noise_scale": 0,
    "distrain.study.point": 0,
    "distrain.study.step_time": 0,
    "distrain.study.graph": 1,
    "distrain.study.graph_figure": 1,
    "distrain.study.record": 1,
    "distrain.study.sweep_figures": 1,
    "distrain.records": 0,
    "distrain.preview": 0,
    "distrain.step_sums": 0,
    "distrain.durable": 0,
    "distrain.imports": 0,
    "distrain.jsonable": 0,
    "distrain.process": 0,
}

# Which modules may import a library, at any depth.
DOORS = {
    "ray": ("distrain.jobs", "distrain.monitoring", "distrain.crew", "distrain.placement", "distrain.actors"),
    "mlflow": ("distrain.tracking",),
    "pyarrow": ("distrain.data", "distrain.inference", "distrain.objects"),
    "socket": ("distrain.exchange", "distrain.run_lock"),
    "mmap": ("distrain.exchange",),
    "pydantic": ("distrain.config",),
    "rich": ("distrain.progress", "distrain.cli"),
    "click": ("distrain.cli",),
}

MODULES = {
    ".".join(("distrain", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """Everything a file imports, but for typing alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def is_within(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    for name in imports_of(MODULES[module]):
        if name.startswith("distrain.") and not name.startswith("distrain.__version__"):
            assert layer_of(name) <= layer_of(module), f"{module} imports {name}, of a higher layer"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_come_in_by_their_doors(module: str):
    for name in imports_of(MODULES[module]):
        library = name.split(".")[0]
        if library in DOORS:
            assert is_within(module, DOORS[library]), f"{module} imports {library}"


@pytest.mark.parametrize("module", ["distrain.worker", "distrain.server.loop"])
def test_worker_and_server_need_neither_ray_nor_mlflow(module: str):
    code = f"import sys, {module}; assert not {{'ray', 'mlflow'}} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_run_starts_without_waiting_for_what_only_its_end_and_studies_need():
    code = "import sys, distrain.cli, distrain.progress, distrain.trainer; "
    code += "assert not {'mlflow', 'matplotlib', 'scipy', 'networkx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_command_line_starts_without_waiting_for_torch():
    code = "import sys, distrain.cli, distrain.config; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
