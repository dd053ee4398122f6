"""Data, runs and predictions on an S3 that speaks HTTP, with the same command and the same result as on a disk."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportConfig, Refusal, RunFailed
from mnistsum_ray.export import export
from mnistsum_ray.mnist import SAMPLE
from mnistsum_ray.scoring.commit import as_parquet
from mnistsum_ray.scoring.lock import BEAT_SECONDS, hold
from mnistsum_ray.storage import Location, locate
from tests.integration.conftest import Done, run_job


@pytest.mark.usefixtures("s3")
def test_s3_in_and_out(tmp_path: Path) -> None:
    local = tmp_path / "data" / "rows.parquet"
    local.parent.mkdir()
    pq.write_table(pq.read_table(SAMPLE)[::10], local)
    (locate("s3://images", "--data") / "mnist" / "rows.parquet").write_bytes(local.read_bytes())
    flags = ["--epochs", 1, "--name", "mine"]
    there = run_job("train", "--data", "s3://images/mnist", "--storage-path", "s3://runs/all", *flags)
    here = run_job("train", "--data", local.parent, "--storage-path", tmp_path / "runs", *flags)
    assert there.line["run"] == "s3://runs/all/mine"
    assert there.line["test"] == here.line["test"]
    weights = locate(there.line["model"], "--model") / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "runs" / "mine" / "model" / "model.safetensors").read_bytes()
    again = run_job("train", "--data", "s3://images/mnist", "--storage-path", "s3://runs/all", *flags)
    assert again.code == 2
    assert "s3://runs/all/mine exists" in again.err


def table(place: Location) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(place.read_bytes())).read().replace_schema_metadata()


@pytest.mark.usefixtures("s3")
def test_scoring_from_s3_to_s3_gives_what_a_disk_gives(model: Path, tmp_path: Path) -> None:
    roots = {"there": locate("s3://scores/run", "--output"), "here": locate(str(tmp_path), "--output")}
    done: dict[str, Done] = {}
    for where, root in roots.items():
        export(ExportConfig(data="sample", output=(root / "pairs").text, rows=400, files=4), print)
        (root / "pairs" / "bad.parquet").write_bytes(b"not Parquet at all")
        bad = table(root / "pairs" / "part-00001.parquet").set_column(2, "number", pa.array([10] * 3 + [1] * 97, pa.int8()))
        (root / "pairs" / "part-00001.parquet").write_bytes(as_parquet(bad))
        for name in ("model.safetensors", "model.json"):
            (root / "model" / name).write_bytes((model / name).read_bytes())
        flags = ["--model", root.text + "/model", "--output", root.text + "/out", "--unit-rows", 60, "--label-column", "digit"]
        done[where] = run_job("score", "--input", root.text + "/pairs/*.parquet", *flags)
        assert done[where].code == 3, done[where].err
    there, here = (done[where].last_line for where in ("there", "here"))
    timing = {"output", "seconds", "rows_per_second"}
    assert {key: there[key] for key in there.keys() - timing} == {key: here[key] for key in here.keys() - timing}
    assert (there["rejected_rows"], there["failed_files"]) == (3, 1)
    names = {where: [info.path.removeprefix(root.path) for info in (root / "out").files()] for where, root in roots.items()}
    assert names["there"] == names["here"]
    assert "/out/_rejected/part-00001-00000-of-00002.parquet" in names["here"]
    for name in names["here"]:
        if name.endswith(".parquet"):
            one, other = (table(root / name[1:]) for root in roots.values())
            if "source_file" in one.column_names:
                assert one["source_file"].unique().to_pylist() == ["s3://scores/run/pairs/part-00001.parquet"]
                one, other = (side.drop_columns(["source_file"]) for side in (one, other))
            assert one.equals(other), name

    # Again, all of it anew, in a staging folder first.
    text = roots["there"].text
    again = run_job("score", "--model", f"{text}/model", "--input", f"{text}/pairs", "--output", f"{text}/out", "--overwrite")
    assert again.code == 3, again.err
    assert again.last_line["resumed_rows"] == 0
    left = {info.path.removeprefix(roots["there"].path) for info in (roots["there"] / "out").files()}
    assert left == {
        "/out/_files.parquet",
        "/out/_manifest.json",
        "/out/_probabilities.png",
        "/out/_rejects.png",
        "/out/_rejected/part-00001.parquet",
        *(f"/out/part-0000{index}.parquet" for index in range(4)),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_a_lock_in_an_object_store_is_held_by_one_and_ends_with_its_run() -> None:
    output, said = locate("s3://scores/locked", "--output"), list[str]()
    with hold(output, said.append) as still_held:
        with pytest.raises(Refusal, match=r"another run .* is writing there"), hold(output, said.append):
            pass
        still_held()
    assert not (output / "_lock").exists()
    (output / "_lock").write_json({"id": "a run that was killed", "beat": 7})
    with hold(output, said.append) as still_held:
        assert "was left by a run that was killed" in said[-1]
        still_held()
        (output / "_lock").write_json({"id": "a run that took it", "beat": 1})
        time.sleep(2 * BEAT_SECONDS)
        with pytest.raises(RunFailed, match="another run has taken the output"):
            still_held()
    assert (output / "_lock").exists()
