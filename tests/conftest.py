"""Set-up shared by all tests: Triton's interpreter where there is no GPU, and the devices to test on."""

from __future__ import annotations

import os

import pytest
import torch
from compatibility import pytest_addoption, pytest_configure, pytest_runtest_makereport  # noqa: F401  (hooks)

# One worker of several (pytest-xdist): more threads than cores only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
else:
    # Triton reads this when a kernel is decorated, so it must be there before the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
