"""The files that put the project on a cluster fit each other. No cloud or Kubernetes is asked."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from mnistsum_ray.reporting.prometheus import COUNTERS, GAUGES
from tests.jobs import ROOT

DEPLOY = ROOT / ".deploy"
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HOME = "/home/ubuntu"
INSTALL = "cd ~/mnistsum_ray && ~/venv/bin/pip install -q -c .constraints.txt"
KUBERAY: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())


def test_cluster_yaml_is_one_and_opens_nothing_to_the_world() -> None:
    config = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], f"Ray would open {name}'s SSH to the world"
        assert node["IamInstanceProfile"]["Name"], f"without it, {name} would need keys"
    for kind in ("head", "worker"):
        commands = config[f"{kind}_setup_commands"]
        assert commands[:-1] == CLUSTER["setup_commands"], "no nightly build of Ray's defaults"
        assert commands[-1].startswith(INSTALL)
        assert ("download.pytorch.org/whl/cpu" in commands[-1]) == (kind == "head")
        assert "--dashboard-host" not in " ".join(config[f"{kind}_start_ray_commands"])
    assert f"{HOME}/.ray/auth_token" in config["file_mounts"]


def test_kuberay_knows_every_field() -> None:
    """By what its CRD (Apache License 2.0) says of the fields that the file uses."""
    schema = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
    jsonschema.validate(KUBERAY, schema["rayjob"])


def test_all_have_the_tested_ray() -> None:
    version = KUBERAY["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311" in (DEPLOY / "Dockerfile").read_text()
    assert f"ray=={version}\n" in (ROOT / ".constraints.txt").read_text()


def test_the_dashboard_shows_each_metric_that_is_exported() -> None:
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    shown = " ".join(target["expr"] for target in targets)
    assert set(re.findall(r"ray_mnistsum_\w+", shown)) == exported
