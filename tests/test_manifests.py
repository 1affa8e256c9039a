"""Kubernetes manifests and `ray up` files fit their schemas, and say what distrain needs; a wrong key is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from distrain.config import ClusterConfig, TrainConfig, WorkersConfig

CLUSTER = Path(__file__).parents[1] / "cluster"
KUBERAY = yaml.safe_load((Path(__file__).parent / "support/schemas/kuberay.yaml").read_text())
MANIFESTS = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
RAY_UP = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
KUBERNETES = "1.33"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates in a KubeRay object."""
    spec = cluster_spec(document)
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def check(document: dict[str, Any]) -> None:
    """Raises a ValidationError, of jsonschema or of kubernetes_validate, for what the cluster would refuse."""
    if document["apiVersion"].startswith("ray.io/"):
        jsonschema.Draft202012Validator(KUBERAY).validate(document)
        for template in templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


REFUSALS = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_fit_their_schemas(path: Path):
    for document in documents(path):
        check(document)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_wrong_key_is_refused_wherever_it_stands(path: Path):
    for document in documents(path):
        for place in places(document):
            wrong = copy.deepcopy(document)
            reach(wrong, place)["replicsa"] = 1
            with pytest.raises(REFUSALS):
                check(wrong)


def places(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Where a key of the schemas stands: the object, its specification, and those of pods and containers."""
    found: list[tuple[Any, ...]] = [(), *([("spec",)] if "spec" in document else [])]
    if document["apiVersion"].startswith("ray.io/"):
        inner = ("spec", "rayClusterSpec") if document["kind"] == "RayJob" else ("spec",)
        found += [inner, (*inner, "headGroupSpec"), (*inner, "workerGroupSpecs", 0), (*inner, "authOptions")]
        pods = [(*inner, "headGroupSpec", "template"), (*inner, "workerGroupSpecs", 0, "template")]
    else:
        pods = [("spec", "template")] if document["kind"] == "Deployment" else []
    for pod in pods:
        found += [(*pod, "spec"), (*pod, "spec", "containers", 0), (*pod, "spec", "containers", 0, "securityContext")]
    return found


def reach(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


@pytest.mark.parametrize(
    "place, value",
    [
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), "1"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env"), [{"value": "x"}]),
        (("spec", "submissionMode"), "kubectl"),
        (("kind",), "RayTask"),
    ],
)
def test_a_wrong_value_is_refused(place: tuple[Any, ...], value: Any):
    [job] = [d for d in documents(CLUSTER / "kubernetes/rayjob.yaml") if d["kind"] == "RayJob"]
    reach(job, place[:-1])[place[-1]] = value
    with pytest.raises(REFUSALS):
        check(job)


@pytest.mark.parametrize("name, kind", [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_ray_pods_are_confined_and_told_what_they_need(name: str, kind: str):
    [document] = [d for d in documents(CLUSTER / f"kubernetes/{name}.yaml") if d["kind"] == kind]
    spec = cluster_spec(document)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for template in templates(document):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] > 60
        [container] = pod["containers"]
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]
        assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"]
        # KubeRay's own probes call wget, which the image has not.
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert container["envFrom"] == [{"secretRef": {"name": "distrain-data", "optional": True}}]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} and {"tmp", "shm"} <= mounts
    head = {each["name"]: each["value"] for each in templates(document)[0]["spec"]["containers"][0]["env"]}
    services = {d["metadata"]["name"] for d in documents(CLUSTER / "kubernetes/mlflow.yaml") if d["kind"] == "Service"}
    assert head["MLFLOW_TRACKING_URI"] in {f"http://{service}:5000" for service in services}
    claims = {d["metadata"]["name"] for d in documents(CLUSTER / f"kubernetes/{name}.yaml") if "Claim" in d["kind"]}
    used = [v["persistentVolumeClaim"]["claimName"] for v in templates(document)[0]["spec"]["volumes"] if
            "persistentVolumeClaim" in v]  # fmt: skip
    assert set(used) <= claims and head["DISTRAIN_CHECKPOINT_DIR"] == "/checkpoints"
    assert waits_for_machines(head)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [shm] = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["sizeLimit"] == "1Gi" and int(group["rayStartParams"]["object-store-memory"]) <= 2**29


def test_what_kuberay_adds_to_pods_is_confined_too():
    for name in ("raycluster", "rayjob"):
        [ray] = [d for d in documents(CLUSTER / f"kubernetes/{name}.yaml") if d["apiVersion"].startswith("ray.io/")]
        autoscaler = cluster_spec(ray)["autoscalerOptions"]["securityContext"]
        assert not autoscaler["allowPrivilegeEscalation"] and autoscaler["capabilities"]["drop"] == ["ALL"]
    template = ray["spec"]["submitterPodTemplate"]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    [container] = template["spec"]["containers"]
    assert "command" not in container and template["spec"]["restartPolicy"] == "Never", "KubeRay fills in the rest"
    assert (
        template["spec"]["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    )
    assert container["image"] == templates(ray)[0]["spec"]["containers"][0]["image"]


def waits_for_machines(environment: dict[str, str]) -> bool:
    """Whether a driver with this environment has the autoscaler add machines before it gives up."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return ClusterConfig().wait_seconds == 600


def test_no_manifest_takes_away_what_another_one_keeps():
    names = [(d["kind"], d["metadata"]["name"]) for path in MANIFESTS for d in documents(path)]
    assert len(names) == len(set(names))


def test_the_job_of_the_manifest_is_a_configuration_that_resumes_by_itself():
    parts = documents(CLUSTER / "kubernetes/rayjob.yaml")
    [settings] = [part for part in parts if part["kind"] == "ConfigMap"]
    [job] = [part for part in parts if part["kind"] == "RayJob"]
    config = TrainConfig.model_validate(yaml.safe_load(settings["data"]["job.yaml"]))
    assert config.resume == "auto"
    assert job["spec"]["entrypoint"] == "distrain train /jobs/job.yaml"
    assert job["spec"]["backoffLimit"] > 0
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["maxReplicas"] >= (config.workers.max or config.workers.count)


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` fills it in, before it asks the cloud."""
    return prepare_config(config)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_files_fit_rays_schema(path: Path):
    config = yaml.safe_load(path.read_text())
    validate_config(prepared(config))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    [token] = [option.split("=")[1] for option in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in option]
    assert token in config["file_mounts"]
    options = [option.removeprefix("--env ") for option in config["docker"]["run_options"] if "--env " in option]
    assert waits_for_machines(dict(option.split("=", 1) for option in options))
    assert all("--dashboard-host=0.0.0.0" not in command for command in config["head_start_ray_commands"])


def test_workers_of_ray_up_have_an_account_to_read_data_with():
    """Ray itself gives one to the head only."""
    workers = {path.stem: yaml.safe_load(path.read_text())["available_node_types"]["worker"] for path in RAY_UP}
    assert "Arn" in workers["aws"]["node_config"]["IamInstanceProfile"]
    [account] = workers["gcp"]["node_config"]["serviceAccounts"]
    assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"] and "@" in account["email"]
    config = yaml.safe_load((CLUSTER / "gcp.yaml").read_text())
    [command] = config["initialization_commands"]
    assert config["docker"]["image"].split("/")[0] in command.split()


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", [(), ("docker",), ("provider",), ("available_node_types", "worker")])
def test_ray_up_refuses_a_wrong_key(path: Path, place: tuple[str, ...]):
    config = yaml.safe_load(path.read_text())
    reach(config, place)["max_wrokers"] = 1
    refused = True
    try:
        validate_config(prepared(config))
        refused = False
    except (jsonschema.ValidationError, ValueError):
        pass
    # Ray's schema leaves the provider open, since each cloud has keys of its own.
    assert refused == (place != ("provider",))


def test_ray_up_refuses_a_head_that_is_no_node_type():
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    config["head_node_type"] = "chief"
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepared(config))


COMPOSE = yaml.safe_load((CLUSTER.parent / "docker-compose.yml").read_text())
RAY_SERVICES = {"ray-head", "ray-worker", "ray-worker-gpu"}


def test_compose_services_are_confined_and_only_this_machine_reaches_them():
    assert {"ray-head", "ray-worker", "mlflow"} == {n for n, s in COMPOSE["services"].items() if "profiles" not in s}
    assert {p for s in COMPOSE["services"].values() for p in s.get("profiles", [])} == {"gpu", "postgres", "monitoring"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "container_name" not in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for name in RAY_SERVICES:
        service = COMPOSE["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and service["secrets"] == ["ray_token"]
        assert "--metrics-export-port=8080" in service["command"] and "--object-store-memory=" in service["command"]
        # Without a value: taken from the shell, where it is set there.
        taken = {variable for variable, value in service["environment"].items() if value is None}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"} < taken


def test_a_plain_compose_up_has_room_for_a_job_of_the_default_size():
    assert COMPOSE["services"]["ray-worker"]["scale"] == f"${{WORKERS:-{WorkersConfig().count}}}"
    assert "--num-cpus=${WORKER_CPUS:-1}" in COMPOSE["services"]["ray-worker"]["command"] and WorkersConfig().cpus == 1


def test_prometheus_and_grafana_find_what_they_are_told_of():
    prometheus = yaml.safe_load((CLUSTER / "monitoring/prometheus.yml").read_text())
    [scraped] = [found for job in prometheus["scrape_configs"] for found in job["dns_sd_configs"]]
    assert set(scraped["names"]) == RAY_SERVICES and scraped["port"] == 8080
    mounts = [volume for name in ("prometheus", "grafana") for volume in COMPOSE["services"][name]["volumes"]]
    files = dict(mount.removesuffix(":ro").split(":") for mount in mounts if mount.startswith("./"))
    assert all((CLUSTER.parent / source).is_file() for source in files)
    [source] = yaml.safe_load((CLUSTER / "monitoring/datasource.yml").read_text())["datasources"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((CLUSTER / "monitoring/dashboards.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/distrain.json" in files.values()
