"""Memory of the machine, and of a control group whose limit is lower."""

import pytest

from cobra_edge.environment import available_memory
from cobra_edge.environment.available_memory import available_bytes, total_bytes


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Return the control group of this process, on a machine of 8 MB of which 3 MB are free."""
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (tmp_path / "self").write_text("0::/job\n")
    (tmp_path / "meminfo").write_text("MemTotal: 7812 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(available_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(available_memory, "_CGROUP_OF_SELF", tmp_path / "self")
    return group


def test_a_control_groups_limit_counts_and_its_file_pages_do_not(group):
    assert (available_bytes(), total_bytes()) == (3000 * 1024, 7812 * 1024)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 400000\ninactive_file 300000\nactive_file 200000\n")
    assert (available_bytes(), total_bytes()) == (600_000, 1_000_000)
    (group.parent / "memory.max").write_text("500000\n")  # of an ancestor
    assert total_bytes() == 500_000
    (group.parent / "memory.max").unlink()
    (group / "memory.max").write_text("max\n")
    assert (available_bytes(), total_bytes()) == (3000 * 1024, 7812 * 1024)


def test_a_system_that_reports_nothing(group, tmp_path):
    (tmp_path / "meminfo").unlink()
    (tmp_path / "self").unlink()
    assert available_bytes() is None and total_bytes() is None
