"""The files that put the project on a cluster fit each other. No cloud or Kubernetes is asked."""

import copy
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from mnistsum_ray.cli import config_from_args
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.reporting.prometheus import COUNTERS, GAUGES
from tests.jobs import RAY, ROOT, free_port, kill_everything

DEPLOY = ROOT / "docs/deploy"
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HOME = "/home/ubuntu"
INSTALL = "cd ~/mnistsum_ray && ~/venv/bin/pip install -q -c constraints.txt"
KUBERAY: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
CRONJOB: dict[str, Any] = yaml.safe_load((DEPLOY / "cronjob.yaml").read_text())
RAY_CLUSTER = KUBERAY["spec"]["rayClusterSpec"]


def test_cluster_yaml_is_one_and_opens_nothing_to_the_world() -> None:
    config = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], f"Ray would open {name}'s SSH to the world"
        assert node["IamInstanceProfile"]["Name"], f"without it, {name} would need keys"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    for kind in ("head", "worker"):
        commands = config[f"{kind}_setup_commands"]
        assert commands[:-1] == CLUSTER["setup_commands"], "no nightly build of Ray's defaults"
        assert commands[-1].startswith(INSTALL)
        assert ("download.pytorch.org/whl/cpu" in commands[-1]) == (kind == "head")
        assert "--dashboard-host" not in " ".join(config[f"{kind}_start_ray_commands"])
    assert f"{HOME}/.ray/auth_token" in config["file_mounts"]


@pytest.mark.slow
def test_a_worker_of_cluster_yaml_joins_its_head_with_the_token() -> None:
    """Both run their own last line, but for ports and for what starts machines."""
    ports = {"6379": str(free_port()), "8080": "0"}
    with tempfile.TemporaryDirectory(prefix="r") as home:  # short, as a socket's path must be
        Path(home, "venv").mkdir()
        Path(home, "venv", "bin").symlink_to(RAY.parent)
        Path(home, ".ray").mkdir()
        Path(home, ".ray", "auth_token").write_text("a" * 64)
        given = {name: os.environ[name] for name in os.environ if not name.startswith("RAY_")}
        given |= {"HOME": home, "RAY_TMPDIR": home, "RAY_HEAD_IP": "127.0.0.1"}
        nodes = []
        try:
            for kind in ("head", "worker"):
                line = CLUSTER[f"{kind}_start_ray_commands"][-1]
                line = re.sub("6379|8080", lambda port: ports[port[0]], line)
                line = re.sub("--autoscaling-config.*", "--include-dashboard=false", line)
                command = ["bash", "-c", f"{line} --num-cpus=1 --block"]
                node = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, text=True)
                nodes.append(node)
                said = ""
                while node.poll() is None and "Ray runtime started" not in said:
                    said += node.stdout.readline()  # type: ignore[union-attr]
                assert "Ray runtime started" in said, f"{kind}: {said}"
        finally:
            for node in nodes:
                kill_everything(node.pid)
                node.wait()


def test_kuberay_and_kubernetes_know_every_field_and_give_no_privileges() -> None:
    """KubeRay by what its CRD (Apache License 2.0) says of the fields that the file uses."""
    schema = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
    jsonschema.validate(KUBERAY, schema["rayjob"])
    groups = [RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"]]
    pods = [group["template"] for group in groups]
    pods.append(CRONJOB["spec"]["jobTemplate"]["spec"]["template"])
    for resource in (CRONJOB, *({"apiVersion": "v1", "kind": "Pod"} | pod for pod in pods)):
        kubernetes_validate.validate(resource, "1.31", strict=True)
    images = set()
    for pod in pods:
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        images.add(container["image"])
    assert all("@sha256:" in image for image in images), "a tag can be moved"


def test_the_nightly_job_is_tried_again_after_75_and_not_after_what_would_come_again() -> None:
    (job,) = CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert job["command"] == ["mnistsum", "score"]
    config_from_args(ScoreConfig, job["args"])
    rules = CRONJOB["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    (final,) = (rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob")
    assert final == [2]


def test_a_job_may_write_its_own_results_alone() -> None:
    for job, results in (("train", "runs"), ("score", "scored")):
        policy = json.loads((DEPLOY / f"{job}-policy.json").read_text())
        for statement in policy["Statement"]:
            if {"s3:PutObject", "s3:DeleteObject"} & {*statement["Action"]}:
                bucket = f"arn:aws:s3:::BUCKET/{results}"
                assert statement["Resource"] == [bucket, f"{bucket}/*"]


def test_all_have_the_tested_ray() -> None:
    version = RAY_CLUSTER["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311" in (DEPLOY / "Dockerfile").read_text()
    assert f"ray=={version}\n" in (ROOT / "constraints.txt").read_text()


def test_dashboard_and_alerts_know_the_metrics_that_are_exported() -> None:
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    shown = " ".join(target["expr"] for target in targets)
    assert set(re.findall(r"ray_mnistsum_\w+", shown)) == exported
    assert "sum" not in shown.replace("mnistsum", ""), "each job of a run counts from its beginning"
    alerts = (DEPLOY / "alerts.yaml").read_text()
    assert {*re.findall(r"ray_mnistsum_\w+", alerts)} <= exported
    assert f'cronjob="{CRONJOB["metadata"]["name"]}"' in alerts
    (group,) = yaml.safe_load(alerts)["groups"]
    assert len(group["rules"]) == 3
