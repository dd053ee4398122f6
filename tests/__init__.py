"""Tests of the project. PyTorch's threads wait without spinning here: beside other work on the same cores they spin for long."""

import os

# A training step of 32 rows takes 0.15 s of CPU so on two busy cores, and 1 s otherwise. It is read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
