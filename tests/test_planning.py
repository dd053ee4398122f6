"""The benchmark of planning takes what scoring and training write and read today; a small size shows it."""

from mnistsum_ray.benchmark.planning import plan_scoring, plan_training


def test_planning_runs() -> None:
    assert min(plan_scoring(500).values()) >= 0
    assert min(plan_training(200, 10_000).values()) >= 0
