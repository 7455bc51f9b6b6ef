"""The command that serves: what it refuses at the start, in words and with an exit code, and what it says."""

import socket
import subprocess
import sys

import pytest

from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.serve.command import KEY_VARIABLE, _read_key, command
from cobra_edge.serve.server import Address
from cobra_edge.terminal.output import run_command


def refused(capsys, *options):
    """Return the exit code and what was said of options that do not lead to a server."""
    code = run_command(command, ["nowhere", *options])
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


@pytest.mark.parametrize("option", ["--deadline", "--grace"])
@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_seconds_are_a_number(capsys, option, seconds):
    code, said = refused(capsys, option, seconds)
    assert code == 2
    assert option in said and "unexpected" not in said


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".example", "", "no.such.host.invalid"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(InputError, match="give an address of this machine"):
        Address(host, 0).bind()


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port}.*another --port"):
            Address("127.0.0.1", port).bind()


def test_a_missing_bundle(capsys):
    code, said = refused(capsys, "--port", "0")
    assert code == 2
    assert "nowhere" in said


@pytest.mark.parametrize("option", ["--allowed-host", "--allow-image-host"])
def test_an_invalid_name_is_reported_before_the_bundle_is_opened(capsys, option):
    code, said = refused(capsys, "--port", "0", option, "http://edge.example/")
    assert code == 2
    assert f"{option} 'http://edge.example/'" in said


@pytest.mark.parametrize("text", ["secret", "secret\n", " secret \r\n"])
def test_a_key_is_one_line(monkeypatch, tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    assert _read_key(file) == "secret"
    monkeypatch.setenv(KEY_VARIABLE, text)
    assert _read_key(None) == "secret"


@pytest.mark.parametrize("text", [" ", "\n", "two words", "two\nlines", "schlüssel", "a\tb"])
def test_what_no_client_can_show_is_no_key(monkeypatch, tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="key: expected one line"):
        _read_key(file)
    monkeypatch.setenv(KEY_VARIABLE, text)
    with pytest.raises(InputError, match=f"{KEY_VARIABLE}: expected one line"):
        _read_key(None)


def test_an_unreadable_key_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        _read_key(tmp_path / "key")


@pytest.mark.parametrize("variable", [None, ""])
def test_without_a_key_none_is_wanted(monkeypatch, variable):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(KEY_VARIABLE, variable)
    assert _read_key(None) is None


def test_a_missing_extra_is_named_with_what_installs_it():
    without = "import sys; sys.modules['fastapi'] = None; from cobra_edge.serve.command import main; main()"
    done = subprocess.run([sys.executable, "-c", without, "nowhere"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"serve needs fastapi; install it with: {install_hint('serve')}" in done.stderr
