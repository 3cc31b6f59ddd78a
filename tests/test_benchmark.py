"""Our side of the benchmark runs, without its peers: they are an extra."""

import pytest

from experiments import benchmark, ours

TINY = ours.Shape("transformer", 16, 1, 2, 8)


@pytest.mark.parametrize("side", [ours.training, ours.evaluation, ours.decoding])
def test_a_call_of_every_kind_of_job_runs(side):
    side(TINY)()


@pytest.mark.slow
def test_a_launch_of_its_own_takes_a_step():
    seconds, mebibytes = benchmark.launch_alone("ours")
    assert seconds > 0
    assert mebibytes > 0
