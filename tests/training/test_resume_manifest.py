"""The manifest of a resumed run."""

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.resume import resume_manifest

STORED = {
    "status": "finished",
    "metrics": {"run": "runs/mine"},
    "data": {"sha256": "a" * 64, "location": "sample", "notice": "NOT the full MNIST"},
}
NOW = {"status": "running", "workers": "1 CPU worker", "data": {"sha256": "a" * 64, "location": "sample", "notice": ""}}


def test_results_and_the_notice_about_the_data_stay() -> None:
    manifest = resume_manifest(STORED, NOW)
    assert manifest == {**STORED, "status": "running", "workers": "1 CPU worker"}


def test_other_data_are_refused() -> None:
    other = NOW | {"data": {"sha256": "b" * 64, "location": "elsewhere", "notice": ""}}
    with pytest.raises(RequestError, match=r"the data are not those of the run .*aaaaaaaaaaaa… from sample"):
        resume_manifest(STORED, other)
