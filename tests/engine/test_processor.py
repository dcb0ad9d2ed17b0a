"""What a measurement is kept for: the processor, and the share of it that a container has."""

from pathlib import Path

import torch

from tokenmill.engine.processor import cpu_quota, processor


def test_quotas_of_all_groups_above_count(tmp_path: Path) -> None:
    own, mounts = tmp_path / "own", tmp_path / "mounts"
    own.write_text("3:memory:/a\n0::/pod/container\n")
    (mounts / "pod" / "container").mkdir(parents=True)
    (mounts / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    (mounts / "pod" / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota(mounts, own) == ["max 100000", "50000 100000", ""]


def test_quotas_of_the_first_version(tmp_path: Path) -> None:
    own, mounts = tmp_path / "own", tmp_path / "mounts"
    own.write_text("4:cpu,cpuacct:/\n")
    (mounts / "cpu,cpuacct").mkdir(parents=True)
    (mounts / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("150000\n")
    assert cpu_quota(mounts, own) == ["150000", ""]


def test_where_there_are_none(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") == []


def test_threads_count() -> None:
    before, threads = processor(), torch.get_num_threads()
    assert processor() == before
    torch.set_num_threads(threads + 1)
    try:
        assert processor() != before
    finally:
        torch.set_num_threads(threads)
