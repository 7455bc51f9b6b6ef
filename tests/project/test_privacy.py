"""Nothing leaves the machine unasked: checks new files in the home directory, connection attempts and DNS lookups."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import onnxruntime
import pytest

from cobra_edge.environment.privacy import SWITCHES, switch_off_telemetry

from ..conftest import MINI
from ..serve.serve_case import PATIENCE

ROOT = Path(__file__).parents[2]
ASK = ["--image", str(MINI / "demo.png"), "--prompt", "Is there a red circle?"]
# onnxruntime reports nothing if CI is set. The user's own settings must not make a test pass.
HIDES = {"CI", "GITHUB_ACTIONS", "TF_BUILD", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "NO_PROXY", "no_proxy", *SWITCHES}
OPEN = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"


@dataclass(frozen=True)
class Machine:
    """A child process's view of a user's machine: an empty home, and a proxy that records the requested hosts."""

    home: Path
    environment: dict[str, str]
    wanted: list[str] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)

    def files(self) -> list[str]:
        """Return the new files in the home directory, except our own cache."""
        found = (str(file.relative_to(self.home)) for file in self.home.rglob("*") if file.is_file())
        return sorted(name for name in found if not name.startswith(".cache/cobra_edge/"))

    def call(self, *arguments: str | Path) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def fresh_machine(home: Path) -> Iterator[Machine]:
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in HIDES}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for kind in ("http_proxy", "https_proxy", "all_proxy"):
            environment |= {kind: url, kind.upper(): url}
        environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "PYTHONPATH": str(ROOT)}
        machine = Machine(home, environment)

        def write_down() -> None:
            while True:
                try:
                    client, _ = proxy.accept()
                except OSError:  # shut down: the test is over
                    return
                with client:
                    client.settimeout(PATIENCE)
                    machine.wanted.append(client.recv(4096).decode(errors="replace").split("\r\n")[0])
                    machine.asked.set()

        thread = threading.Thread(target=write_down, daemon=True)
        thread.start()
        yield machine
        proxy.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with fresh_machine(tmp_path / "home") as machine:
        yield machine


def reports_on_linux() -> bool:
    """Return whether this onnxruntime has telemetry on Linux."""
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 29)


def write_graph(file: Path) -> Path:
    """Write an identity graph."""
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


@contextmanager
def served(bundle: Path, machine: Machine, *before: str) -> Iterator[None]:
    """Serve a bundle on a machine and send one request; the server shuts down cleanly after the context."""
    command = [*before, sys.executable, "-m", "cobra_edge.serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(command, env=machine.environment, cwd=machine.home, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body = {"messages": [{"role": "user", "content": "Is there a red circle?"}], "max_tokens": 2, "model": "cobra-mini"}
        with httpx.Client(trust_env=False, timeout=120) as client:
            assert client.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0


@dataclass(frozen=True)
class Watched:
    """Observations of a server, of another one under strace, and of onnxruntime without us until it had reported."""

    server: Machine
    traced: Machine
    calls: list[str] | None  # None: strace is not available
    alone: Machine | None  # None: this onnxruntime has no telemetry


@pytest.fixture(scope="module")
def watched(mini_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, bundle, strace = tmp_path_factory.mktemp("privacy"), mini_bundle("w4a16-g128"), shutil.which("strace")
    if strace is not None and subprocess.run([strace, "-f", "true"], capture_output=True).returncode != 0:
        strace = None  # a container may forbid it
    with ExitStack() as machines:
        server, traced = (machines.enter_context(fresh_machine(folder / name)) for name in ("server", "traced"))
        # Through a proxy there are no DNS lookups and no direct connections; the traced process has no proxy.
        for name in [name for name in traced.environment if name.lower().endswith("_proxy")]:
            del traced.environment[name]
        alone = machines.enter_context(fresh_machine(folder / "alone")) if reports_on_linux() else None
        with ExitStack() as running:
            running.enter_context(served(bundle, server))
            if strace is not None:
                trace = [strace, "-D", "-f", "-e", "trace=%network", "-o", str(folder / "calls")]
                running.enter_context(served(bundle, traced, *trace))
            if alone is not None:  # started last: once it has reported, the others would have too
                command = [sys.executable, "-c", OPEN + "; sys.stdin.read()", write_graph(folder / "graph.onnx")]
                child = subprocess.Popen(command, env=alone.environment, cwd=alone.home, stdin=subprocess.PIPE)
                with child:
                    alone.asked.wait(PATIENCE)
                    child.kill()
        lines = None if strace is None else (folder / "calls").read_text(errors="replace").splitlines()
        yield Watched(server, traced, lines, alone)


def test_onnxruntime_alone_reports_so_that_its_silence_means_something(watched: Watched) -> None:
    if watched.alone is None:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no telemetry on Linux")
    assert watched.alone.files() and watched.alone.wanted


def test_a_server_reports_to_nobody(watched: Watched) -> None:
    assert not watched.server.files() and not watched.server.wanted


def test_a_server_looks_up_no_name_and_connects_to_nobody(watched: Watched) -> None:
    if watched.calls is None:
        pytest.skip("strace is not available; another test checks the proxy's requests")
    assert any("listen(" in line for line in watched.calls), "strace saw nothing"
    # DNS lookups use datagram sockets. Loopback addresses and Unix sockets are local.
    far = re.compile(r'AF_INET6?, SOCK_DGRAM|inet_addr\("(?!127\.|0\.0\.0\.0)|AF_INET6, "(?!::1?")')
    assert [line for line in watched.calls if far.search(line)] == []
    assert not watched.traced.files()


@pytest.mark.parametrize("arguments", [("run", *ASK), ("inspect",), ("regress",)], ids=lambda value: value[0])
def test_a_command_leaves_only_our_own_cache_in_a_home(
    machine: Machine, mini_bundle: Callable[..., Path], arguments: tuple[str, ...]
) -> None:
    machine.call("-m", f"cobra_edge.{arguments[0]}", mini_bundle("w4a16-g128"), *arguments[1:])
    assert not machine.files() and not machine.wanted


LOAD = "datasets.load_dataset('json', data_files=sys.argv[1])"


@pytest.mark.parametrize("first", ["cobra_edge", "sys"], ids=["with us", "without us: the control"])
def test_data_sets_of_this_machine_are_opened_without_a_report(machine: Machine, tmp_path: Path, first: str) -> None:
    pytest.importorskip("datasets", reason="datasets, which comes with the extra eval, is not installed")
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n')
    machine.call("-c", f"import sys, {first}, datasets; assert {LOAD}['train'][0] == {{'a': 1}}", tmp_path / "lines.jsonl")
    assert bool(machine.wanted) == (first != "cobra_edge")


def test_the_switches_are_set_before_a_library_is_imported_and_children_inherit_them(machine: Machine) -> None:
    program = """
import importlib.abc, json, os, subprocess, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        first.setdefault(name, dict(os.environ))

first = {}
sys.meta_path.insert(0, Watch())
import cobra_edge.vision.session
child = subprocess.run([sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"], capture_output=True)
print(json.dumps([first["onnxruntime"], first["numpy"], json.loads(child.stdout)]))
"""
    for environment in json.loads(machine.call("-c", program)):
        assert {name: environment.get(name) for name in SWITCHES} == SWITCHES


@pytest.mark.parametrize("was", ["0", "", "false"])
def test_a_switch_that_was_on_is_set_off(was: str) -> None:
    environment = {"ORT_DISABLE_TELEMETRY": was, "OTHER": "kept"}
    switch_off_telemetry(environment)
    assert environment == SWITCHES | {"OTHER": "kept"}


def test_an_onnxruntime_that_was_imported_before_us_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.32.0")
    switch_off_telemetry({})
    assert "import cobra_edge first" in caplog.text
    caplog.clear()
    switch_off_telemetry({"ORT_DISABLE_TELEMETRY": "1"})
    for version in ("1.23.2", "unknown"):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        switch_off_telemetry({})
    assert not caplog.text
