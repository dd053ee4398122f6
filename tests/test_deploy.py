"""The files that put the project on a cluster fit each other and the project. No cloud, Docker or Kubernetes is asked."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from mnistsum_ray.reporting.metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / ".deploy"
README = (ROOT / "README.md").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HOME = "/home/ubuntu"
INSTALL = "cd ~/mnistsum_ray && ~/venv/bin/pip install -q -c .constraints.txt"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KUBERAY: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())

COPIED: dict[str, str] = {
    local: remote.removeprefix(f"{HOME}/mnistsum_ray/")
    for remote, local in CLUSTER["file_mounts"].items()
    if remote.startswith(f"{HOME}/mnistsum_ray/")
}
"""The files of the project that cluster.yaml copies to a node, and their names there."""


def test_every_package_that_a_node_gets_has_a_tested_version() -> None:
    """What the installed project and its extra cloud need, and what that needs, on this Python and system."""
    lines = (ROOT / ".constraints.txt").read_text().splitlines()[1:]
    tested = {name: Version(text) for name, text in (line.split("==") for line in lines)}
    needed, seen = [Requirement("mnistsum_ray[cloud]")], set()
    while needed:
        requirement = needed.pop()
        name = canonicalize_name(requirement.name)
        if name != "mnistsum-ray":
            assert tested[name] in requirement.specifier, requirement
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                found = [Requirement(text) for text in requires(requirement.name) or ()]
                needed += [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]


def test_cluster_yaml_is_one_and_opens_nothing_to_the_world() -> None:
    config = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], f"Ray would make {name} a group whose SSH is open to the world"
        assert node["IamInstanceProfile"]["Name"], f"without it, {name} would need keys"
    for kind in ("head", "worker"):
        commands = config[f"{kind}_setup_commands"]
        assert commands[:-1] == CLUSTER["setup_commands"], "nothing of Ray's defaults such as a nightly build"
        assert commands[-1].startswith(INSTALL)
        assert ("download.pytorch.org/whl/cpu" in commands[-1]) == (kind == "head")
        assert "--dashboard-host" not in " ".join(config[f"{kind}_start_ray_commands"])
    assert f"{HOME}/.ray/auth_token" in config["file_mounts"]


@pytest.mark.slow
def test_a_node_installs_the_project_as_it_lies_here(tmp_path: Path) -> None:
    """From nothing but what is copied to a node, or into the image; what it needs beside that follows from pyproject.toml."""
    for local, remote in COPIED.items():
        if (ROOT / local).is_dir():
            shutil.copytree(ROOT / local, tmp_path / remote, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / local, tmp_path / remote)
    assert (tmp_path / ".constraints.txt").exists()
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(tmp_path)]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    files = [path for path in (ROOT / "mnistsum_ray").rglob("*") if path.suffix in (".py", ".parquet", ".j2", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in files} <= held


def test_kuberay_knows_every_field() -> None:
    """By what its CRD (Apache License 2.0) says of the fields that the file uses."""
    schema = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
    jsonschema.validate(KUBERAY, schema["rayjob"])


def test_all_pods_of_kuberay_have_the_image_of_the_tested_ray() -> None:
    job = KUBERAY["spec"]
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    owner = PROJECT["urls"]["Repository"].split("/")[-2]  # a placeholder, to be replaced in all places at once
    assert images == {f"{owner}/mnistsum_ray:TAG"}
    assert "runtimeEnvYAML" not in job, "pip on each node would choose versions of its own"
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"FROM rayproject/ray:{cluster['rayVersion']}-py311" in (DEPLOY / "Dockerfile").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / ".constraints.txt").read_text()
    assert "--resume auto" in job["entrypoint"], "another attempt goes on"


def test_the_dashboard_shows_each_metric_that_is_exported() -> None:
    exported = {*(f"ray_{name}_total" for name in COUNTERS), *(f"ray_{name}" for name in GAUGES)}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_mnistsum_\w+", shown)) == exported
