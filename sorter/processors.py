"""How many processors there are for us."""

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """How many processors this process may use at a time: its affinity, and what its container may take.

    A share of 1.5 processors counts as 2: the half would be idle otherwise.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _cgroup_limit(Path("/proc/self/cgroup"), _CGROUPS))))


def _cgroup_limit(membership: Path, root: Path) -> float:
    """The smallest limit of our control groups and all above them, in processors; infinite where there is none.

    Args:
        membership: `/proc/self/cgroup`, a line `hierarchy:controllers:path` for each group (cgroups(7)).
        root: where they are mounted, `/sys/fs/cgroup`.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        unified = not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        mounted = root if unified else root / controllers
        # In a container the path may be the one outside, of which nothing is to be seen: then the top is our own group.
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mounted):
                limits.append(_limit(folder, unified=unified))
    return min(limits)


def _limit(group: Path, *, unified: bool) -> float:
    try:
        if unified:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group here, or `max`
        return math.inf
