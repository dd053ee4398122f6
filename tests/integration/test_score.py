"""Scoring whole folders: the same answer everywhere, exactly once, and never put together what does not belong together."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.decoding import one_chunk, pixels_view
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import quantization
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.storage.location import locate
from tests.conftest import TEMPERATURES, answers, check_answers, with_footer, write_model
from tests.integration.conftest import Scored, score_here

ROWS, FILES = 1500, 5

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=FILES), print)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, exported: Path) -> Scored:
    return score_here(model, exported.parent / "out", exported)


@pytest.fixture
def pairs(tmp_path: Path, exported: Path) -> Path:
    """Input of its own for a test."""
    return Path(shutil.copytree(exported, tmp_path / "in"))


@pytest.fixture
def output(tmp_path: Path, finished: Scored) -> Path:
    """The output of a finished run over `pairs`, which have moved since."""
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def table_of(scored: Scored) -> pa.Table:
    """All predictions, in the order of the files' names and rows."""
    paths = sorted(
        path for path in scored.output.rglob("*.parquet") if not path.relative_to(scored.output).parts[0].startswith("_")
    )
    return pa.concat_tables([pq.ParquetFile(path).read() for path in paths])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("_")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"label_column": "digit"},
        {"num_workers": 1, "max_rows_per_file": 77, "batch_size": 1000},
        {"max_rows_per_file": 100, "batch_size": 3},
        {"num_readers": 1, "max_rows_per_file": 250},  # as beside a GPU: tasks read and write for the actors
    ],
    ids=str,
)
def test_the_same_answer_whatever_the_workers_units_and_batches(
    model: Path, pairs: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    scored = score_here(model, tmp_path / "out", pairs, **settings)
    source = pa.concat_tables([pq.read_table(path) for path in sorted(pairs.iterdir())])
    table = table_of(scored)
    expected = answers(model, pixels_view(one_chunk(source["image"])), source["number"].to_numpy().astype(np.int64))
    assert table["row_id"].to_pylist() == source["row_id"].to_pylist()
    check_answers(table, expected)
    assert scored.line["scored_rows"] == scored.line["input_rows"] == ROWS
    assert scored.complete
    largest = settings.get("max_rows_per_file", 8192)
    assert max(pq.read_metadata(path).num_rows for path in scored.output.glob("part*.parquet")) <= largest
    if "label_column" in settings:
        digits = source["digit"].to_numpy()
        assert scored.line["digit_accuracy"] == pytest.approx(np.mean(expected["pred_digit"] == digits))
        sums = digits + source["number"].to_numpy()
        assert scored.line["sum_accuracy"] == pytest.approx(np.mean(expected["pred_sum"] == sums))
        assert "accuracy over 1,500 labelled rows" in scored.said
        assert scored.manifest()["consistent_rows"] == int(expected["consistent"].sum())
        check_probabilities(scored, table, digits, sums)


def check_probabilities(scored: Scored, table: pa.Table, digits: np.ndarray, sums: np.ndarray) -> None:
    """What the manifest says of the probabilities follows from the columns of the output."""
    told = scored.manifest()["probabilities"]
    for head, truth in (("digit", digits), ("sum", sums)):
        probability, right = table[f"{head}_prob"].to_numpy(), table[f"pred_{head}"].to_numpy() == truth
        bins = np.minimum((probability * 15).astype(int), 14)
        gaps = [abs(probability[bins == one].sum() - right[bins == one].sum()) for one in range(15)]
        assert told[head]["ece"] == pytest.approx(sum(gaps) / ROWS, abs=1e-5)
        assert told[head]["nll"] > -np.log(probability[right]).sum() / ROWS, "and what the wrong ones add"
        assert 0 < told[head]["brier"] < 2
        assert f"  {head} probabilities: negative log-likelihood {told[head]['nll']:.4f} nats" in scored.said
    assert (scored.output / "_reliability.png").exists()


@pytest.mark.skipif(not quantization.is_available(), reason="this PyTorch has no integer convolutions on this CPU")
def test_integers_score_as_calibrated(model: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--precision int8: the model holds no calibration for it"):
        score_here(model, tmp_path / "out", exported, precision="int8")

    source = pa.concat_tables([pq.read_table(path) for path in sorted(exported.iterdir())])
    images = torch.tensor(pixels_view(one_chunk(source["image"])))
    numbers = torch.tensor(source["number"].to_numpy().astype(np.int64))
    network, card = load_model(locate(str(model), "--model"))
    calibrated = quantization.quantize(network, images, images[:100], torch.tensor(source["digit"].to_pylist()[:100])).as_json()
    mine = Path(shutil.copytree(model, tmp_path / "model"))
    (mine / "model.json").write_text(json.dumps(card | {"int8": calibrated}))
    scored = score_here(mine, tmp_path / "out", exported, precision="int8")
    digit_scores, sum_scores = quantization.int8_forward(network, tuple(calibrated["maxima"]))(images, numbers)
    table = table_of(scored)
    assert table["pred_digit"].to_pylist() == digit_scores.argmax(1).tolist()
    assert table["pred_sum"].to_pylist() == sum_scores.argmax(1).tolist()
    digit_prob = (digit_scores / TEMPERATURES.digit).softmax(1).max(1).values
    assert np.allclose(table["digit_prob"].to_numpy(), digit_prob, atol=1e-5)
    assert (scored.manifest()["precision"], scored.manifest()["int8"]) == ("int8", calibrated)
    assert score_here(mine, tmp_path / "out", exported, precision="int8").line["resumed_rows"] == ROWS

    score_here(mine, tmp_path / "fp32", exported)
    with pytest.raises(RequestError, match="was begun with --precision fp32, which is now int8"):
        score_here(mine, tmp_path / "fp32", exported, precision="int8")

    calibrated["maxima"][2] *= 2
    (mine / "model.json").write_text(json.dumps(card | {"int8": calibrated}))
    with pytest.raises(RequestError, match="holds predictions of the same model quantized otherwise"):
        score_here(mine, tmp_path / "out", exported, precision="int8")


def test_a_row_without_a_label_is_scored_and_not_counted(model: Path, pairs: Path, tmp_path: Path) -> None:
    path = pairs / "part-00000.parquet"
    table = pq.read_table(path)
    half = pa.array([None if row % 2 else 3 for row in range(table.num_rows)], pa.int32())
    pq.write_table(table.append_column("truth", half), path)
    scored = score_here(model, tmp_path / "out", path, label_column="truth")
    assert scored.manifest()["labelled_rows"] == 150
    assert scored.line["scored_rows"] == table.num_rows


def test_new_files_are_picked_up_and_finished_ones_left_alone(model: Path, pairs: Path, output: Path, tmp_path: Path) -> None:
    before = snapshot(output)
    shutil.copy(pairs / "part-00003.parquet", pairs / "late.parquet")
    second = score_here(model, output, pairs)
    assert second.line["resumed_rows"] == ROWS
    assert second.line["input_rows"] == second.line["scored_rows"] == ROWS + 300
    after = snapshot(output)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"late.parquet"}
    (pairs / "late.parquet").unlink()  # its predictions stay, and are said to
    third = score_here(model, output, pairs)
    assert third.line["resumed_rows"] == third.line["input_rows"] == ROWS
    assert "left as they are: 1 output files of input that is not there now" in third.said
    assert snapshot(output) == after


def change_a_file(pairs: Path) -> dict[str, Any]:
    path = pairs / "part-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    return {}


def touch_a_file(pairs: Path) -> dict[str, Any]:
    path = pairs / "part-00001.parquet"
    table = pq.read_table(path)
    shuffled = table.set_column(2, "number", pa.array((table["number"].to_numpy() + 1) % 10, pa.int8()))
    pq.write_table(shuffled, path)
    return {}


def damage_a_file(pairs: Path) -> dict[str, Any]:
    path = pairs / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    return {}


def cut_otherwise(pairs: Path) -> dict[str, Any]:
    return {"max_rows_per_file": 200}


def other_columns(pairs: Path) -> dict[str, Any]:
    return {"number_column": "digit"}


def other_precision(pairs: Path) -> dict[str, Any]:
    return {"precision": "bf16"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_a_file, "part-00001.parquet has changed since it was scored; --overwrite starts afresh"),
        (touch_a_file, "part-00001.parquet has changed since it was scored; --overwrite starts afresh"),
        (damage_a_file, "holds predictions of part-00001.parquet, which now cannot be used (is not Parquet, or was cut off"),
        (cut_otherwise, "another --max-rows-per-file"),
        (other_columns, "was begun with --number-column number, which is now digit"),
        (other_precision, "was begun with --precision fp32, which is now bf16"),
    ],
)
def test_what_does_not_belong_together_is_not_put_together(
    model: Path, pairs: Path, output: Path, change: Callable[[Path], dict[str, Any]], said: str
) -> None:
    before = snapshot(output)
    settings = change(pairs)
    with pytest.raises(RequestError) as refused:
        score_here(model, output, pairs, **settings)
    assert said in str(refused.value)
    assert snapshot(output) == before
    assert (output / "_manifest.json").exists()


def test_another_model_is_refused_and_overwrite_starts_afresh(model: Path, pairs: Path, output: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", 1)
    with pytest.raises(RequestError, match="holds predictions of another model"):
        score_here(other, output, pairs)
    (pairs / "part-00004.parquet").unlink()

    gone: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            gone.extend(name for name in ("_manifest.json", "part-00000.parquet") if not (output / name).exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    second = score_here(other, output, pairs, overwrite=True)
    ended.set()
    watcher.join()
    assert not gone
    assert second.line["scored_rows"] == ROWS - 300
    assert sorted(path.name for path in second.output.iterdir()) == [
        "_files.parquet",
        "_manifest.json",
        "_probabilities.png",
        *(f"part-0000{index}.parquet" for index in range(4)),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]
    source = pq.read_table(pairs / "part-00002.parquet")
    expected = answers(other, pixels_view(one_chunk(source["image"])), source["number"].to_numpy().astype(np.int64))
    check_answers(second.table("part-00002.parquet"), expected)


def test_overwriting_does_not_cost_what_cannot_be_scored_again(model: Path, pairs: Path, output: Path) -> None:
    before = snapshot(output)
    damage_a_file(pairs)
    with pytest.raises(RunError, match=r"--overwrite: nothing was replaced: part-00001\.parquet cannot be used"):
        score_here(model, output, pairs, overwrite=True)
    with pytest.raises(RequestError, match="which now cannot be used"):
        score_here(model, output, pairs, image_column="digit")
    with pytest.raises(RunError, match="--overwrite: nothing was replaced"):
        score_here(model, output, pairs, image_column="digit", overwrite=True)
    assert snapshot(output) == before


def test_overwriting_knows_a_file_that_has_another_name_below_another_root(model: Path, pairs: Path, tmp_path: Path) -> None:
    score_here(model, tmp_path / "out", pairs)
    before = snapshot(tmp_path / "out")
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(pairs / "part-00002.parquet", more)
    damage_a_file(pairs)
    with pytest.raises(RunError, match=r"nothing was replaced: in/part-00001\.parquet cannot be used"):
        score_here(model, tmp_path / "out", pairs, more, overwrite=True)
    assert snapshot(tmp_path / "out") == before


def test_strict_publishes_all_at_the_end(model: Path, pairs: Path, tmp_path: Path) -> None:
    score_here(model, tmp_path / "out", pairs / "part-0000[01].parquet")
    scored = score_here(model, tmp_path / "out", pairs, strict=True)
    assert scored.complete
    assert (scored.line["resumed_rows"], scored.line["scored_rows"]) == (600, ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert len(list(scored.output.glob("part-*.parquet"))) == FILES


def test_somebody_elses_folder_is_left_alone(model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(pairs / "part-00000.parquet", tmp_path / "out" / "mine.parquet")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match=r"mine\.parquet is not a file of predictions of this program"):
            score_here(model, tmp_path / "out", pairs, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.parquet"]


@pytest.mark.parametrize("mine", ["_rejected/a.parquet", "_rejected/notes.txt", "thesis.partial", "data/table.parquet"])
@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"strict": True}], ids=str)
def test_a_refused_request_touches_nothing(
    model: Path, pairs: Path, tmp_path: Path, mine: str, settings: dict[str, bool]
) -> None:
    (tmp_path / "out" / mine).parent.mkdir(parents=True)
    shutil.copy(pairs / "part-00000.parquet", tmp_path / "out" / mine)
    (tmp_path / "out" / ".hidden").write_text("")
    with pytest.raises(RequestError, match=r"not a file of|cannot be read") as refused:
        score_here(model, tmp_path / "out", pairs, **settings)
    assert mine in str(refused.value)
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        Path(mine),
        Path(".hidden"),
    }


def test_a_planted_link_is_refused_and_what_it_leads_to_stays(model: Path, pairs: Path, output: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "part-00000.parquet").write_text("somebody's")
    (tmp_path / ".out.unpublished").symlink_to(victim)
    for settings in ({"strict": True}, {"overwrite": True}):
        with pytest.raises(RequestError, match="is not a folder of this program, but a link or a file; remove it"):
            score_here(model, output, pairs, **settings)
    assert (victim / "part-00000.parquet").read_text() == "somebody's"


def test_overwriting_keeps_the_folders_mode_and_the_hidden_files_of_others(model: Path, pairs: Path, output: Path) -> None:
    output.chmod(0o770)
    (output / ".gitkeep").write_text("mine")
    scored = score_here(model, output, pairs, overwrite=True)
    assert scored.line["scored_rows"] == ROWS
    assert output.stat().st_mode & 0o777 == 0o770
    assert (output / ".gitkeep").read_text() == "mine"


def test_files_that_others_named_and_footers_that_lie_cost_no_other_file(model: Path, sample: pa.Table, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = sample.take(pa.array(range(0, 5000, 25))).append_column("number", pa.array([1] * 200, pa.int8()))
    for name in ("good", "liar", "x" * 247, "y" * 236, "line\nbreak\x1b[31m"):
        pq.write_table(rows, folder / f"{name}.parquet")
    pq.write_table(pa.concat_tables([rows] * 20), folder / f"{'z' * 247}.parquet")  # has to be split, and has no room for that
    (folder / "good.parquet").rename(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.parquet"))
    with_footer(folder / "liar.parquet", 200, 10**13)
    scored = score_here(model, tmp_path / "out", folder, max_rows_per_file=2000)
    assert scored.line["failed_files"] == 3
    assert (scored.line["input_rows"], scored.line["scored_rows"]) == (600, 600)
    reasons = {name: row["reason"] for name, row in scored.files().items() if row["status"] == "failed"}
    assert set(reasons) == {"liar.parquet", "latin-\\udce9.parquet", f"{'z' * 247}.parquet"}
    assert "has a footer that promises 10,000,000,000,000 rows" in reasons["liar.parquet"]
    assert (tmp_path / "out" / f"{'x' * 247}.parquet").exists()
    assert "cannot be used: latin-\\udce9.parquet: its name is not UTF-8" in scored.said


def test_rows_that_disappear_from_the_output_are_an_error(model: Path, pairs: Path, output: Path) -> None:
    path = output / "part-00002.parquet"
    pq.write_table(pq.ParquetFile(path).read().slice(1), path)  # its metadata still speaks of 300 rows
    said = r"part-00002\.parquet: rows 0 to 299 should be in .* has 299 predictions and 0 rejected rows"
    with pytest.raises(RunError, match=said):
        score_here(model, output, pairs)


def test_many_files_are_planned_on_the_cluster(model: Path, sample: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    small = sample.take(pa.array([5, 2500])).append_column("number", pa.array([1, 2], pa.int8()))
    for index in range(150):
        pq.write_table(small, tmp_path / "in" / "deep" / f"{index:03}.parquet")
    (tmp_path / "in" / "empty.parquet").touch()
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert (scored.line["files"], scored.line["failed_files"], scored.line["scored_rows"]) == (151, 1, 300)
    again = score_here(model, tmp_path / "out", tmp_path / "in")
    assert again.line["resumed_rows"] == 300
    assert len(list((tmp_path / "out" / "deep").iterdir())) == 150
