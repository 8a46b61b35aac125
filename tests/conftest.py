"""Fixtures and hooks of all tests.

Tests read and fill the user's own cache (``$NEUROLIB_CACHE`` or ``~/.cache/neurite-vit``): the
pre-trained weights are fetched once, not once per run.
"""

import os

import pytest
from figures import Comparison

# Before torch is imported, also in kernels of tests: idle OpenMP threads sleep. Spinning
# ones take the cores from other processes and slow a ViT six times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Number of damaged files that tests gave to the readers.
DAMAGED = pytest.StashKey[int]()


def pytest_configure(config):
    # Registered, because hooks of this file see only tests of its folder, not notebooks.
    config.pluginmanager.register(Comparison(), "figures")


@pytest.fixture
def count_damaged(pytestconfig):
    """Call it with a number of damaged files after all were refused or read."""

    def count(files):
        pytestconfig.stash[DAMAGED] = pytestconfig.stash.get(DAMAGED, 0) + files

    return count


def pytest_terminal_summary(terminalreporter, config):
    files = config.stash.get(DAMAGED, 0)
    if files:
        terminalreporter.write_line(f"fuzz: {files:,} damaged files, all refused or read")
