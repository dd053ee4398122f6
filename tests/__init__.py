"""Tests of the project: their processes share a few cores, and so wait without spinning."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is imported
os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15 its workers wait for other tests
# Ray would start a cluster for a thread that calls it after `ray.shutdown`.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
