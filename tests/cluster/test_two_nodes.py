"""Two Ray nodes on this machine: the worker beside the server shares memory, the other's relay exchanges over TCP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import write_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

# In a process of its own: a process has one Ray at a time.
SCRIPT = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from distrain.config import load_config
from distrain.trainer import Trainer

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
def train(count, *more):
    return Trainer(load_config(sys.argv[1], [f"workers.count={count}", "epochs=2", *more])).fit().parameters_sha256

runs = ([1], [2], [2, "server.slices=2"], [2, "server.slices=3"], [1, "server.slices=2"])
hashes = [train(*run) for run in runs]
rounded = [train(*run, "server.wire_dtype=bf16") for run in runs[:3]]
kept = ["workers.precision=fp16", "gradient_noise.eta=0.01", "averaging.decay=0.9"]  # what a slice has a state of
stateful = [train(*run, *kept) for run in ([1], [2, "server.slices=2"])]
print(json.dumps({"nodes": len(ray.nodes()), "hashes": hashes, "rounded": rounded, "stateful": stateful}))
ray.shutdown()
cluster.shutdown()
"""


def test_workers_and_slices_on_two_nodes_give_the_same_bits_as_one(tmp_path: Path):
    job = write_job(tmp_path, tracking={"enabled": False})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(job)], capture_output=True, text=True, timeout=240, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["nodes"] == 2
    assert len(set(said["hashes"])) == len(set(said["rounded"])) == len(set(said["stateful"])) == 1
    assert len({said[kind][0] for kind in ("hashes", "rounded", "stateful")}) == 3
