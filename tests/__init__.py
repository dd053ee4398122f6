"""Tests of the project. PyTorch's threads wait without spinning, for the work beside them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is imported
