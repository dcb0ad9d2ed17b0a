"""Memory that was brought in takes no faults, and keeps what is in it."""

import resource
import sys

import pytest
import torch

from tokenmill.kernels.pages import bring_in

PAGE = resource.getpagesize()


def faults_of_zeroing(tensor: torch.Tensor) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor.zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux 5.14")
def test_pages_are_there_before_they_are_used() -> None:
    memory = torch.empty(4096 * PAGE, dtype=torch.uint8)  # more than malloc keeps
    bring_in(memory[: 2048 * PAGE])
    assert faults_of_zeroing(memory[: 2048 * PAGE]) < 100
    assert faults_of_zeroing(memory[2048 * PAGE :]) > 100


def test_contents_stay_and_parts_of_pages_are_left() -> None:
    memory = torch.arange(10_000)
    bring_in(memory)
    bring_in(memory[3:5])
    bring_in(memory[:0])
    assert torch.equal(memory, torch.arange(10_000))
