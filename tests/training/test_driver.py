"""What a run that goes on keeps of what it was."""

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.driver import _going_on

STORED = {
    "status": "finished",
    "metrics": {"run": "runs/mine"},
    "data": {"sha256": "a" * 64, "location": "sample", "notice": "NOT the full MNIST"},
}
NOW = {"status": "running", "workers": "1 CPU worker", "data": {"sha256": "a" * 64, "location": "sample", "notice": ""}}


def test_what_it_had_come_to_and_what_was_said_of_its_data_stay() -> None:
    manifest = _going_on(STORED, NOW)
    assert manifest == {**STORED, "status": "running", "workers": "1 CPU worker"}


def test_other_data_are_refused() -> None:
    other = NOW | {"data": {"sha256": "b" * 64, "location": "elsewhere", "notice": ""}}
    with pytest.raises(RequestError, match=r"the data are not those of the run .*aaaaaaaaaaaa… from sample"):
        _going_on(STORED, other)
