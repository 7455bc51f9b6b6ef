"""The list of slow tests in conftest: every entry is a file, a folder or a test that exists."""

import pytest

from ..conftest import ROOT, SLOW


@pytest.mark.parametrize("prefix", SLOW)
def test_an_entry_exists(prefix: str) -> None:
    name, _, test = prefix.partition("::")
    files = list(ROOT.glob(f"{name}*")) if not (ROOT / name).is_dir() else list((ROOT / name).rglob("test_*.py"))
    assert files
    assert not test or f"def {test}(" in (ROOT / name).read_text(encoding="utf-8")


def test_they_are_marked(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        assert (item.get_closest_marker("slow") is not None) == item.nodeid.startswith(SLOW)
