"""The installed package: what type checkers see of it, and what its wheel holds."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import mnistsum_ray
import mnistsum_ray.mnist
from tests.jobs import ROOT


def run(folder: Path, *words: object, path: str = "") -> str:
    """What a command of this Python prints, in a folder outside the repository."""
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_what_is_exported_is_there_and_documents_and_examples_need_no_more() -> None:
    assert {*mnistsum_ray.__all__} <= {*dir(mnistsum_ray)}
    assert "Any" not in dir(mnistsum_ray)
    for package in (mnistsum_ray, mnistsum_ray.mnist):
        for name in package.__all__:
            assert getattr(getattr(package, name), "__name__", name) == name
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for file in [*(ROOT / "jobs" / "examples").glob("*.py"), *documents]:
        imports = re.findall(r"^from (mnistsum_ray\S*) import (.+)", file.read_text(), re.MULTILINE)
        for module, names in imports:
            exported = {"mnistsum_ray": mnistsum_ray, "mnistsum_ray.mnist": mnistsum_ray.mnist}
            assert {*names.split(", ")} <= {*exported[module].__all__}, file


OF_MNIST = re.compile(
    r"\bdigit|\b28\b(?<!\*\*28)|\b784\b|(?-i:HEADS|NUMBERS)|pred_sum|sum_acc|mnist(?!sum)|two.head",
    re.IGNORECASE,
)


def test_the_machine_knows_no_word_of_the_built_in_task() -> None:
    """But the place of that task, and what the command line and the package offer of it."""
    package = ROOT / "mnistsum_ray"
    words = []
    for file in [*package.rglob("*.py"), *package.rglob("*.j2")]:
        place = file.relative_to(package)
        if place.parts[0] not in ("mnist", "cli.py", "__init__.py"):
            text = file.read_text().replace("mnistsum_ray.mnist.task:MnistSum", "")
            words += [f"{place}: {found}" for found in OF_MNIST.findall(text)]
    assert words == []


@pytest.mark.nightly  # mypy reads all of PyTorch
def test_programs_of_users_are_checked_strictly(tmp_path: Path) -> None:
    """Those of the pages, and the examples."""
    for name in ("python", "task", "examples"):
        page = (ROOT / "docs" / f"{name}.md").read_text()
        program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
        (tmp_path / f"page_{name}.py").write_text(program)
    for example in (ROOT / "jobs" / "examples").glob("*.py"):
        shutil.copy(example, tmp_path)
    said = run(tmp_path, "mypy", "--strict", *sorted(tmp_path.glob("*.py")))
    assert re.search(r"^(Success|Found)", said, re.MULTILINE), said
    assert "mnistsum_ray" not in said


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sdist and the wheel, built as the release workflow builds them."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in (".ci", ".github", "docs", "jobs", "mnistsum_ray", "tests"):
        shutil.copytree(ROOT / name, source / name)
    for file in ROOT.iterdir():  # among them .gitignore, which says what is no part of the sdist
        if file.is_file():
            shutil.copy(file, source)
    address = "https://github.com/somebody/mnistsum_ray"
    script = [sys.executable, ".ci/prepare_release.py", address]
    subprocess.run(script, cwd=source, check=True)
    said = run(source, "build", "--outdir", folder)
    assert "Successfully built" in said, said
    return folder


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(packages: Path, tmp_path: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    run(tmp_path, "pip", "install", "--no-deps", "--target", "installed", wheel)
    where = str(tmp_path / "installed")
    program = """
import mnistsum_ray.cli, mnistsum_ray.reporting.report
words = "export-pairs --data sample --rows 20 --files 2 --output pairs"
print(mnistsum_ray.reporting.report.__file__, mnistsum_ray.cli.main(words.split()))
"""
    (tmp_path / "program.py").write_text(program)
    assert f"{where}/mnistsum_ray/reporting/report.py 0" in run(tmp_path, "program", path=where)
    assert len(list(tmp_path.glob("pairs/*.parquet"))) == 2


@pytest.mark.slow
def test_pypi_shows_no_link_that_leads_nowhere(packages: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith("/METADATA")]
        fields = email.message_from_bytes(files.read(name))
    page = fields.get_payload()
    assert isinstance(page, str)
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)"\s]+)', page)
    assert len(links) > 20
    assert [link for link in links if not re.match(r"https?:|#", link)] == []
    urls = dict(url.split(", ") for url in fields.get_all("Project-URL") or [])
    assert {*urls} == {"Documentation", "Repository", "Issues", "Changelog"}
    assert "OWNER" not in page + str(urls)


@pytest.mark.slow
def test_the_tests_run_from_the_sdist(packages: Path, tmp_path: Path) -> None:
    (sdist,) = packages.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("tests/conftest.py", "docs/task.md", "jobs/train.py", "constraints.txt"):
        assert (source / name).exists(), name
    tests = ["tests/test_documents.py", "tests/data", "tests/test_config.py"]
    said = run(source, "pytest", "-q", "-p", "no:cacheprovider", *tests, path=str(source))
    assert re.search(r"\d+ passed", said.splitlines()[-1]), said
    assert "failed" not in said.splitlines()[-1], said


def test_the_version_is_the_same_wherever_a_machine_reads_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mnistsum_ray.__version__
    assert f"## {mnistsum_ray.__version__}" in (ROOT / "CHANGELOG.md").read_text()
