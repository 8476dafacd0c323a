"""The files that bring a cluster up, by the validation of those who read them: Ray, AWS's client, Kubernetes."""

import copy
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.runtime.existing import STORAGE
from cluster.submission.bundle import PACKAGES
from tests.cli.command_lines import parse_manta

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = {"aws": "ray-cluster.yaml", "local": "cluster/on-premises.yaml"}
KUBERNETES = ROOT / "cluster" / "kubernetes.yaml"
SIZES = [  # of ec2:DescribeInstanceTypes, what Ray looks at
    {"InstanceType": "m6i.xlarge", "VCpuInfo": {"DefaultVCpus": 4}, "MemoryInfo": {"SizeInMiB": 16384}},
    {
        "InstanceType": "g5.12xlarge",
        "VCpuInfo": {"DefaultVCpus": 48},
        "MemoryInfo": {"SizeInMiB": 196608},
        "GpuInfo": {"Gpus": [{"Name": "A10G", "Manufacturer": "NVIDIA", "Count": 4}]},
    },
]
HEALTH = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "4"}


def launcher_file(kind: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / FILES[kind]).read_text())


def prepared(kind: str) -> dict[str, Any]:
    """As `ray up` reads the file; what it asks AWS for is told by SIZES."""
    config = prepare_config(launcher_file(kind))
    if kind == "aws":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node_provider, "list_ec2_instances", lambda *_: SIZES)
            config = node_provider.AWSNodeProvider.fillout_available_node_types_resources(config)
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all(KUBERNETES.read_text())}


# -- `ray up` ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_ray_takes_the_file_and_no_other_fields(kind):
    prepared(kind)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config({**prepared(kind), "idle_timeout": 10})


@pytest.mark.parametrize("kind", FILES)
def test_all_nodes_get_this_project_and_the_token(kind):
    config = prepared(kind)
    mounts = config["file_mounts"]
    for path in (path for path in mounts.values() if not path.startswith("~")):
        assert (ROOT / path).exists(), path
    assert {*PACKAGES, "pyproject.toml", PROJECT["project"]["readme"]} <= set(mounts.values())
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        (install,) = (command for command in commands if "--editable" in command)
        assert "--constraint ~/manta/cluster/constraints.txt --editable ~/manta" in install


@pytest.mark.parametrize("kind", FILES)
def test_nothing_listens_for_strangers_and_the_dead_are_soon_known(kind):
    (head,) = (command for command in prepared(kind)["head_start_ray_commands"] if "ray start --head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert dict(re.findall(r"RAY_health_check_(\w+)=(\d+)", head)) == HEALTH


def test_the_cloud_grows_from_nothing_and_shrinks_again():
    config = prepared("aws")
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == types["spot"]["resources"]["GPU"] == 4
    assert types["gpu"]["min_workers"] == types["spot"]["min_workers"] == 0
    assert 0 < types["gpu"]["max_workers"] <= config["max_workers"]
    assert types["spot"]["max_workers"] == 0  # an option
    assert types["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["idle_timeout_minutes"] == 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_aws_takes_the_nodes():
    """By the service's own description of what starts an instance, which its client checks before it asks."""
    service = botocore.session.Session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    for name, kind in prepared("aws")["available_node_types"].items():
        wanted = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(wanted, shape).has_errors(), name
    wrong = ParamValidator().validate({"InstanceTyp": "x", "MinCount": 1, "MaxCount": 1}, shape)
    assert "InstanceTyp" in wrong.generate_report()


@pytest.mark.parametrize("kind", FILES)
def test_the_variable_reaches_every_shell_of_a_node(kind, tmp_path):
    """What sets it is run twice, as a second `ray up` does, then a shell is started as Ray's launcher starts them."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    config = prepared(kind)
    settings = [command for command in config["worker_setup_commands"] if "manta.env" in command]
    assert settings == [command for command in config["head_setup_commands"] if "manta.env" in command]
    shell = ["bash", "--login", "-c", "-i"]
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for command in [*settings, *settings]:
        subprocess.run([*shell, command], env=home, check=True, capture_output=True)
    assert (tmp_path / ".bashrc").read_text().count("manta.env") == 1
    asked = 'source ~/.bashrc; echo "$MANTA_STORAGE $RAY_AUTH_MODE $ACTIVATED"'
    told = subprocess.run([*shell, asked], env=home, check=True, capture_output=True, text=True).stdout
    (storage, *others) = told.split()
    assert storage.startswith(("s3://", "/"))
    assert others == ["token", "yes"]


@pytest.mark.parametrize("file", [*FILES.values(), "cluster/kubernetes.yaml"])
def test_one_place_says_where_runs_go(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if STORAGE in line and "#" not in line]
    assert len(lines) == 1


@pytest.mark.parametrize("kind", FILES)
def test_all_commands_are_those_of_a_shell(kind):
    config = prepared(kind)
    for step in ("head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        for command in config[f"{step}_commands"]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


# -- Kubernetes --------------------------------------------------------------------------------------------------------

TEMPLATE = {"type": "object"}  # Kubernetes' own: see below
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNT = {"type": "integer", "minimum": 0}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


# What of KubeRay's API (ray.io/v1, of its releases 1.5.1 to 1.6.2: https://ray-project.github.io/kuberay/reference/api/)
# the file may use; the definitions themselves, nearly a megabyte, are in no package of Python's index.
RAY_CLUSTER = fields(
    required=("headGroupSpec",),
    rayVersion={"type": "string"},
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=fields(
        idleTimeoutSeconds=AMOUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=fields(
        required=("rayStartParams", "template"),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=TEXTS,
        template=TEMPLATE,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            required=("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName={"type": "string"},
            replicas=AMOUNT,
            minReplicas=AMOUNT,
            maxReplicas=AMOUNT,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        ),
    },
)
RAY_JOB = fields(
    required=("entrypoint",), entrypoint={"type": "string"}, clusterSelector=TEXTS, backoffLimit=AMOUNT, metadata=TEXTS
)


def groups(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = objects["RayCluster"]["spec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that KubeRay makes of the cluster's templates."""
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **copy.deepcopy(group["template"])}
        for group in groups(objects)
    ]


def test_kubernetes_takes_volume_settings_and_pods(objects):
    for each in (objects["PersistentVolumeClaim"], objects["ConfigMap"], *pods(objects)):
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    wrong = pods(objects)[0]
    wrong["spec"]["containers"][0]["envFrm"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="envFrm"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_kuberay_has_all_fields_that_are_used(objects):
    assert {each["apiVersion"] for kind, each in objects.items() if kind.startswith("Ray")} == {"ray.io/v1"}
    jsonschema.validate(objects["RayCluster"]["spec"], RAY_CLUSTER)
    jsonschema.validate(objects["RayJob"]["spec"], RAY_JOB)
    assert objects["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": objects["RayCluster"]["metadata"]["name"]}


def test_rays_autoscaler_reads_the_cluster(objects):
    """By the code that Ray's autoscaler itself runs on the object that Kubernetes gives it."""
    cluster = copy.deepcopy(objects["RayCluster"])
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    assert config["idle_timeout_minutes"] == 10
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "memory": 0}
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)


def test_every_pod_has_the_token_the_storage_and_the_settings(objects):
    assert objects["RayCluster"]["spec"]["authOptions"]["mode"] == "token"  # of all pods: KubeRay sees to it
    assert objects["RayCluster"]["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    settings, volume = objects["ConfigMap"], objects["PersistentVolumeClaim"]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(objects):
        (container,) = pod["spec"]["containers"]
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in container["envFrom"]
        (mount,) = container["volumeMounts"]
        assert Path(settings["data"][STORAGE]).is_relative_to(mount["mountPath"])
        (mounted,) = (each for each in pod["spec"]["volumes"] if each["name"] == mount["name"])
        assert mounted["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    assert {name: settings["data"][f"RAY_health_check_{name}"] for name in HEALTH} == HEALTH


def test_parts_are_applied_and_deleted_one_by_one(objects):
    parts = {kind: each["metadata"]["labels"]["manta"] for kind, each in objects.items()}
    assert parts == {
        "PersistentVolumeClaim": "storage",
        "ConfigMap": "cluster",
        "RayCluster": "cluster",
        "RayJob": "job",
    }


# -- versions ----------------------------------------------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_versions_of_nodes_are_those_that_this_project_takes():
    wanted = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    found = {one.name: one.specifier for one in wanted}
    for name, version in constraints().items():
        assert found[name].contains(version), name


def test_the_image_has_the_ray_that_the_cluster_names(objects):
    image = (ROOT / "cluster" / "Dockerfile").read_text()
    ray = constraints()["ray"]
    assert f"FROM rayproject/ray:{ray}-py" in image
    assert objects["RayCluster"]["spec"]["rayVersion"] == ray
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for name in line.split()]
    assert {*PACKAGES, "pyproject.toml", PROJECT["project"]["readme"]} == set(copied)


def test_the_job_is_a_command_of_manta(objects):
    python, m, jobs, *arguments = shlex.split(objects["RayJob"]["spec"]["entrypoint"])
    assert (python, m, jobs) == ("python", "-m", "jobs")
    parse_manta(shlex.join(["manta", *arguments]))
