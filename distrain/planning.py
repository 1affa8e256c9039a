"""What a run would be, before anything starts: `distrain plan`."""

from __future__ import annotations

import os

import torch

from distrain.config import TrainConfig
from distrain.errors import DistrainError
from distrain.exchange.layout import Layout
from distrain.learning.fit import check_task
from distrain.learning.optimizers import build_optimizer
from distrain.learning.schedules import build_schedule
from distrain.learning.task import build_task
from distrain.placement import Cluster, Resources, check_local_room
from distrain.preparation import Preparation, prepare
from distrain.preview import FilePreview, Preview
from distrain.worker import Source

_PROCESS_BYTES = 350 << 20  # a Ray actor with torch and pyarrow loaded, measured


def preview(config: TrainConfig) -> Preview:
    """Find out what a run would be: footers are read and the model is built, nothing is started or trained.

    Attaches to the cluster where one is named, to see what is there. Raises what `Trainer.fit` would before its start.
    """
    preparation = prepare(config)
    torch.manual_seed(config.seed)
    task = build_task(preparation.task)
    check_task(task, preparation.train.dataset, preparation.train.plan.smallest_forward)
    model = task.model
    build_schedule(build_optimizer(model, config.optimizer.scaled(preparation.train.plan.batch_size)), config.schedule)
    layout = Layout.of(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    plan = preparation.train.plan
    where, asked, there, warnings = _resources(config)
    return Preview(
        files=_files(preparation),
        num_rows=plan.num_rows,
        num_validation_rows=preparation.validation.plan.num_rows if preparation.validation is not None else 0,
        num_features=preparation.task.num_features,
        num_outputs=preparation.task.num_outputs,
        batch_size=plan.batch_size,
        num_shards=plan.num_shards,
        smallest_microbatch=plan.smallest_forward,
        steps_per_epoch=preparation.updates_per_epoch,
        epochs=config.epochs,
        total_steps=preparation.total_steps,
        num_parameters=num_parameters,
        num_workers=config.workers.count,
        worker_bytes=_worker_bytes(config, preparation, layout),
        server_bytes={
            "process": _PROCESS_BYTES,
            "parameters": _parameters_bytes(config, layout),
            "gradients": layout.vector_bytes,
            "optimizer": 2 * layout.vector_bytes,
            "checkpoint": 3 * layout.vector_bytes,
        },
        cluster=where,
        asked=asked,
        there=there,
        warnings=(*warnings, *preparation.warnings),
    )


def _files(preparation: Preparation) -> tuple[FilePreview, ...]:
    previews = []
    for context, source in (("training", preparation.train), ("validation", preparation.validation)):
        if source is None:
            continue
        groups = [group.file for group in source.dataset.row_groups]
        previews += [
            FilePreview(file.path, file.num_rows, groups.count(number), file.size_bytes, context)
            for number, file in enumerate(source.dataset.files)
        ]
    return tuple(previews)


def _worker_bytes(config: TrainConfig, preparation: Preparation, layout: Layout) -> dict[str, int]:
    """The memory of one worker. Windows are exact for features and labels, and estimated for a transform."""
    shards = -(-preparation.train.plan.num_shards // config.workers.count)
    windows = 2 * shards * _largest_window(preparation.train)
    if preparation.validation is not None:
        windows += 2 * shards * _largest_window(preparation.validation)
    blocks = (1 + shards.bit_length()) * (1 + _staleness(config))
    return {"process": _PROCESS_BYTES, "windows": windows, "gradients": (1 + blocks) * layout.vector_bytes}


def _staleness(config: TrainConfig) -> int:
    """How many more rounds than one are in flight."""
    return config.server.staleness or 0 if config.server.mode == "sync" else 0


def _parameters_bytes(config: TrainConfig, layout: Layout) -> int:
    """The parameters that the server holds: the current ones, what workers read beside them, and as it is sent."""
    if config.server.mode == "async":
        return (1 + config.workers.count) * layout.published_bytes
    is_rounded, read = config.server.wire_dtype != "fp32", 1 + _staleness(config)
    vectors = 1 if read == 1 and not is_rounded else 1 + read
    return vectors * layout.published_bytes + is_rounded * read * layout.published_bytes // 2


def _largest_window(source: Source) -> int:
    """Bytes of the largest window of the first epoch, estimated for ragged rows and a transform."""
    plan, columns = source.plan, source.dataset.columns
    rows = max((w.num_rows for k in range(plan.num_shards) for w in plan.windows(0, k)), default=0)
    if columns.num_features is None:
        groups = source.dataset.row_groups
        return rows * sum(group.num_bytes for group in groups) // max(1, source.dataset.num_rows)
    value_bytes = 1 if columns.image_shape is not None else 4
    return rows * (value_bytes * columns.num_features + 8 * len(columns.labels))


def _resources(config: TrainConfig) -> tuple[str, dict[str, float], dict[str, float], tuple[str, ...]]:
    """Where it would run, what is asked for, what is there, and what to mind."""
    count, gpus = config.workers.count, config.workers.all_gpus
    asked = {"CPU": config.workers.all_cpus, **({"GPU": gpus} if gpus else {})}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        try:
            room = check_local_room(config.workers)
        except DistrainError as error:
            return "a local Ray of its own", asked, {"CPU": float(os.cpu_count() or 1)}, (error.message,)
        shared = (f"{count} workers would share {room.there_cpus:g} cores",) if room.shared_cores else ()
        return "a local Ray of its own", asked, _there(room), shared
    try:
        cluster = Cluster(address, config.workers, config.cluster.wait_seconds)
    except DistrainError as error:
        return address, asked, {}, (error.message,)
    try:
        return address, asked, _there(cluster.resources), ()
    finally:
        cluster.close()


def _there(room: Resources) -> dict[str, float]:
    return {"CPU": room.there_cpus, **({"GPU": room.there_gpus} if room.asked_gpus else {})}
