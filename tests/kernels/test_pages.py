"""Memory that was brought in takes no faults, and keeps what is in it."""

import mmap
import platform
import re
import resource
import sys

import pytest
import torch

from tokenmill.kernels.pages import bring_in

PAGE = resource.getpagesize()
KERNEL = [int(number) for number in re.findall(r"\d+", platform.release())[:2]]


def faults_of_zeroing(tensor: torch.Tensor) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor.zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    sys.platform != "linux" or KERNEL < [5, 14], reason="needs madvise of Linux 5.14"
)
def test_pages_are_there_before_they_are_used() -> None:
    with mmap.mmap(-1, 4096 * PAGE) as region:
        region.madvise(mmap.MADV_NOHUGEPAGE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        bring_in(memory[: 2048 * PAGE])
        assert faults_of_zeroing(memory[: 2048 * PAGE]) < 100
        assert faults_of_zeroing(memory[2048 * PAGE :]) > 100
        del memory


def test_contents_stay_and_parts_of_pages_are_left() -> None:
    memory = torch.arange(10_000)
    bring_in(memory)
    bring_in(memory[3:5])
    bring_in(memory[:0])
    assert torch.equal(memory, torch.arange(10_000))
