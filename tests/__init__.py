"""Tests of the project. PyTorch's threads wait without spinning: beside other work they spin for long."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is imported
