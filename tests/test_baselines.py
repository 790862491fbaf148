"""Memory and operations have not grown: counted on a CPU and compared with what is committed."""

import json

import pytest

from benchmarks.baselines import BASELINES, measure

UPDATE = "if the change is meant: python -m benchmarks.baselines --update"


pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def found():
    return measure()


@pytest.mark.parametrize("counted", ["peak_bytes", "flops"])
def test_within_two_percent_of_the_baseline(found, counted):
    committed = json.loads(BASELINES.read_text())["cpu"]
    assert committed.keys() == found.keys()
    for job, counts in found.items():
        assert counts[counted] == pytest.approx(committed[job][counted], rel=0.02), f"{job}: {counted}; {UPDATE}"


def test_the_segments_need_less_memory_than_one_pass_and_shared_prefills_fewer_operations(found):
    assert found["step: pte, segments"]["peak_bytes"] < found["step: pte, one pass"]["peak_bytes"]
    assert found["rollout: pte"]["flops"] < found["rollout: pte, plain"]["flops"]
