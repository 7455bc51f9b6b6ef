"""Install commands for extras work although the package is not on an index."""

import json
import os
import subprocess

import pytest

from cobra_edge.environment import requirements
from cobra_edge.environment.requirements import install_hint, require_export
from cobra_edge.errors import MachineError


class Installed:
    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin


def test_in_a_checkout_the_hint_installs_the_checkout(tmp_path, monkeypatch):
    checkout = requirements._CHECKOUT
    assert (checkout / "pyproject.toml").is_file()
    monkeypatch.chdir(checkout)
    assert install_hint("export", "regress") == "pip install '.[export,regress]'"
    monkeypatch.chdir(tmp_path)
    assert install_hint("rtx") == f"pip install '{checkout}[rtx]'"


def test_a_directory_that_was_removed_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert install_hint("rtx") == f"pip install '{requirements._CHECKOUT}[rtx]'"


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        ({"url": "file:///src/cobra-edge", "dir_info": {}}, "cobra-edge[serve] @ file:///src/cobra-edge"),
        ({"url": "file:///dist/x.whl", "archive_info": {"hash": "sha256=0"}}, "cobra-edge[serve] @ file:///dist/x.whl"),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "cobra-edge[serve] @ git+https://host/x.git",
        ),
        (None, "cobra-edge[serve]"),
        ("nonsense", "cobra-edge[serve]"),
    ],
)
def test_elsewhere_the_hint_names_where_it_came_from(tmp_path, monkeypatch, origin, hint):
    text = origin if origin is None else json.dumps(origin)
    monkeypatch.setattr(requirements, "_CHECKOUT", tmp_path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed(text))
    assert install_hint("serve") == f"pip install '{hint}'"


def test_a_missing_library_is_named_with_its_hint():
    with pytest.raises(MachineError) as caught:
        require_export("a test", "json", "no_such_library_of_anyone")
    assert str(caught.value) == f"a test needs no_such_library_of_anyone; install it with: {install_hint('export')}"


def test_no_message_names_an_index_that_does_not_have_it():
    """Every hint is worded in one place."""
    found = subprocess.run(
        ["grep", "-rlE", "--include=*.py", r"pip install '?cobra-edge\[", requirements.__file__.rpartition("/")[0]],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert [name.rpartition("/")[2] for name in found] in ([], ["requirements.py"])
