"""Export and the commands: what they print, their exit codes, and that nothing half-written remains."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from cobra_edge import inspect, run
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.memory_plan import state_bytes
from cobra_edge.bundle.reader import Bundle, staged_directory
from cobra_edge.cli import COMMANDS
from cobra_edge.cli import command as whole
from cobra_edge.decode import backends
from cobra_edge.errors import InputError
from cobra_edge.export import command as export_module
from cobra_edge.export import pipeline as assemble
from cobra_edge.export.memory_plan import plan_memory
from cobra_edge.formats.model_config import CobraConfig, MambaConfig
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.safetensors_file import SafetensorsWriter
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.model.backbones import vision_backbone
from cobra_edge.terminal.output import run_command

from ..conftest import MINI

IMAGE = str(MINI / "demo.png")
COBRA_3B = CobraConfig(
    "cobra+3b",
    vision_backbone("dinosiglip-vit-so-384px"),
    "fused-gelu-mlp",
    MambaConfig(2560, 64, 50280, 5120, 16, 4, 160),
)


@pytest.fixture
def export(text_only, tmp_path, capfd):
    """Return a function that runs `export` on a small text-only checkpoint: (exit code, stdout, stderr)."""

    def call(*arguments, out=tmp_path / "out" / "bundle"):
        given = ["--target", "cpu", "--checkpoint", str(text_only), "--golden-lines", "16", *arguments]
        given += [] if {"--quality", "--method"} & set(arguments) else ["--quality", "fast"]
        given += [] if "--scheme" in arguments else ["--scheme", "w8a16-g128"]
        # Random weights are indifferent to their tokens: rounding changes the likeliest one.
        given += [] if "--budget" in arguments else ["--budget", str(budget_without_limits(tmp_path))]
        code = run_command(export_module.command, [*given, "--out", str(out)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def leftovers(directory):
    """Return what is in a directory; None where there is none, as before the export."""
    return sorted(f.name for f in directory.iterdir()) if directory.exists() else None


def test_export_prints_tables_or_json(export, tmp_path):
    code, out, _ = export("--scheme", "w8a16-g128")
    assert code == 0 and "memory on" in out and "kld_mean" in out
    code, out, err = export("--scheme", "w8a16-g128", "--json", "--force")
    data = json.loads(out)
    assert code == 0 and "error" not in err
    assert data["manifest"]["recipe"]["scheme"] == "w8a16-g128"
    assert all(v["within"] is not False for v in data["drift_verdicts"])
    assert leftovers(tmp_path / "out") == ["bundle"]


def test_mini_is_the_default_and_said(tmp_path, capfd, sharing):
    with sharing():
        code = run_command(whole, ["export", "--target", "jetson", "--out", str(tmp_path / "b")])
    captured = capfd.readouterr()
    said = [line for line in captured.err.splitlines() if "cobra-mini" in line]
    assert code == 0
    assert said == ["no --checkpoint given: exporting the embedded cobra-mini, a small model of synthetic scenes"]
    manifest = Bundle.open(tmp_path / "b").manifest
    recipe = manifest.recipe
    assert (manifest.target, recipe.scheme, recipe.method) == ("jetson-orin-nano", "mixed", "guided")
    assert (recipe.rotations, recipe.activations) == (("out-proj",), "float32")
    assert "recipe: mixed, guided, out_proj rotated by a Hadamard matrix, float32 activations, fp16 vision" in captured.out
    assert manifest.source.id == "cobra-mini" and 1e-4 < manifest.drift.measures["vision_error"] < 5e-3
    assert (manifest.vision.precision, manifest.vision.input) == ("fp16", "uint8")
    assert "fp16 emulated" in manifest.drift.vision_runtime


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "jetson-orin-nxx"), "did you mean 'jetson-orin-nx'"),
        (("--scheme", "w4a16-g12"), "did you mean 'w4a16-g128'"),
        (("--checkpoint", "cobra+4b"), "did you mean 'cobra+3b'"),
        (("--golden", "/nowhere.jsonl"), "cannot be read"),
        (("--budget", "/nowhere.toml"), "no such budget"),
        (("--tokenizer", "/nowhere.json"), "--tokenizer "),
        (("--method", "magic"), "--method: "),
        (("--golden-lines", "0"), "--golden-lines: "),
    ],
)
def test_bad_options(export, tmp_path, arguments, says):
    code, _, err = export(*arguments)
    assert code == 2 and says in " ".join(err.split()) and "Traceback" not in err
    assert leftovers(tmp_path / "out") is None


def test_an_output_that_exists(export):
    assert export()[0] == 0
    code, _, err = export()
    assert code == 2 and "--force" in err
    assert export("--force")[0] == 0


def test_an_output_that_cannot_be_written(export):
    code, _, err = export(out="/proc/bundle")
    assert code == 2 and "cannot be written" in err
    code, _, err = export(out="/dev/null/x/bundle")
    assert code == 2 and "cannot be written" in err


def test_a_disk_that_fills_up(export, tmp_path, monkeypatch):
    real, calls = SafetensorsWriter.write, []

    def write(self, name, values):
        calls.append(name)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, values)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    code, _, err = export()
    assert code == 3 and "No space left" in err
    assert leftovers(tmp_path / "out") is None


def test_damaged_weights_are_named(text_only, export, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(text_only / "model.safetensors")
    tensors["backbone.layers.1.mixer.x_proj.weight"][3, 4] = float("nan")
    save_file(tensors, text_only / "model.safetensors")
    code, _, err = export()
    assert code == 2 and "backbone.layers.1.mixer.x_proj.weight" in err.replace("\n", "")
    assert leftovers(tmp_path / "out") is None


def test_a_drift_beyond_its_budget_exits_1_and_keeps_the_bundle(export, tmp_path):
    strict = tmp_path / "strict.toml"
    strict.write_text("[schemes.w4a16-g128]\nkld_mean = {max = 1e-12}\n")
    code, out, err = export("--scheme", "w4a16-g128", "--budget", str(strict))
    assert code == 1 and "EXCEEDED" in out and "kld_mean" in err
    Bundle.open(tmp_path / "out" / "bundle")


def test_a_budget_with_unknown_names(export, tmp_path):
    odd = tmp_path / "odd.toml"
    odd.write_text("[schemes.w8a16-g128]\nkld_maen = {max = 1.0}\n")
    code, _, err = export("--budget", str(odd))
    assert code == 2 and "unknown measure 'kld_maen'; did you mean 'kld_mean'" in " ".join(err.split())
    odd.write_text("[schemes.w4a16-g128]\nkld_mean = {max = 1.0}\n")
    code, _, err = export("--budget", str(odd), "--scheme", "w8a16-g128")
    assert code == 2 and "no limits for scheme" in err
    assert leftovers(tmp_path / "out") is None


# An export that stays in a stage from where it tells of it, for as long as it is not interrupted.
PAUSING = """
import sys, time
from cobra_edge.terminal import output as terminal
real, stage = terminal.tell, sys.argv.pop(1)
def tell(text, style=None):
    real(text, style)
    if stage in text:
        time.sleep(120)
terminal.tell = tell
from cobra_edge.export.command import main
main()
"""


def hear_hangups():
    """Who runs these tests under nohup has made their children deaf."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("stage", "source", "signals"),
    [
        ("vision graph", "mini", ["SIGINT"]),
        ("vision graph", "mini", ["SIGTERM"]),
        ("decoder as", None, ["SIGINT"]),
        ("float reference", None, ["SIGINT", "SIGINT", "SIGINT"]),
        ("drift of the finished bundle", None, ["SIGHUP"]),
    ],
)
def test_interrupted_in_the_middle(tmp_path, text_only, stage, source, signals):
    """Real signals to a real process as a stage begins, of which it tells; more of them do not disturb the tidying up.

    Cobra-mini's vision graph takes seconds, the stages of the small model are held up.
    """
    out = tmp_path / "out"
    command = [sys.executable, *(["-m", "cobra_edge.export"] if source else ["-c", PAUSING, stage])]
    command += ["--target", "jetson", "--out", str(out / "bundle"), "--checkpoint", source or str(text_only)]
    command += ["--golden-lines", "16", "--quality", "fast"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hear_hangups)
    said = ""
    while stage not in said:
        line = child.stderr.readline()
        assert line, f"ended before its stage {stage}: {said}"
        said += line
    assert leftovers(out)[0].startswith(".bundle.partial-")
    time.sleep(0.1)
    for name in signals:
        child.send_signal(getattr(signal, name))
        time.sleep(0.02)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err.strip().splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert leftovers(out) is None


def test_nohup_is_respected(tmp_path, text_only):
    command = ["nohup", sys.executable, "-m", "cobra_edge.export", "--target", "jetson", "--out", str(tmp_path / "bundle")]
    command += ["--checkpoint", str(text_only), "--golden-lines", "16", "--quality", "fast"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "decoder as" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGHUP)
    _, err = child.communicate(timeout=600)
    assert child.returncode in (0, 1) and "interrupted" not in err  # 1: random weights drift as they like
    Bundle.open(tmp_path / "bundle")


def test_a_text_only_model_imports_nothing_that_images_need(tmp_path, text_only):
    """Importing timm takes longer than exporting a small model."""
    program = "import sys; from cobra_edge.export.pipeline import export_bundle; "
    program += "from cobra_edge.formats.targets import target_named; from pathlib import Path; "
    program += "export_bundle(sys.argv[1], target_named('cpu'), Path(sys.argv[2]), method='rtn', golden_lines=16); "
    program += "print(sorted({'onnx', 'timm', 'torchvision'} & sys.modules.keys()))"
    command = [sys.executable, "-c", program, str(text_only), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_disk_that_fills_up_with_the_vision_graph(tmp_path):
    """The limit on a file's size is the operating system's own, met by torch's exporter in the middle of writing."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
    limited += "from cobra_edge.export.command import main; main()"
    command = [sys.executable, "-c", limited, "--target", "jetson", "--out", str(tmp_path / "out" / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    assert leftovers(tmp_path / "out") is None


@pytest.mark.parametrize("arguments", [["inspect", "B"], ["inspect", "B", "--json"], ["run", "B", "--prompt", "Hello?"]])
def test_a_reader_who_leaves_is_neither_success_nor_drift(mini_bundle, arguments):
    given = [str(mini_bundle("w4a16-g128")) if a == "B" else a for a in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cobra_edge", *given]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_an_output_that_no_bundle_can_replace(export, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        code, _, err = export(out=out)
        assert code == 2 and "current directory" in err
    assert leftovers(tmp_path / "here") == []


def test_what_may_not_be_read_is_bad_input(monkeypatch, capfd):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret/manifest.json")

    monkeypatch.setattr(export_module, "export_bundle", denied)
    assert run_command(export_module.command, ["--target", "cpu"]) == 2
    assert "/secret/manifest.json: permission denied" in capfd.readouterr().err


def test_a_file_that_cannot_be_read_is_not_called_unwritable(tmp_path):
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "b", force=False, needed_bytes=0):
        (tmp_path / "nowhere").read_bytes()
    assert leftovers(tmp_path) == []


def test_run_streams_or_prints_json(mini_bundle, capfd):
    bundle = str(mini_bundle("w4a16-g128"))
    question = ["--image", IMAGE, "--prompt", "How many objects are there?"]
    assert run_command(run.command, [bundle, *question]) == 0
    text = capfd.readouterr().out
    assert run_command(whole, ["run", bundle, *question, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["text"] + "\n" == text
    assert data["visual_tokens"] == 64 and data["new_tokens"] >= 1 and data["ttft_ms"] > 0
    assert run_command(run.command, [bundle, *question, "--temperature", "0.8", "--top-k", "5", "--seed", "3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--image", IMAGE, "--prompt", " "], 2, "prompt is empty"),
        (["--image", "/nowhere.png", "--prompt", "x"], 2, "cannot be read"),
        (["--image", __file__, "--prompt", "x"], 2, "not an image"),
        (["--image", "/dev/zero", "--prompt", "x"], 2, "not a regular file"),
        (["--image", "/proc/self", "--prompt", "x"], 2, "not a regular file"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens: "),
        (["--prompt", "x", "--device", "cuda"], 3, "no decoder backend runs this bundle"),
        (["--image", IMAGE], 2, "--prompt is missing"),
    ],
)
def test_run_with_bad_input(mini_bundle, capfd, arguments, code, says):
    assert run_command(run.command, [str(mini_bundle("w4a16-g128")), *arguments]) == code
    captured = capfd.readouterr()
    assert says in " ".join(captured.err.split()) and "Traceback" not in captured.err and captured.out == ""


def test_inspect(mini_bundle, tmp_path, capfd):
    bundle = str(mini_bundle("w4a16-g128"))
    assert run_command(inspect.command, [bundle]) == 0
    text = capfd.readouterr().out
    for part in ("cobra-mini", "tensorrt", "decoder.safetensors", "w4a16-g128", "top1_agreement", "total"):
        assert part in text
    assert run_command(inspect.command, [bundle, "--json"]) == 0
    assert 4 < json.loads(capfd.readouterr().out)["bits_per_weight"] < 6
    assert run_command(inspect.command, [str(tmp_path)]) == 2


@pytest.mark.parametrize("width", [60, 80])
def test_inspect_breaks_no_word_and_no_number(mini_bundle, monkeypatch, capfd, width):
    bundle, said = str(mini_bundle("w4a16-g128")), {}
    for columns in (400, width):
        monkeypatch.setattr(inspect, "results", Console(width=columns))
        assert run_command(inspect.command, [bundle]) == 0
        said[columns] = capfd.readouterr().out
    assert set(said[400].split()) <= set(said[width].split())
    assert max(map(len, said[width].splitlines())) <= width


def test_inspect_tells_which_decoders_run_the_bundle_here(mini_bundle, monkeypatch, capfd):
    never = backends.Backend("never", "cuda", lambda bundle: "there is no [GPU]", backends.BACKENDS[0].open)
    runs = [dataclasses.replace(never, name=f"runs{i}", refuses=lambda bundle: None) for i in range(2)]
    monkeypatch.setattr(inspect, "BACKENDS", (never, *runs, dataclasses.replace(runs[0], device="cpu")))
    bundle = str(mini_bundle("w4a16-g128"))
    assert run_command(inspect.command, [bundle]) == 0
    rows = [
        line.split() for line in capfd.readouterr().out.splitlines() if "never" in line or "runs0" in line or "runs1" in line
    ]
    assert [[w for w in row if w.strip("│")] for row in rows] == [
        ["cuda", "never", "no:", "there", "is", "no", "[GPU]"],
        ["cuda", "runs0", "yes,", "default"],
        ["cuda", "runs1", "yes,", "on", "request"],
        ["cpu", "runs0", "yes,", "default"],
    ]
    assert run_command(inspect.command, [bundle, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["decoders"][:2] == [
        {"kernels": "never", "device": "cuda", "refuses": "there is no [GPU]"},
        {"kernels": "runs0", "device": "cuda", "refuses": None},
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capfd):
    assert run_command(whole, [command, "--help"]) == 0
    text = capfd.readouterr().out
    assert "Example:" in text and (command == "bench" or "--debug" in text)


def test_every_command_is_a_module_too():
    for module in ("cobra_edge", *(f"cobra_edge.{name}" for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Usage" in done.stdout
    done = subprocess.run([sys.executable, "-m", "cobra_edge", "exprot"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'exprot'; did you mean 'export'?")


def test_memory_of_the_published_model():
    assert round(state_bytes(COBRA_3B) / 1e6) == 26
    recipe, _ = uniform_recipe(COBRA_3B.mamba, SCHEMES["w4a16-g128"])
    plan = plan_memory(COBRA_3B, recipe, target_named("jetson"))
    assert 1.4e9 < plan.decoder_bytes < 1.7e9 and plan.total_bytes < 8e9
    recipe, _ = uniform_recipe(COBRA_3B.mamba, SCHEMES["fp16"])
    with pytest.raises(InputError, match=r"does not fit Jetson Orin Nano 8GB: 9\.\d\d GB needed .* 8\.00 GB available"):
        plan_memory(COBRA_3B, recipe, target_named("jetson"))


def test_an_unexpected_error_does_not_look_like_drift(monkeypatch, capfd, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(export_module, "export_bundle", broken)
    assert run_command(export_module.command, ["--target", "cpu"]) == 3
    err = capfd.readouterr().err
    assert "unexpected ZeroDivisionError (of all things)" in err and "--debug" in err and "Traceback" not in err
    assert run_command(export_module.command, ["--target", "cpu", "--debug"]) == 3
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    assert run_command(export_module.command, ["--target", "nowhere", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_nothing_in_a_name_is_obeyed(export, tmp_path):
    """Neither rich's markup nor a terminal's escape sequences, wherever they come from."""
    out = tmp_path / "out" / "x[/y]\x1b[31m[red]z"
    code, text, err = export("--scheme", "w8a16-g128", out=out)
    assert code == 0 and "x[/y]\ufffd[31m[red]z" in text and "\x1b[31m[red]" not in text + err
    assert run_command(inspect.command, [str(out)]) == 0
    assert run_command(inspect.command, ["no[/such]\x1b"]) == 2


def test_golden_lines_are_of_every_task():
    from collections import Counter

    from cobra_edge.suite.reader import HELDOUT, read_suite, spread

    lines = read_suite(HELDOUT)
    for wanted in (1, 4, 5, 32, len(lines), len(lines) + 1):
        chosen = spread(lines, wanted)
        counts = Counter(line.task for line in chosen)
        assert len(chosen) == min(wanted, len(lines)) == len(set(chosen))
        assert len(counts) == min(wanted, 5)
        assert wanted > 100 or max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("wanted", [2, 3, 5])
def test_few_lines_are_about_as_many_images(wanted):
    from cobra_edge.suite.line import Line
    from cobra_edge.suite.reader import spread

    lines = [Line(task, image=f"{i}.png", task=task) for i in range(8) for task in "abcdefghijkl"]
    assert len({line.image for line in spread(lines, wanted)}) == wanted


def test_golden_lines_that_could_not_be_judged_are_refused_before_work(tmp_path, capfd):
    given = ["--target", "cpu", "--out", str(tmp_path / "b"), "--scheme", "w8a16-g128", "--golden-lines"]
    for lines, needed in (("4", "kld_mean needs 8, kld_p99 needs 16"), ("8", "kld_p99 needs 16")):
        assert run_command(export_module.command, [*given, lines]) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert f"{lines} golden lines about {lines} images, too few to judge drift by the budget: {needed}" in said
        assert "vision graph" not in said and not (tmp_path / "b").exists()


def test_a_float_model_that_overflows_is_said(export, text_only, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(text_only / "model.safetensors")
    tensors["backbone.norm_f.weight"][:] = 3e38
    save_file(tensors, text_only / "model.safetensors")
    code, _, err = export()
    assert code == 2 and "not finite" in " ".join(err.split()) and "partial" not in err
    assert leftovers(tmp_path / "out") is None


def test_a_disk_that_fills_up_with_the_golden_lines(export, tmp_path, monkeypatch):
    real = SafetensorsWriter.write

    def write(self, name, values):
        if name == "kept_log_probs":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, values)

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    code, _, err = export()
    assert code == 3 and "No space left" in err
    assert leftovers(tmp_path / "out") is None


def test_a_model_too_large_for_its_target_writes_nothing(text_only, tmp_path, monkeypatch, capfd):
    import msgspec

    small = msgspec.structs.replace(target_named("jetson"), memory_gb=0.1, system_gb=0.0999)
    monkeypatch.setattr(export_module, "target_named", lambda name: small)
    arguments = ["--target", "jetson", "--checkpoint", str(text_only), "--out", str(tmp_path / "out" / "b")]
    assert run_command(export_module.command, arguments) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert "does not fit Jetson Orin Nano" in err and "use fewer bits or a larger target" in err
    assert leftovers(tmp_path / "out") is None


def test_two_exports_are_the_same_bytes(export, tmp_path):
    for name in ("a", "b"):
        assert export(out=tmp_path / "out" / name)[0] == 0
    one, two = (Bundle.open(tmp_path / "out" / name).manifest.files for name in ("a", "b"))
    assert one == two


def test_out_of_memory_is_one_line(monkeypatch, capfd):
    def broken(*_, **__):
        raise MemoryError

    monkeypatch.setattr(export_module, "export_bundle", broken)
    assert run_command(export_module.command, ["--target", "cpu"]) == 3
    assert "out of memory" in capfd.readouterr().err


def test_inspect_of_a_target_from_elsewhere(mini_bundle, tmp_path, capfd):
    import shutil

    copy = shutil.copytree(mini_bundle("w4a16-g128"), tmp_path / "b")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"] = "toaster"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert run_command(inspect.command, [str(copy)]) == 0
    assert "toaster, unknown to this installation" in capfd.readouterr().out


def test_a_drift_that_is_no_number_is_never_shipped(export, tmp_path, monkeypatch):
    import msgspec

    real = assemble._measure
    monkeypatch.setattr(assemble, "_measure", lambda *a: msgspec.structs.replace(real(*a), measures={"kld_mean": math.nan}))
    code, _, err = export()
    assert code == 1 and "the drift is not finite (kld_mean)" in " ".join(err.split())
    assert leftovers(tmp_path / "out") is None
