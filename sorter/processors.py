"""How many CPUs this process may use."""

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """How many CPUs this process may use at the same time: by its affinity, and by its container's limit.

    A limit of 1.5 CPUs counts as 2, so that none of it is left idle.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _cgroup_limit(Path("/proc/self/cgroup"), _CGROUPS))))


def _cgroup_limit(membership: Path, root: Path) -> float:
    """The smallest limit of the process's control groups and their ancestors, in CPUs; infinite without a limit.

    Args:
        membership: `/proc/self/cgroup`, a line `hierarchy:controllers:path` per group (cgroups(7)).
        root: where control groups are mounted, `/sys/fs/cgroup`.
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
        # In a container this may be the path on the host, which does not exist inside: then the root is our own group.
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
    except (OSError, ValueError):  # the group is not visible here, or its limit is `max`
        return math.inf
