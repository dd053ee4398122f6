"""The learning rates of a run."""

import numpy as np
import pytest

from mnistsum_ray.model.schedule import one_cycle


def test_the_rate_rises_and_falls_once_and_is_highest_after_a_fifth_of_the_steps() -> None:
    for total in (1, 5, 1000):
        rates = np.array([one_cycle(step, total, 0.5) for step in range(total)])
        assert ((rates > 0) & (rates <= 0.5 + 1e-12)).all()
        top = int(rates.argmax())
        assert (np.diff(rates[: top + 1]) > 0).all()
        assert (np.diff(rates[top:]) < 0).all()
    assert (rates[0], rates[200]) == (0.5 / 25, 0.5)
    assert rates[999] == pytest.approx(0.5 / 1e4)
