"""How many CPUs the process may use, from files like the kernel's."""

import math
from pathlib import Path

import pytest

from sorter.processors import _cgroup_limit, available_cpus


def limit(root: Path, membership: str, files: dict[str, str]) -> float:
    """The limit of control groups with these files."""
    mounted = root / "cgroup"
    mounted.mkdir()
    for name, content in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(content)
    (root / "membership").write_text(membership)
    return _cgroup_limit(root / "membership", mounted)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "400000 100000\n"}, 2.0),
        # In a container, where the path is the host's.
        ("0::/docker/abc\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000\n", "cpu/x/cpu.cfs_period_us": "50000\n"}, 2.0),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "1\n"},
            math.inf,
        ),
        ("5:memory:/\n", {"cpu.max": "100000 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense\n"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_smallest_limit_of_all_ancestors_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float
) -> None:
    assert limit(tmp_path, membership, files) == expected


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert _cgroup_limit(tmp_path / "nothing", tmp_path) == math.inf


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert available_cpus() == 1
