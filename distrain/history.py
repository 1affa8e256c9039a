"""An append-only history of a run, and the check that it lost nothing: `python -m distrain.history FILE`.

One JSON object a line, flushed as it is written. "run" comes first, and again when the run is resumed; then, in order
of time, "step" (an update, and which blocks of shards from which worker's incarnation went into it, as the ledger took
them), "durable" (a checkpoint was written) and "restored" (a server went on from a checkpoint, after one died).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.records import StepRecord


class History:
    """Appends to a run's history."""

    def __init__(self, path: Path, num_shards: int, steps_per_epoch: int, num_rows: int, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed with the run)
        self._write("run", shards=num_shards, steps_per_epoch=steps_per_epoch, rows=num_rows, first_step=first_step)

    def steps(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            self._write("step", step=record.step, samples=record.samples, taken=record.taken)

    def durable(self, step: int) -> None:
        self._write("durable", step=step)

    def restored(self, step: int) -> None:
        self._write("restored", step=step)

    def close(self) -> None:
        self._file.close()

    def _write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")


@dataclass
class Checked:
    """What a history that holds says."""

    steps: int = 0
    repeated_steps: int = 0  # done again after a server died
    restores: int = 0
    incarnations: int = 0


def check(path: Path) -> tuple[Checked, list[str]]:
    """Check a history. Returns what it says, and one line for each thing that is wrong in it.

    Steps follow one another; each takes every shard once; where a server takes over it goes back to a step that had
    been made durable, and never before the last of those; an epoch's steps have as many samples as there are rows.
    """
    found, problems = Checked(), []
    seen: set[tuple[int, int]] = set()
    run: dict[str, Any] = {}
    samples: dict[int, int] = {}
    step = durable = life = 0
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            problems.append(f"line {number}: not JSON: {text[:50]!r}")
            continue
        match line["kind"]:
            case "run":
                if run and line["first_step"] < durable:
                    problems.append(f"line {number}: resumed from step {line['first_step']}, {durable} was durable")
                run, step, life = line, line["first_step"], life + 1
                durable = step
            case "restored":
                if line["step"] < durable:
                    problems.append(f"line {number}: went back to step {line['step']}, {durable} was durable")
                found.restores += 1
                found.repeated_steps += step - line["step"]
                step, life = line["step"], life + 1
            case "durable":
                if line["step"] > step:
                    problems.append(f"line {number}: step {line['step']} is durable, {step} was the last done")
                durable = max(durable, line["step"])
            case "step":
                if line["step"] != step + 1:
                    problems.append(f"line {number}: step {line['step']} follows step {step}")
                step = line["step"]
                samples[step] = line["samples"]
                shards = sorted(s for _, first, stop in line["taken"] for s in range(first, stop))
                if shards != list(range(run["shards"])):
                    problems.append(f"line {number}: step {step} took shards {shards} of {run['shards']}")
                seen.update((life, incarnation) for incarnation, _, _ in line["taken"])
    found.steps, found.incarnations = len(samples), len(seen)
    length = run.get("steps_per_epoch", 0)
    for epoch in range(step // length if length else 0):
        of_epoch = [samples.get(epoch * length + place) for place in range(1, length + 1)]
        if None not in of_epoch and sum(filter(None, of_epoch)) != run["rows"]:
            problems.append(f"epoch {epoch}: {sum(filter(None, of_epoch))} samples of {run['rows']} rows")
    return found, problems


def main() -> None:
    found, problems = check(Path(sys.argv[1]))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems")
    else:
        print(
            f"{found.steps} steps, each shard once in each; {found.repeated_steps} done again after {found.restores} "
            f"restores; {found.incarnations} incarnations of workers"
        )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
