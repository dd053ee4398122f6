"""Record what the pages show: run their commands, keep the output, and write it into the pages.

python tests/record.py commands       the commands of README and the guide, in a fresh folder
python tests/record.py accuracies MNIST    three seeds of two recipes; MNIST: folder with its files
python tests/record.py speeds         three rounds of jobs/benchmark.py
python tests/record.py write          docs/record.json into the pages; the others do so at their end

A page has blocks between `<!-- record: NAME -->` and `<!-- end -->`. One that shows the output of
commands stands below them. Tests compare the pages with docs/record.json, and commands with it.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).parents[1]
RECORD: Final = ROOT / "docs" / "record.json"
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK: Final = re.compile(r"(<!-- record: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_SHELL: Final = re.compile(r"```bash\n(.*?)```", re.DOTALL)
_INSTALLS: Final = re.compile(
    r"^(?:git clone|python3 -m venv|export) .*\n|^pip install .*?(?:&& |\n)", re.MULTILINE
)
_SHOWN: Final = re.compile(r"\d\d:\d\d:\d\d |digit: |using |error: |the same bits|\d[\d,]* ")
_LEFT_OUT: Final = {
    "killed": r"started Ray|run killed|training with|using|beginning|epoch|finishing"
    r"|report:|score with it",
    "score": r"started Ray|predictions:",
    "first": r"using|started Ray|run first|training with|beginning|finishing|report:|score with it",
    "shapes": r"using|started Ray|run shapes|no .* files|training with|beginning|epoch [2-9]:"
    r"|finishing|report:|score with it",
    "out": r"started Ray|predictions:",
}
"""Lines that a block shows as `...`."""
_OF_SLOW_MACHINES: Final = re.compile(r"\w: [\d,]+ of [\d,]+\b|no word from")
"""Lines about work that takes long: rows done so far, and what is waited for."""

RECIPES: Final = ("quick", "short")
SEEDS: Final = (0, 1, 2)
ROUNDS: Final = 3
BENCHMARKS: Final = {"train": 8_192, "score": 50_000}
"""Rows of each of the benchmarks."""


def machine() -> dict[str, Any]:
    """Return what accuracies depend on besides the seed, and where and when they were measured."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "date": date.today().isoformat(),
        "cores": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
    }


def is_like(recorded: dict[str, Any]) -> bool:
    """Return whether this machine gives the accuracies of the recorded one, digit by digit."""
    here = machine()
    return all(here[key] == recorded[key] for key in ("cores", "cpu", "torch", "ray"))


def shell_block_of(page: Path, name: str) -> str:
    """Return the commands between the block before and this one, without those that install."""
    before = page.read_text().partition(f"<!-- record: {name} -->")[0]
    return _INSTALLS.sub("", "".join(_SHELL.findall(before.rpartition("<!-- end -->")[2])))


def run_shell(commands: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """Run commands in a folder; return the lines of their output."""
    for name in ("jobs", "docs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stdout}")
    said = done.stdout
    for place in (str(folder), str(ROOT)):
        said = said.replace(place, "/home/you/mnistsum_ray")
    return said.splitlines()


def shown_of(name: str, lines: Sequence[str]) -> list[str]:
    """Return the lines of the output of a block's commands that its page shows."""
    left_out = _LEFT_OUT.get(name, "^$")
    shown: list[str] = []
    for line in filter(_SHOWN.match, lines):
        if _OF_SLOW_MACHINES.search(line):
            continue
        if not re.search(left_out, line):
            shown.append(line)
        elif shown[-1:] != ["..."]:
            shown.append("...")
    return shown


def stable(line: str, *, is_same_machine: bool) -> str:
    """Return a line without what differs from run to run and, maybe, from machine to machine."""
    line = re.sub(r"^[\d:]{8} ", "", line)
    line = re.sub(r"[\d,]+ rows/s", "rows/s", line)
    if not is_same_machine:
        line = re.sub(r"\d+\.\d+|bf16|fp32|(?<=of )\d+ threads?|\d+ CPU workers?", "", line)
    return line


# Each of these makes the text of the blocks of this name.


def show_lines(name: str, record: dict[str, Any]) -> str:
    return "\n".join(["```text", *record["blocks"][name]["lines"], "```"])


def show_accuracies(record: dict[str, Any]) -> str:
    """Return mean and standard deviation over the seeds, as a table."""
    lines = [
        "| command | epochs | digit, % | sum, % | minutes |",
        "|---|---|---|---|---|",
        "| the original's published log | 5 | 99.46 | 99.27 | not published |",
    ]
    for recipe in RECIPES:
        runs = [run for run in record["accuracies"]["runs"] if run["recipe"] == recipe]
        cells = [f"`python jobs/train.py --data mnist --recipe {recipe} --seed 0`"]
        cells.append(str(runs[0]["epochs"]))
        for name in ("digit_accuracy", "sum_accuracy"):
            values = [100 * run[name] for run in runs]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        seconds = statistics.median(run["seconds"] for run in runs)
        cells.append(f"{seconds / 60:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_speeds(record: dict[str, Any]) -> str:
    """Return the median of the rounds of each way, as a table."""
    meanings = {
        "original": "the assignment's way: a DataLoader, one row at a time, float32, without Ray",
        "bare": "this network and step on rows in memory, in one process, without Ray",
        "guide": "Ray's guides, with this network and step, and the CPUs and threads they need",
        "tuned": "the same with one more call: `materialize()`, or `repartition()`",
        "project": "this project",
    }
    lines = ["| way | what it is | training, rows/s | scoring, rows/s |", "|---|---|---|---|"]
    for way, meaning in meanings.items():
        cells = [f"{median_rate(record, what, way):,.0f}" for what in BENCHMARKS]
        lines.append(f"| `{way}` | {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def median_rate(record: dict[str, Any], what: str, way: str) -> float:
    """Return rows per second of a way of jobs/benchmark.py."""
    rates: list[float] = [found[way] for found in record["speeds"][what]]
    return statistics.median(rates)


def show_machine(record: dict[str, Any]) -> str:
    """Return where and when each part of the record was measured."""
    commits: list[str] = []
    machines: dict[str, None] = {}  # in their order
    for part, name in (("blocks", "output"), ("accuracies", "accuracies"), ("speeds", "speeds")):
        of_part = record[part]["machine"]
        commits.append(f"{name} at {of_part['commit']}, {of_part['date']}")
        cpu = f"{of_part['cores']} cores, {of_part['cpu']}"
        versions = f"Python {of_part['python']}, PyTorch {of_part['torch']}, Ray {of_part['ray']}"
        machines[f"{cpu}; {versions}"] = None
    return f"Measured: {'; '.join(commits)}. Machine: {' and '.join(machines)}."


def show_results(record: dict[str, Any]) -> str:
    """Return README's table: accuracies beside the original's, speeds, and seconds."""
    *_, original, quick, short = show_accuracies(record).splitlines()
    lines = ["| what | result on two CPU cores |", "|---|---|"]
    for what, line in (
        ("the original, 5 epochs", original),
        ("`--recipe quick`, 1 epoch", quick),
        ("`--recipe short`, 5 epochs", short),
    ):
        _, _, _, digit, total, minutes, _ = (cell.strip() for cell in line.split("|"))
        time_taken = "" if "not" in minutes else f", {minutes} minutes"
        lines.append(f"| {what} | digit {digit} %, sum {total} %{time_taken} |")
    for what, meaning in (("train", "training"), ("score", "scoring")):
        rates = {way: median_rate(record, what, way) for way in ("project", "guide", "bare")}
        others = f"Ray's guide {rates['guide']:,.0f}; a loop without Ray {rates['bare']:,.0f}"
        lines.append(f"| {meaning}, rows/s | {rates['project']:,.0f}; {others} |")
    seconds = record["blocks"]["train"]["seconds"]
    lines.append(f"| the first command above, seconds | {seconds:.0f} |")
    return "\n".join(lines)


TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "accuracies": show_accuracies,
    "speeds": show_speeds,
    "machine": show_machine,
    "results": show_results,
}


def render(page: str, record: dict[str, Any]) -> str:
    """Return a page whose blocks show the record."""

    def fill(found: re.Match[str]) -> str:
        start, name, _, end = found.groups()
        text = TABLES[name](record) if name in TABLES else show_lines(name, record)
        return f"{start}{text}\n{end}"

    return BLOCK.sub(fill, page)


def read_record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record


def save(**parts: Any) -> None:
    """Replace parts of the record, and write it into the pages."""
    record = read_record() | parts
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write()


def record_commands() -> None:
    blocks: dict[str, Any] = {"machine": machine()}
    with TemporaryDirectory() as folder:
        for page in (ROOT / "README.md", ROOT / "docs" / "task.md"):
            for _, name, *_ in BLOCK.findall(page.read_text()):
                if name in TABLES:
                    continue
                started = time.monotonic()
                lines = run_shell(shell_block_of(page, name), Path(folder), environment())
                lines = shown_of(name, lines)
                seconds = round(time.monotonic() - started, 1)
                blocks[name] = {"seconds": seconds, "lines": lines}
                print(name, seconds, *lines, sep="\n", flush=True)
    save(blocks=blocks)


def environment() -> dict[str, str]:
    """Return the environment of commands: this Python, and a cluster of their own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RAY_ADDRESS": "local", "NO_COLOR": "1"}


def run_json(folder: Path, *words: str) -> dict[str, Any]:
    """Run a file of jobs/ in a folder; return its JSON line."""
    job, *flags = words
    command = [sys.executable, str(ROOT / "jobs" / job), *flags]
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def record_accuracies(mnist: str) -> None:
    runs = []
    where = machine()
    with TemporaryDirectory() as folder:
        for recipe in RECIPES:
            for seed in SEEDS:
                flags = ["--data", mnist, "--recipe", recipe, "--seed", str(seed)]
                line = run_json(Path(folder), "train.py", *flags, "--name", f"{recipe}-{seed}")
                history = Path(line["run"], "history.jsonl").read_text().splitlines()
                run = {"recipe": recipe, "seed": seed, "epochs": len(history)}
                run |= {name: line["test"][name] for name in ("digit_accuracy", "sum_accuracy")}
                runs.append(run | {"seconds": line["seconds"]})
                print(runs[-1], flush=True)
                shutil.rmtree(line["run"])
    save(accuracies={"machine": where, "runs": runs})


def record_speeds() -> None:
    speeds: dict[str, Any] = {"machine": machine()} | {what: [] for what in BENCHMARKS}
    with TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for what, rows in BENCHMARKS.items():
                line = run_json(Path(folder), "benchmark.py", what, "--rows", str(rows))
                speeds[what].append(line["rows_per_second"])
                print(what, line["rows_per_second"], flush=True)
    save(speeds=speeds)


def write() -> None:
    record = read_record()
    for page in PAGES:
        page.write_text(render(page.read_text(), record))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    modes: dict[str, Callable[..., None]] = {
        "commands": record_commands,
        "accuracies": record_accuracies,
        "speeds": record_speeds,
        "write": write,
    }
    modes[what](*arguments)
