"""`processor`: what this process computes on, as a text that differs where speeds may.

Machines with one home directory keep what they have measured in the same place, and so do
containers of one image with different shares of a machine.
"""

import os
import platform
from pathlib import Path

import torch

#: Of /proc/cpuinfo: what names a processor, on x86 and on ARM.
_NAMES = ("model name", "stepping", "cache size", "CPU implementer", "CPU part", "CPU variant")


def processor() -> str:
    """The processor, the cores that the process may use, their quota, and torch's threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = sorted({line for line in lines if line.startswith(_NAMES)})
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = (platform.machine(), names, cores, os.cpu_count(), cpu_quota(), torch.get_num_threads())
    return repr(told)


def cpu_quota(
    mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[str]:
    """The limits of CPU time of this process's control groups, from its own up to the root's."""
    found = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        top = mounts / controllers
        place = top / path.lstrip("/")
        for directory in [place, *place.parents]:
            found += [_content(directory / name) for name in names]
            if directory == top:
                break
    return found


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the root has none; a container does not see those above its own
        return ""
