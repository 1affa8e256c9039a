"""An append-only history of a run, and the check that it lost nothing: `python -m distrain.history FILE`.

One JSON object a line, flushed as it is written. "run" comes first, and again when the run is resumed; then, in order
of time, "step" (an update, and which shards of which of the plan's steps went into it, from which incarnation of a
worker, as the ledger took them), "durable" (a checkpoint was written) and "restored" (a server went on from a
checkpoint, after one died, and passed over so many newer ones that were damaged).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.records import StepRecord
from distrain.storage import Place, place


class History:
    """Appends to a run's history. `whole_steps`: each update takes every shard of one of the plan's steps."""

    def __init__(
        self,
        path: Path,
        num_shards: int,
        steps_per_epoch: int,
        num_rows: int,
        first_step: int,
        whole_steps: bool = True,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed with the run)
        self._write(
            "run",
            shards=num_shards,
            steps_per_epoch=steps_per_epoch,
            rows=num_rows,
            first_step=first_step,
            whole_steps=whole_steps,
        )

    def steps(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            # Rows that were skipped, as not finite, are accounted for.
            self._write("step", step=record.step, samples=record.samples + record.skipped_rows, taken=record.taken)

    def durable(self, step: int) -> None:
        self._write("durable", step=step)

    def restored(self, step: int, damaged: int = 0) -> None:
        self._write("restored", step=step, damaged=damaged)

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
    damaged: int = 0  # checkpoints passed over
    incarnations: int = 0


def check(path: Place) -> tuple[Checked, list[str]]:
    """Check a history. Returns what it says, and one line for each thing that is wrong in it.

    Steps follow one another; no microbatch (a shard of a step of the plan) is in two of them; where a server takes over
    it goes back no further than to the last step that had been made durable, or as many of those before it as
    checkpoints were found damaged; the steps of an epoch that is
    over have as many samples as there are rows.
    """
    found, problems = Checked(), []
    seen: set[tuple[int, int]] = set()
    run: dict[str, Any] = {}
    updates: dict[int, tuple[int, int]] = {}  # step -> (epoch, samples)
    applied: dict[tuple[int, int], int] = {}  # microbatch -> step
    step = life = 0
    durable: list[int] = []  # steps, in order

    def go_back(to: int) -> None:
        nonlocal step, life, durable
        durable = [at for at in durable if at <= to]
        for microbatch in [m for m, at in applied.items() if at > to]:
            del applied[microbatch]
        for later in [at for at in updates if at > to]:
            del updates[later]
        step, life = to, life + 1

    for number, text in enumerate(path.read_bytes().decode().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            problems.append(f"line {number}: not JSON: {text[:50]!r}")
            continue
        match line["kind"]:
            case "run":
                if run and line["first_step"] < max(durable, default=0):
                    problems.append(f"line {number}: resumed from step {line['first_step']}, {durable[-1]} was durable")
                run = line
                go_back(line["first_step"])
            case "restored":
                if sum(at > line["step"] for at in durable) > line["damaged"]:
                    problems.append(f"line {number}: went back to step {line['step']}, {durable[-1]} was durable")
                found.restores += 1
                found.damaged += line["damaged"]
                found.repeated_steps += step - line["step"]
                go_back(line["step"])
            case "durable":
                if line["step"] > step:
                    problems.append(f"line {number}: step {line['step']} is durable, {step} was the last done")
                if line["step"] not in durable:
                    durable = sorted([*durable, line["step"]])
            case "step":
                if line["step"] != step + 1:
                    problems.append(f"line {number}: step {line['step']} follows step {step}")
                step = line["step"]
                took = sorted((of_step, k) for _, of_step, first, stop in line["taken"] for k in range(first, stop))
                if run["whole_steps"] and took != [(step - 1, shard) for shard in range(run["shards"])]:
                    shards = [shard for _, shard in took]
                    problems.append(f"line {number}: step {step} took shards {shards} of {run['shards']}")
                updates[step] = (took[0][0] // run["steps_per_epoch"] if took else -1, line["samples"])
                for incarnation, of_step, first, stop in line["taken"]:
                    seen.add((life, incarnation))
                    for microbatch in [(of_step, shard) for shard in range(first, stop)]:
                        if microbatch in applied:
                            problems.append(
                                f"line {number}: step {step} took shard {microbatch[1]} of the plan's step {of_step}, "
                                f"which step {applied[microbatch]} had taken"
                            )
                        applied[microbatch] = step
    found.steps, found.incarnations = step, len(seen)
    samples = Counter[int]()
    for epoch, count in updates.values():
        samples[epoch] += count
    complete = Counter(of_step // run["steps_per_epoch"] for of_step, _ in applied) if run else Counter[int]()
    for epoch in samples:
        over = epoch < max(samples) or complete[epoch] == run["steps_per_epoch"] * run["shards"]
        begun_here = (min(updates) - 1) == 0 or epoch > min(samples)  # else a part of it is in no history
        if over and begun_here and samples[epoch] != run["rows"]:
            problems.append(f"epoch {epoch}: {samples[epoch]} samples of {run['rows']} rows")
    return found, problems


def main() -> None:
    found, problems = check(place(sys.argv[1]))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems")
    else:
        print(
            f"{found.steps} steps, each microbatch in one of them; {found.repeated_steps} done again after "
            f"{found.restores} restores, with {found.damaged} checkpoints damaged; {found.incarnations} incarnations "
            "of workers"
        )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
