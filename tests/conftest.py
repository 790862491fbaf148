"""Settings of every test."""

import gc

import pytest
import torch
from hypothesis import settings

from pte_trl.rewards.grader import Grader
from tests.launches import workplace

torch.set_num_threads(1)  # the models are tiny: threads cost more than they give
settings.register_profile("pte", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("pte")


def pytest_collection_finish():
    """What is imported by now stays to the end: the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, time_limit=1.0) as grader:
        yield grader


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for launches, with a tiny model and its problems."""
    return workplace(tmp_path_factory.mktemp("launches"))
