"""What the README and cluster.yaml tell people to run is what the code takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mnistsum_ray.config import TrainConfig, parse

ROOT = Path(__file__).parents[1]
TEXTS = [(ROOT / "README.md").read_text(), (ROOT / "jobs" / "train.py").read_text(), (ROOT / "cluster.yaml").read_text()]
COMMANDS = sorted({match for text in TEXTS for match in re.findall(r"python jobs/train\.py[^\n`#]*", text.replace("\\\n#", " "))})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_parses(command: str) -> None:
    flags = shlex.split(re.split(r"\s{3,}", command)[0])[2:]
    if "--help" not in flags:
        parse(TrainConfig, flags, "")


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 6


def test_every_relative_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXTS[0])
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_cluster_yaml_is_one() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(TEXTS[2]))
    validate_config(config)
    assert "pip install" in " ".join(config["setup_commands"])
    requirements = re.search(r"dependencies = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert requirements
    for requirement in re.findall(r'"([^"]+)"', requirements[1]):
        if not requirement.startswith("numpy"):  # comes with all the others
            assert f"'{requirement}'" in " ".join(config["setup_commands"]), requirement
