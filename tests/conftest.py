import os

# Several workers with several threads each would be in each other's way; what the tests start as processes inherits it.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
matplotlib.use('agg')

import pytest


@pytest.fixture(autouse=True)
def in_32_bits(monkeypatch):
    "Scoring passes are the same on every machine, whether or not it is made for bfloat16; tests of that say so"
    monkeypatch.setattr('fastai_is.callback.core.fast_bf16', lambda device: False)
