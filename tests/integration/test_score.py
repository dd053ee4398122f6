"""Scoring folders: every row is predicted as by plain PyTorch, exactly once, and incompatible outputs are never mixed."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.scoring.output import MANIFEST, SUMMARIES
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
from tests.conftest import change_description, check_predictions, plain_predictions, with_footer, write_model
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
    """A copy of the input that the test may change."""
    return Path(shutil.copytree(exported, tmp_path / "in"))


@pytest.fixture
def output(tmp_path: Path, finished: Scored) -> Path:
    """The output of a finished run over `exported`. To a run over `pairs` the input has moved since."""
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def table_of(scored: Scored) -> pa.Table:
    """All predictions, in the order of the file names and rows."""
    paths = sorted((scored.output / "predictions").rglob("*.parquet"))
    return pa.concat_tables([pq.ParquetFile(path).read() for path in paths])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*SUMMARIES, MANIFEST, "_lock")
    }


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])


def expected_of(model: Path, source: pa.Table) -> dict[str, np.ndarray]:
    return plain_predictions(model, pixels_view(one_chunk(source["image"])), source["number"].to_numpy().astype(np.int64))


def test_predictions_do_not_depend_on_workers_parts_and_batches(model: Path, exported: Path, tmp_path: Path) -> None:
    scored = score_here(model, tmp_path / "out", exported, num_workers=1, max_rows_per_file=77, batch_size=20)
    source, table = rows_of(exported), table_of(scored)
    assert table["row_id"].to_pylist() == source["row_id"].to_pylist()
    check_predictions(table, expected_of(model, source))
    assert scored.line["scored_rows"] == scored.line["input_rows"] == ROWS
    assert scored.complete
    assert max(pq.read_metadata(path).num_rows for path in (scored.output / "predictions").glob("part*.parquet")) <= 77


def test_accuracies_and_probabilities_are_those_of_the_rows_with_a_label(model: Path, pairs: Path, tmp_path: Path) -> None:
    path = pairs / "part-00000.parquet"
    table = pq.read_table(path)
    half = [None if row % 2 else digit for row, digit in enumerate(table["digit"].to_pylist())]
    place = table.column_names.index("digit")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(half, table.schema.field(place).type)), path)
    scored = score_here(model, tmp_path / "out", pairs, label_column="digit")
    table = table_of(scored)
    labelled = table.filter(table["digit"].is_valid())
    digits, sums = labelled["digit"].to_numpy(), labelled["digit"].to_numpy() + labelled["number"].to_numpy()
    count = ROWS - 150
    assert (scored.line["scored_rows"], scored.manifest()["labelled_rows"], len(digits)) == (ROWS, count, count)
    assert scored.line["digit_accuracy"] == pytest.approx(np.mean(labelled["pred_digit"].to_numpy() == digits))
    assert scored.line["sum_accuracy"] == pytest.approx(np.mean(labelled["pred_sum"].to_numpy() == sums))
    assert re.search(rf"right: digit [0-9.]+ %, sum [0-9.]+ % \({count:,} labelled rows\)", scored.said)
    assert scored.manifest()["consistent_rows"] == sum(table["consistent"].to_pylist())
    check_probabilities(scored, labelled, digits, sums)


def check_probabilities(scored: Scored, table: pa.Table, digits: np.ndarray, sums: np.ndarray) -> None:
    """The probability metrics of the manifest follow from the columns of the output."""
    metrics = scored.manifest()["probabilities"]
    for head, truth in (("digit", digits), ("sum", sums)):
        probability, right = table[f"{head}_prob"].to_numpy(), table[f"pred_{head}"].to_numpy() == truth
        bins = np.minimum((probability * 15).astype(int), 14)
        gaps = [abs(probability[bins == index].sum() - right[bins == index].sum()) for index in range(15)]
        assert metrics[head]["ece"] == pytest.approx(sum(gaps) / len(truth), abs=1e-5)
        assert metrics[head]["nll"] > -np.log(probability[right]).sum() / len(truth), "the wrong predictions add to it"
        assert 0 < metrics[head]["brier"] < 2
    counted = np.bincount(table["digit"].to_numpy() * 10 + table["pred_digit"].to_numpy(), minlength=100)
    assert np.ravel(scored.manifest()["confusion"]).tolist() == counted.tolist()
    for name in ("reliability.png", "reliability.svg", "confusion.png", "confusion.svg"):
        assert (scored.output / name).exists()


@pytest.mark.skipif(int8.unavailable_reason() is not None, reason="this PyTorch has no integer convolutions on this CPU")
@pytest.mark.slow
def test_int8_scores_with_the_calibration_of_the_model(model: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--precision int8: the model holds no calibration for it"):
        score_here(model, tmp_path / "out", exported, precision="int8")

    source = rows_of(exported)
    images = torch.tensor(pixels_view(one_chunk(source["image"])))
    numbers = torch.tensor(source["number"].to_numpy().astype(np.int64))
    network, _ = load_model(locate(str(model), "--model"))
    calibrated = {"maxima": int8.activation_maxima(network, images)}
    calibrated_model = change_description(Path(shutil.copytree(model, tmp_path / "model")), int8=calibrated)
    scored = score_here(calibrated_model, tmp_path / "out", exported, precision="int8")
    with torch.inference_mode():
        digit_scores, sum_scores = make_forward(network, torch.device("cpu"), "int8", calibrated["maxima"])(images, numbers)
    table = table_of(scored)
    assert table["pred_digit"].to_pylist() == digit_scores.argmax(1).tolist()
    assert table["pred_sum"].to_pylist() == sum_scores.argmax(1).tolist()
    digit_prob = digit_scores.softmax(1).max(1).values
    assert np.allclose(table["digit_prob"].to_numpy(), digit_prob, atol=1e-5)
    assert (scored.manifest()["precision"], scored.manifest()["int8"]) == ("int8", calibrated)
    assert score_here(calibrated_model, tmp_path / "out", exported, precision=None).line["resumed_rows"] == ROWS

    calibrated["maxima"][2] *= 2
    change_description(calibrated_model, int8=calibrated)
    with pytest.raises(RequestError, match="holds predictions of the same model quantized otherwise"):
        score_here(calibrated_model, tmp_path / "out", exported, precision="int8")


def test_a_second_run_scores_new_files_only(model: Path, pairs: Path, output: Path, tmp_path: Path) -> None:
    before = snapshot(output)
    shutil.copy(pairs / "part-00003.parquet", pairs / "late.parquet")
    second = score_here(model, output, pairs)
    assert second.line["resumed_rows"] == ROWS
    assert second.line["input_rows"] == second.line["scored_rows"] == ROWS + 300
    after = snapshot(output)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"predictions/late.parquet"}
    (pairs / "late.parquet").unlink()  # its predictions stay, and a line says so
    third = score_here(model, output, pairs)
    assert third.line["resumed_rows"] == third.line["input_rows"] == ROWS
    assert "left as they are: 1 output files of input that is not there now" in third.said
    assert snapshot(output) == after


def test_an_output_goes_on_in_the_precision_that_it_was_begun_in(model: Path, pairs: Path, output: Path) -> None:
    """Not in that of this hardware. `--overwrite` begins anew."""
    usual = "bf16" if faster_with_bf16(torch.device("cpu")) else "fp32"
    other = "fp32" if usual == "bf16" else "bf16"
    few: dict[str, Any] = {"batch_size": 10}  # a CPU without bfloat16 takes long
    score_here(model, output, pairs, precision=other, overwrite=True, **few)
    for name in ("manifest.json", "predictions/part-00001.parquet"):
        (output / name).unlink()
    again = score_here(model, output, pairs, precision=None, **few)
    assert (again.manifest()["precision"], again.line["resumed_rows"] > 0) == (other, True)
    assert score_here(model, output, pairs, precision=None, overwrite=True, **few).manifest()["precision"] == usual


def change_rows(pairs: Path) -> None:
    path = pairs / "part-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def change_numbers(pairs: Path) -> None:
    path = pairs / "part-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "number", pa.array((table["number"].to_numpy() + 1) % 10, pa.int8())), path)


def damage_a_file(pairs: Path) -> None:
    path = pairs / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (change_rows, {}, "in/part-00001.parquet as part-00001.parquet; choose another folder, or --overwrite scores everything"),
        (change_numbers, {}, "in/part-00001.parquet as part-00001.parquet; choose another folder, or --overwrite scores"),
        (damage_a_file, {}, "holds predictions of part-00001.parquet, which now cannot be used (is not Parquet, or was cut off"),
        (None, {"label_column": "digit"}, "was started with no --label-column, and this run has --label-column digit; give"),
        (None, {"max_rows_per_file": 200}, "another --max-rows-per-file"),
        (
            None,
            {"number_column": "digit"},
            "was started with --number-column number, and this run has --number-column digit; give",
        ),
        (
            None,
            {"precision": "bf16"},
            "was started with --precision fp32, and this run has --precision bf16; give the same again",
        ),
    ],
)
def test_incompatible_outputs_are_refused(
    model: Path, pairs: Path, output: Path, change: Callable[[Path], None] | None, settings: dict[str, Any], message: str
) -> None:
    before = snapshot(output)
    if change:
        change(pairs)
    with pytest.raises(RequestError) as refused:
        score_here(model, output, pairs, **settings)
    assert message in str(refused.value)
    assert snapshot(output) == before
    assert (output / "manifest.json").exists()


def test_another_model_is_refused_and_overwrite_replaces_the_output(
    model: Path, pairs: Path, output: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", 1)
    with pytest.raises(RequestError, match="holds predictions of another model"):
        score_here(other, output, pairs)
    (pairs / "part-00004.parquet").unlink()

    second = score_here(other, output, pairs, overwrite=True)
    assert second.line["scored_rows"] == ROWS - 300
    summaries = ["files.parquet", "manifest.json", "predictions", "probabilities.png", "probabilities.svg", "report.html"]
    assert sorted(path.name for path in second.output.iterdir()) == ["_lock", *summaries]
    left = [f"part-0000{index}.parquet" for index in range(4)]
    assert sorted(path.name for path in (second.output / "predictions").iterdir()) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]
    source = pq.read_table(pairs / "part-00002.parquet")
    check_predictions(second.table("part-00002.parquet"), expected_of(other, source))


def test_overwrite_keeps_predictions_that_cannot_be_made_again(model: Path, pairs: Path, output: Path) -> None:
    before = snapshot(output)
    damage_a_file(pairs)
    with pytest.raises(RunError, match=r"--overwrite: nothing was replaced: part-00001\.parquet cannot be used"):
        score_here(model, output, pairs, overwrite=True)
    with pytest.raises(RequestError, match="which now cannot be used"):
        score_here(model, output, pairs, image_column="digit")
    with pytest.raises(RunError, match="--overwrite: nothing was replaced"):
        score_here(model, output, pairs, image_column="digit", overwrite=True)
    assert snapshot(output) == before


def test_strict_publishes_everything_at_the_end_and_overwrite_recognizes_a_file_below_another_root(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    score_here(model, tmp_path / "out", pairs / "part-0000[01].parquet")
    scored = score_here(model, tmp_path / "out", pairs, strict=True)
    assert scored.complete
    assert (scored.line["resumed_rows"], scored.line["scored_rows"]) == (600, ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert len(list((scored.output / "predictions").glob("part-*.parquet"))) == FILES

    before = snapshot(tmp_path / "out")
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(pairs / "part-00002.parquet", more)
    damage_a_file(pairs)
    with pytest.raises(RunError, match=r"nothing was replaced: in/part-00001\.parquet cannot be used"):
        score_here(model, tmp_path / "out", pairs, more, overwrite=True)
    assert snapshot(tmp_path / "out") == before


def test_an_output_that_another_run_holds_is_refused(model: Path, pairs: Path, output: Path) -> None:
    before = snapshot(output)
    said = r"--output .*: another run \(.*\) is writing there; wait for it, or choose another"
    with folder_lock(locate(str(output), "--output"), "--output", print), pytest.raises(RequestError, match=said):
        score_here(model, output, pairs, num_workers=1000)  # the lock comes before workers are asked for
    assert snapshot(output) == before


@pytest.mark.parametrize(
    "other_file", ["rejected/a.parquet", "rejected/notes.txt", "predictions/a.parquet", "thesis.partial", "a.parquet"]
)
@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"strict": True}], ids=str)
def test_a_refused_request_changes_no_file(
    model: Path, pairs: Path, tmp_path: Path, other_file: str, settings: dict[str, bool]
) -> None:
    (tmp_path / "out" / other_file).parent.mkdir(parents=True)
    shutil.copy(pairs / "part-00000.parquet", tmp_path / "out" / other_file)
    (tmp_path / "out" / ".hidden").write_text("")
    with pytest.raises(RequestError, match=r"not a file of|cannot be read") as refused:
        score_here(model, tmp_path / "out", pairs, **settings)
    assert other_file in str(refused.value)
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        Path(other_file),
        Path(".hidden"),
        Path("_lock"),
    }


def test_a_link_with_the_name_of_the_staging_folder_is_refused_and_not_followed(
    model: Path, pairs: Path, output: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "part-00000.parquet").write_text("other")
    (output / "_unpublished").symlink_to(victim)
    for settings in ({"strict": True}, {"overwrite": True}):
        with pytest.raises(RequestError, match="is not a folder of this program, but a link or a file; remove it"):
            score_here(model, output, pairs, **settings)
    assert (victim / "part-00000.parquet").read_text() == "other"


def test_unusable_names_and_footers_affect_no_other_file(model: Path, sample: pa.Table, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = sample.take(pa.array(range(0, 5000, 25))).append_column("number", pa.array([1] * 200, pa.int8()))
    for name in ("good", "liar", "x" * 247, "y" * 236, "line\nbreak\x1b[31m"):
        pq.write_table(rows, folder / f"{name}.parquet")
    # It must be split, and its name has no room for a suffix.
    pq.write_table(pa.concat_tables([rows] * 20), folder / f"{'z' * 247}.parquet")
    (folder / "good.parquet").rename(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.parquet"))
    with_footer(folder / "liar.parquet", 200, 10**13)
    scored = score_here(model, tmp_path / "out", folder, max_rows_per_file=2000)
    assert scored.line["failed_files"] == 3
    assert (scored.line["input_rows"], scored.line["scored_rows"]) == (600, 600)
    reasons = {name: row["reason"] for name, row in scored.files().items() if row["status"] == "failed"}
    assert set(reasons) == {"liar.parquet", "latin-\\udce9.parquet", f"{'z' * 247}.parquet"}
    assert "has a footer that promises 10,000,000,000,000 rows" in reasons["liar.parquet"]
    assert (tmp_path / "out" / "predictions" / f"{'x' * 247}.parquet").exists()
    assert "cannot be used: latin-\\udce9.parquet: its name is not UTF-8" in scored.said


def test_rows_missing_from_the_output_are_an_error(model: Path, pairs: Path, output: Path) -> None:
    path = output / "predictions" / "part-00002.parquet"
    pq.write_table(pq.ParquetFile(path).read().slice(1), path)  # its metadata still says 300 rows
    message = r"part-00002\.parquet: rows 0 to 299 should be in .* has 299 predictions and 0 rejected rows"
    with pytest.raises(RunError, match=message):
        score_here(model, output, pairs)


@pytest.mark.slow
def test_the_footers_of_many_files_are_read_on_the_cluster(model: Path, sample: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    small = sample.take(pa.array([5, 2500])).append_column("number", pa.array([1, 2], pa.int8()))
    for index in range(150):
        pq.write_table(small, tmp_path / "in" / "deep" / f"{index:03}.parquet")
    (tmp_path / "in" / "empty.parquet").touch()
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert (scored.line["files"], scored.line["failed_files"], scored.line["scored_rows"]) == (151, 1, 300)
    assert len(list((tmp_path / "out" / "predictions" / "deep").iterdir())) == 150
