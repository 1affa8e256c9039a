"""A cluster of docker-compose.yml on a real Docker engine, under a project name, ports and token of its own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.heads import free_port
from tests.support.jobs import Finished, finish

REPOSITORY = Path(__file__).parents[2]
_UP_S, _DOWN_S = 900, 180


def engine_problem() -> str | None:
    """Why no containers can be run here; None where they can."""
    if not os.environ.get("DOCKER_HOST"):
        return "DOCKER_HOST names no Docker engine"
    try:
        asked = subprocess.run(["docker", "compose", "ls"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no docker command works here: {error}"
    return None if asked.returncode == 0 else f"no Docker engine answers: {asked.stderr.strip()}"


@dataclass
class ComposeCluster:
    """The containers of one project. `environment` is what a person would have in the shell."""

    environment: dict[str, str]
    dashboard: str
    mlflow: str

    @classmethod
    def prepare(cls, folder: Path) -> ComposeCluster:
        """What a cluster needs before it is started; its token lies in `folder`, for others to read: the containers'
        user is another."""
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o644)
        name, dashboard, mlflow = f"distrain-test-{secrets.token_hex(3)}", free_port(), free_port()
        settings = {
            "COMPOSE_PROJECT_NAME": name,
            "DISTRAIN_IMAGE": "distrain-test",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "DASHBOARD_PORT": str(dashboard),
            "MLFLOW_PORT": str(mlflow),
            "PWD": str(REPOSITORY),
        }
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        return cls(inherited | settings, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{mlflow}")

    def up(self, workers: int) -> None:
        """Build the image, and start or mend all containers."""
        self.compose("up", "--build", "--detach", "--wait", "--scale", f"ray-worker={workers}", timeout_s=_UP_S)

    def down(self) -> None:
        """Take everything down, volumes too."""
        self.compose("down", "--volumes", "--timeout", "5", timeout_s=_DOWN_S)

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        return self._run("docker", "compose", *arguments, timeout_s=timeout_s)

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments, timeout_s=60)

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """What `docker inspect` says of the containers, of one service or of all."""
        ids = self.compose("ps", "--quiet", *([service] if service is not None else [])).split()
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *ids))
        return found

    def processes(self, container: str) -> str:
        """The command lines of a container's processes."""
        return self.docker("top", container, "-eo", "pid,args")

    def start(self, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
        """Start a command of this machine's `distrain`, or another module's, with the cluster's address."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.dashboard},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def distrain(self, *arguments: str, cwd: Path = REPOSITORY, timeout_s: float = 240) -> Finished:
        """Run the command line to its end."""
        return finish(self.start("distrain.cli", *arguments, cwd=cwd), timeout_s)

    def lines_of(self, *arguments: str) -> Iterator[str]:
        """What the command line prints, line by line, until nobody wants more of it."""
        running = self.start("distrain.cli", *arguments)
        try:
            assert running.stdout is not None
            yield from running.stdout
        finally:
            running.kill()
            running.communicate()

    def _run(self, *command: str, timeout_s: float) -> str:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}{done.stderr[-5000:]}"
        return done.stdout
