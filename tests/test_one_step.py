"""One whole distributed step in one process, without Ray: read this first.

Rows are dealt out by the plan, read by readers, turned into gradients by two workers, summed and applied by the
parameter server. The updated parameters are checked against forward and backward propagation written in NumPy from
the matrix equations.
"""

from __future__ import annotations

import numpy as np
import torch

from distrain.config import OptimizerConfig
from distrain.data.plan import Plan
from distrain.learning.task import build_task
from distrain.server.loop import LoopSettings
from distrain.worker import Source
from tests.support.datasets import ArrayDataset
from tests.support.numpy_mlp import NumpyMLP
from tests.support.runs import Job, task, train


def test_one_step_of_two_workers_is_one_step_of_gradient_descent():
    rng = np.random.default_rng(0)
    features, label = rng.normal(size=(37, 4)).astype(np.float32), rng.normal(size=37).astype(np.float32)

    # 37 rows in 4 row groups, one global minibatch of all of them, dealt to 2 shards.
    dataset = ArrayDataset(features, label, row_group_rows=10)
    plan = Plan(dataset.row_counts, batch_size=37, num_shards=2)
    job = Job(
        train=Source(dataset, plan),
        task=task({"hidden": [8], "activation": "tanh"}, loss="mse", num_features=4),
        optimizer=OptimizerConfig(name="SGD", lr=0.1),
        loop=LoopSettings(epochs=1, num_workers=2),
    )
    before = build_task(job.task).model
    run, report = train(job, num_workers=2)

    # The same step by hand.
    layers = [m for m in before.modules() if isinstance(m, torch.nn.Linear)]
    reference = NumpyMLP(
        weights=[layer.weight.detach().double().numpy().T for layer in layers],
        biases=[layer.bias.detach().double().numpy() for layer in layers],
        activation="tanh",
        loss="mse",
    )
    loss, gradients = reference.loss_and_gradients(features.astype(np.float64), label.astype(np.float64))

    [step] = report.steps
    assert step.samples == 37 and step.workers == 2
    np.testing.assert_allclose(step.loss, loss, rtol=1e-6)
    after = dict(run.server.model.named_parameters())
    for (name, parameter), gradient in zip(before.named_parameters(), gradients, strict=True):
        expected = parameter.detach().double().numpy() - 0.1 * (gradient.T if gradient.ndim == 2 else gradient)
        np.testing.assert_allclose(after[name].detach().numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    np.testing.assert_allclose(step.grad_norm, norm, rtol=1e-6)
