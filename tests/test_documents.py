"""What the README and cluster.yaml tell people to run is what the code takes."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ExportModelConfig, ExportPairsConfig, JobConfig, PredictConfig, ScoreConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README, CLUSTER = (ROOT / "README.md").read_text(), (ROOT / "cluster.yaml").read_text()
CONFIGS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "export_pairs": ExportPairsConfig,
    "export_model": ExportModelConfig,
}
TEXTS = [
    README,
    CLUSTER,
    *(
        (ROOT / ".deploy" / name).read_text().replace('"\n', "\n")
        for name in ("rayjob.yaml", "raycronjob.yaml", "airflow_dag.py")
    ),
    (ROOT / "mnistsum_ray" / "cli.py").read_text(),
    *((ROOT / "jobs" / f"{job}.py").read_text() for job in CONFIGS),
]
SHOWN = re.compile(r"(?:python (?=jobs/)|mnistsum (?=(?:train|score|export-[a-z]+) --|predict ))([a-z_/-]+(?:\.py)?[^\n`#]*)")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS: list[str] = PROJECT["dependencies"]
COMMANDS = sorted({command for text in TEXTS for command in SHOWN.findall(re.sub(r"\\\n#?", " ", text))})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_parses(command: str) -> None:
    job, *flags = shlex.split(re.split(r"\s{3,}|&&|\|\||>", command)[0])
    assert not job.endswith(".py") or (ROOT / job).exists()
    config = (CONFIGS | {"predict": PredictConfig}).get(Path(job).stem.replace("-", "_"))
    if config and not {"--help", "--print-config"} & {*flags}:
        parse(config, flags, "")


def test_every_job_is_shown() -> None:
    shown = " ".join(SHOWN.findall(README))
    assert all(f"jobs/{job}.py" in shown for job in CONFIGS)


@pytest.mark.parametrize(
    "document",
    [path.relative_to(ROOT) for path in (ROOT / "README.md", *ROOT.glob(".readme/*.md"), *ROOT.glob("[mt]*/**/README.md"))],
    ids=str,
)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
        assert (ROOT / document.parent / link).exists(), link


def test_the_readme_is_short_and_can_be_pasted() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        assert "#" not in block, "zsh on a Mac takes a comment for arguments"


def test_the_tested_versions_are_those_that_the_project_allows() -> None:
    lines = (ROOT / ".constraints.txt").read_text().splitlines()[1:]
    versions = {name: Version(number) for name, number in (line.split("==") for line in lines)}
    for requirement in map(Requirement, REQUIREMENTS):
        assert versions[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement


def test_users_get_the_pyarrow_that_is_tested() -> None:
    """The extra mlflow, which the tests install, has an upper bound for pyarrow; so without it there is the same one."""
    ours = next(one for one in map(Requirement, REQUIREMENTS) if one.name == "pyarrow")
    of_mlflow = next(one for one in map(Requirement, requires("mlflow") or []) if one.name == "pyarrow" and not one.marker)
    newest = Version(version("pyarrow")).major
    assert f"{newest}.99" in ours.specifier
    assert f"{newest}.99" in of_mlflow.specifier
    assert f"{newest + 1}.0" not in ours.specifier


def test_the_owner_of_the_repository_is_the_same_everywhere() -> None:
    """A placeholder, to be replaced in all places at once."""
    address = PROJECT["urls"]["Repository"]
    assert f"{address}/archive/" in (ROOT / ".deploy" / "rayjob.yaml").read_text()


def test_what_the_readme_says_of_errors_is_what_the_program_says() -> None:
    """Each quotation, up to where something is filled in, stands in the code."""
    table = (ROOT / ".readme" / "messages.md").read_text()
    quoted = [text for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for text in re.findall("`(.*?)`", row)]
    code = "".join(path.read_text() for path in (ROOT / "mnistsum_ray").rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # a text that goes on in the next line
    of_ray = {"Unauthorized", "ray job submit"}
    assert of_ray < set(quoted)
    for text in set(quoted) - of_ray:
        assert text in code, text


def test_cluster_yaml_is_one_and_opens_nothing_to_the_world() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CLUSTER))
    validate_config(config)
    assert "Ubuntu 24.04" in CLUSTER, "22.04 has Python 3.10"
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], f"Ray would make {name} a group whose SSH is open to the world"
        assert node["IamInstanceProfile"]["Name"], f"without it, {name} would need keys"
    assert "nightly" not in " ".join(config["setup_commands"])
    assert "--dashboard-host" not in " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]


def test_cluster_yaml_installs_the_project_as_it_lies_here(tmp_path: Path) -> None:
    """From nothing but what is copied to a node; what it needs beside that follows from pyproject.toml."""
    config = yaml.safe_load(CLUSTER)
    home = "/home/ubuntu/mnistsum_ray"
    for remote, local in config["file_mounts"].items():
        if remote.startswith(f"{home}/"):
            source, target = ROOT / local, tmp_path / remote.removeprefix(f"{home}/")
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    assert f"pip install -q '{home}[cloud]'" in " ".join(config["setup_commands"])
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(tmp_path)]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    files = [path for path in (ROOT / "mnistsum_ray").rglob("*") if path.suffix in (".py", ".parquet", ".j2", ".css", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in files} <= held


def test_the_kuberay_manifest_asks_for_what_the_project_needs() -> None:
    job = yaml.safe_load((ROOT / ".deploy" / "rayjob.yaml").read_text())
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["pip"] == [f"mnistsum_ray[cloud] @ {environment['working_dir']}"], (
        "the project, not a copy of what it needs"
    )
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    ray = next(one for one in REQUIREMENTS if one.startswith("ray["))
    assert job["spec"]["rayClusterSpec"]["rayVersion"].startswith(ray.split(">=")[1].split(",")[0])
