"""The bench of kernels, and the finding of tiles: their logic, in Triton's interpreter on tiny shapes. No speed is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from bench import __main__ as commands
from bench import kernel_cases as kernels
from bench import kernel_times, tuning
from bench import tiles as tiles_command
from bench.launches import STEP, recorded
from bench.tile_cases import Call, Case, Cases, grids
from bench.tile_compiling import Task, compile_candidate, tasks_of
from cobra_edge.bench.gpu import Gpu
from cobra_edge.bench.shapes import SHAPES, shape_named
from cobra_edge.bench.spread import Spread
from cobra_edge.decode.cuda.driver import why_no_torch_gpu
from cobra_edge.decode.cuda.kernels.compiling import Compiled
from cobra_edge.decode.cuda.kernels.norm import rms_norm_many, rms_norm_many_reference
from cobra_edge.decode.cuda.kernels.tiles import TILES, Tile, sizes_for, tiles, trying
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.errors import InputError
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.formats.targets import read_toml
from cobra_edge.terminal.output import run_command

CPU = torch.device("cpu")


class Table(msgspec.Struct):
    tile: list[Tile]


TINY = MambaConfig(128, 2, 500, 256, 16, 4, 8)
SMALL = MambaConfig(32, 2, 40, 64, 16, 4, 4)  # for the interpreter; no codes come in blocks so small
interpreted = pytest.mark.skipif(why_no_torch_gpu() is None, reason="there is a GPU: kernels are not interpreted")


def weights_of(scheme: str, config: MambaConfig = TINY):
    recipe, _ = uniform_recipe(config, scheme_named(scheme))
    return kernel_times.random_gpu_weights(config, recipe, CPU)


# --- what is launched, and what it takes


def test_what_a_decoder_launches_is_recorded_without_weights():
    parts = kernels.recorded_shape(shape_named("cobra-3b").mamba, "w4a16-g128")
    assert list(parts) == ["prefill 768", "prefill 16", STEP]
    counted = kernels.counts(parts)
    assert counted[STEP]["_multiply_one"] == 2 * 64 + 1 and counted[STEP]["_recur"] == 64
    assert counted["prefill 768"]["_multiply_many"] == 4 * 64
    assert all(t.is_meta for launch in parts[STEP] for t in launch.arguments if isinstance(t, torch.Tensor))


def test_launches_that_differ_in_the_layer_alone_are_one_group():
    groups = kernels.alike(recorded(weights_of("w4a16-g128"), GpuState.blank(TINY, CPU, None), (5,))[STEP])
    assert sorted(len(g) for g in groups) == [1, 1, 2, 2, 2, 2]  # look-up and head; four a layer
    assert len({id(g[0].arguments[0]) for g in groups if len(g) == 2}) == 4


FITTING = Compiled("k", ("*fp16",), {"num_warps": 4}, "8.7", 64, 1024, 0, 4, 2)


def test_a_kernel_that_spills_more_than_the_bound_is_refused():
    assert kernels.refused(FITTING) is None
    assert kernels.refused(replace(FITTING, spilled_bytes=kernels.MOST_SPILLED_BYTES)) is None
    over = replace(FITTING, spilled_bytes=kernels.MOST_SPILLED_BYTES + 4)
    assert kernels.refused(over) == f"{over.spilled_bytes} bytes a thread spilled, {kernels.MOST_SPILLED_BYTES} are allowed"
    assert "shared memory" in kernels.refused(replace(FITTING, shared_bytes=1 << 20))


def test_sizes_are_written_with_tritons_own_last():
    assert kernels.sizes_text({"num_warps": 4, "ROWS": 8}) == "ROWS=8 num_warps=4"


def run_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bench without an interpreter in the way."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=900)


def test_the_command_compiles_and_keeps_what_it_found(tmp_path):
    done = run_bench(tmp_path, "kernels", "--shape", "cobra-mini", "--capability", "8.7", "--capability", "8.7", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "bench" / "results" / "kernels-compiled.json").read_text())
    (row,) = found["rows"]
    assert row["scheme"] == "w4a16-g128" and row["timed"] is None and found["gpu"] is None
    assert {k["capability"] for k in row["compiled"]} == {"8.7"}
    assert {k["kernel"] for k in row["compiled"]} == {name for part in row["launches"].values() for name in part}
    assert sum(k["launches"] for k in row["compiled"]) == sum(n for part in row["launches"].values() for n in part.values())
    assert all(k["refused"] is None and k["registers"] > 0 for k in row["compiled"])


@interpreted
def test_interpreted_kernels_are_an_error_of_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["kernels", "--shape", "cobra-mini", "--capability", "8.7"]) == 2
    assert "is interpreted and cannot be compiled; unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["kernels", "--shape", "cobra-4b"], 2, "unknown shape 'cobra-4b'"),
        (["kernels", "--scheme", "w5"], 2, "unknown scheme 'w5'"),
        (["kernels", "--scheme", "bnb-nf4"], 2, "codes of bnb-nf4 are run by bitsandbytes' kernels"),
        (["kernels", "--capability", "7.5"], 2, "unknown compute capability '7.5'"),
        (["kernels", "--name", "../x"], 2, "is not a valid result name"),
        (["tiles", "--kernel", "multiply_on"], 2, "tile_grid.toml has no grid for 'multiply_on'; did you mean 'multiply_one'"),
        (["tiles", "--scheme", "bnb-int8"], 2, "codes of bnb-int8 are run by bitsandbytes' kernels"),
    ],
)
def test_each_refusal(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, arguments) == code
    assert message in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


@interpreted
@pytest.mark.parametrize("arguments", [["tiles"], ["kernels", "--device", "cuda"]])
def test_without_a_gpu_there_is_nothing_to_time(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, arguments) == 3
    assert "a GPU cannot be measured" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_kernel_beyond_a_limit_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    over = replace(FITTING, registers=255, shared_bytes=2048, spilled_bytes=4000)
    row = asdict(over) | {"types": ["*fp16"], "refused": kernels.refused(over)}
    monkeypatch.setattr(kernels, "compiled_rows", lambda *_: [row])
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["kernels", "--shape", "cobra-mini", "--capability", "8.7", "--name", "x"]) == 1
    shown = capsys.readouterr().out
    assert "255 / 2 / 4000 !" in shown and "k on 8.7: 4000 bytes a thread spilled" in shown and "not measured" in shown
    assert (tmp_path / "bench" / "results" / "x.json").is_file()


# --- how long it takes: the interpreter stands for the GPU


@interpreted
def test_every_kernel_is_timed_on_buffers_that_hold_something(monkeypatch):
    monkeypatch.setattr(kernel_times, "GpuLimits", lambda gpu: SimpleNamespace(read_bandwidth=lambda: 1e9))
    monkeypatch.setattr(kernel_times, "_repeats", lambda work, gpu: 1)
    weights, state, told = weights_of("fp16", SMALL), GpuState.blank(SMALL, CPU, None), []
    parts = {STEP: recorded(weights, state, ())[STEP]}
    before = weights.layers[0].in_proj.codes.clone()
    rows = kernel_times.measure_kernels(parts, weights, Gpu(CPU), lambda: told.append(1), rounds=1)
    assert len(rows) == len(told) == 6 and torch.equal(weights.layers[0].in_proj.codes, before)
    by_name = {row["kernel"]: row for row in rows}
    assert by_name["_look_up"]["gb_s"] is None  # of the table one row is read
    recur = by_name["_recur"]
    assert recur["launches"] == 2 and recur["microseconds"].median > 0
    assert recur["moved_bytes"] > 2 * 4 * SMALL.d_inner * SMALL.d_state  # with the state, which is no argument
    assert recur["gb_s"] == pytest.approx(recur["moved_bytes"] / recur["microseconds"].median / 1e3)
    assert recur["bandwidth_share"] == pytest.approx(recur["gb_s"])


def test_works_take_turns_and_every_other_round_begins_with_the_last():
    order = []
    works = [lambda name=name: order.append(name) for name in "abc"]
    found = kernel_times.time_in_turns(works, Gpu(CPU), rounds=3)
    assert len(found) == 3 and all(f.low <= f.median <= f.high for f in found)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns).endswith("abccbaabc".replace("cc", "c").replace("aa", "a"))


# --- tiles


@pytest.mark.parametrize(
    ("scheme", "config"), [("w4a16-g128", msgspec.structs.replace(TINY, n_layer=1)), ("fp16", SMALL)], ids=["w4", "fp16"]
)
@interpreted
def test_every_grid_has_a_case_whose_kernel_does_what_its_reference_does(scheme, config):
    cases = Cases(weights_of(scheme, config))
    for grid in grids():
        case = cases.of(grid.kernel, grid.max_tokens)
        if case.kernel in ("convolve_many", "rms_norm_many", "multiply_many") and not grid.max_tokens:
            continue  # 768 tokens take the interpreter minutes; the same functions as with fewer
        now = sizes_for(case.kernel, CPU, case.bits, case.max_tokens or 1 << 30)
        assert tuning._refused(case, now) is None, case.title


def test_grids_name_the_sizes_that_the_table_has():
    """A kernel that is cut in another way than before has to be looked at here, too."""
    for grid in grids():
        assert grid.candidates() and all(isinstance(v, int) for c in grid.candidates() for v in c.values())
        rows = [t for t in tiles() if t.kernel == grid.kernel and t.max_tokens == grid.max_tokens]
        assert rows, f"{grid.kernel}, up to {grid.max_tokens} tokens: no row in tiles.toml"
        assert all(row.sizes.keys() == grid.sizes.keys() for row in rows), grid.kernel


def test_other_sizes_are_tried_and_forgotten():
    now = sizes_for("rms_norm_many", CPU)
    with pytest.raises(KeyboardInterrupt), trying("rms_norm_many", {"num_warps": 32}):
        assert sizes_for("rms_norm_many", CPU) == {"num_warps": 32}
        assert sizes_for("recur_and_gate", CPU) != {"num_warps": 32}
        raise KeyboardInterrupt
    assert sizes_for("rms_norm_many", CPU) == now


def norm_case(function=rms_norm_many):
    def calls():
        return [Call((torch.randn(3, 96), torch.randn(96), 1e-5, torch.full((3, 96), torch.nan)))]

    return Case("rms_norm_many", 0, 0, function, rms_norm_many_reference, calls)


def timed_by(seconds):
    """Return a timer that says what it is told, a value a piece of work that is run once."""

    def timer(works):
        for work in works:
            work()
        return [Spread(s, s, s) for s in seconds[: len(works)]]

    return timer


WARPS = [{"num_warps": n} for n in (1, 2, 4)]


@interpreted
def test_candidates_are_checked_timed_and_compared():
    tried = tuning.tune(norm_case(), WARPS, timed_by([1.0, 0.9, 0.5, 0.7]), lambda work: work, CPU)
    assert [t.sizes for t in tried] == [{"num_warps": 8}, *WARPS]  # what is in use comes first
    assert tuning.best(tried).sizes == {"num_warps": 2}
    assert [t.sizes["num_warps"] for t in tuning.fastest_first(tried)] == [2, 4, 1, 8]


@interpreted
@pytest.mark.parametrize(("fastest", "chosen"), [(0.99, 8), (0.97, 1)])
def test_what_may_be_chance_changes_nothing(fastest, chosen):
    tried = tuning.tune(norm_case(), WARPS[:1], timed_by([1.0, fastest]), lambda work: work, CPU)
    assert tuning.best(tried).sizes["num_warps"] == chosen


def wrong(x, weight, eps, out):
    rms_norm_many(x, weight, eps, out)
    if sizes_for("rms_norm_many", CPU)["num_warps"] == 2:
        out[1] *= 1.1


def unwritten(x, weight, eps, out):
    if sizes_for("rms_norm_many", CPU)["num_warps"] != 2:
        rms_norm_many(x, weight, eps, out)


def failing(x, weight, eps, out):
    if sizes_for("rms_norm_many", CPU)["num_warps"] == 2:
        raise RuntimeError("out of resource: shared memory\nand more")
    rms_norm_many(x, weight, eps, out)


@interpreted
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong, "differs from its reference by"),
        (unwritten, "differs from its reference by nan"),
        (failing, "RuntimeError: out of resource: shared memory"),
    ],
)
def test_what_is_wrong_is_never_timed(function, reason):
    timed = []

    def timer(works):
        timed.extend(works)
        return timed_by([3.0, 2.0, 1.0])(works)

    tried = tuning.tune(norm_case(function), WARPS, timer, lambda work: work, CPU)
    assert len(timed) == 3 and tried[2].seconds is None and tried[2].refused.startswith(reason)
    assert tuning.best(tried).sizes == {"num_warps": 4}
    assert "\n" not in tried[2].refused


@interpreted
def test_what_cannot_be_prepared_is_refused():
    seen = []

    def prepare(work):
        seen.append(work)
        if len(seen) == 2:
            raise RuntimeError("cannot be captured")
        return work

    tried = tuning.tune(norm_case(), WARPS, timed_by([3.0, 2.0, 1.0]), prepare, CPU)
    assert [t.refused for t in tried] == [None, "RuntimeError: cannot be captured", None, None]


def test_where_everything_is_refused_nothing_is_chosen():
    assert tuning.best([tuning.Tried({"a": 1}, None, "no")]) is None
    assert tuning.rows_of([(norm_case(), [tuning.Tried({"a": 1}, None, "no")])], "9.0") == []


def test_an_error_that_nobody_foresaw_is_not_a_refusal():
    def broken(*_):
        raise KeyError("typo")

    with pytest.raises(KeyError):
        tuning._refused(norm_case(broken), {"num_warps": 1})


def test_rows_replace_those_of_the_gpu_and_leave_the_rest(tmp_path):
    file = tmp_path / "tiles.toml"
    file.write_text(
        '# a comment\n\n[[tile]]\nkernel = "a"\n# why\nsizes = { X = 1 } # and so\n\n'
        '[[tile]]\nkernel = "a"\nbits = 4\ncapability = "9.0"\nsizes = { X = 2 }\n\n'
        '[[tile]]\nkernel = "b"\ncapability = "9.0"\nsizes = { X = 3 }\n\n'
        '[[tile]]\nkernel = "a"\nbits = 4\ncapability = "8.7"\nsizes = { X = 4 }\n'
    )
    rows = [Tile("a", {"X": 7, "num_warps": 2}, 4, 0, "9.0"), Tile("a", {"X": 8}, 4, 16, "9.0")]
    tuning.write_rows(file, "9.0", rows)
    text = file.read_text()
    assert text.startswith("# a comment\n") and "# why\n" in text and "# and so" in text
    read = read_toml(file, Table).tile
    assert read[0] == Tile("a", {"X": 1}) and set(map(repr, rows)) <= set(map(repr, read)) and len(read) == 5
    assert Tile("b", {"X": 3}, capability="9.0") in read and Tile("a", {"X": 4}, 4, capability="8.7") in read
    tuning.write_rows(file, "9.0", rows)
    assert sorted(map(repr, read_toml(file, Table).tile)) == sorted(map(repr, read))  # twice is once


def test_rows_can_be_added_to_the_table_there_is(tmp_path):
    file = tmp_path / "tiles.toml"
    shutil.copyfile(TILES, file)
    before = read_toml(file, Table).tile
    tuning.write_rows(file, "8.7", [Tile("recur_and_gate", {"BLOCK_C": 8, "num_warps": 2}, capability="8.7")])
    assert read_toml(file, Table).tile == [*before, Tile("recur_and_gate", {"BLOCK_C": 8, "num_warps": 2}, 0, 0, "8.7")]


@pytest.mark.parametrize("text", ["[[tile", "x = 1\n"])
def test_what_is_no_table_of_tiles_is_refused(text, tmp_path):
    (tmp_path / "tiles.toml").write_text(text)
    with pytest.raises(InputError, match="not a table of tiles"):
        tuning.write_rows(tmp_path / "tiles.toml", "9.0", [])


def test_a_kernel_tuned_for_some_tokens_keeps_its_sizes_for_others():
    """Its own row goes before every other, so it must not be the only one."""
    rows = tuning.complete([Tile("multiply_many", {"OUTS": 1}, 4, 0, "9.0")], grids(), CPU)
    assert {r.max_tokens for r in rows} == {g.max_tokens for g in grids() if g.kernel == "multiply_many"}
    kept = next(r for r in rows if r.max_tokens == 16)
    assert kept.sizes == sizes_for("multiply_many", CPU, 4, 16) and (kept.capability, kept.bits) == ("9.0", 4)


def test_candidates_compile_in_other_processes():
    tasks = tasks_of("cobra-mini", ["w4a16-g128", "w4a16-g128"], [g for g in grids() if g.kernel == "recur_and_gate"], "8.7")
    assert len(tasks) == 16 and all(task.capability == "8.7" for task in tasks)
    program = (
        "from bench.tile_compiling import Task, compile_candidate\n"
        "for block in (16, 17):\n"
        "    sizes = {'BLOCK_C': block, 'num_warps': 1}\n"
        "    print(compile_candidate(Task('cobra-mini', 'w4a16-g128', 'recur_and_gate', 0, sizes, '8.7')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1", "0"], done.stderr  # 17 is no power of two: Triton refuses it


@interpreted
def test_the_command_finds_and_writes(tmp_path, monkeypatch, capsys):
    """With a processor in the GPU's place, and a timer that favours what comes last."""
    from cobra_edge.bench import gpu as gpu_module
    from cobra_edge.decode.cuda.kernels import tiles as tiles_module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SHAPES, "small", SimpleNamespace(mamba=SMALL))
    monkeypatch.setattr(gpu_module, "gpu_here", lambda: Gpu(CPU))
    monkeypatch.setattr(tiles_module, "capability_of", lambda device: "9.0")
    monkeypatch.setattr(
        kernel_times, "time_in_turns", lambda works, gpu: timed_by([1.0 / (i + 1) for i in range(len(works))])(works)
    )
    shutil.copyfile(TILES, tmp_path / "tiles.toml")
    arguments = ["tiles", "--shape", "small", "--scheme", "fp16", "--kernel", "recur_and_gate", "--jobs", "0"]
    assert run_command(commands.command, [*arguments, "--out", "tiles.toml", "--name", "found"]) == 0
    assert "chosen" in capsys.readouterr().out
    written = [t for t in read_toml(tmp_path / "tiles.toml", Table).tile if t.capability == "9.0"]
    assert written == [Tile("recur_and_gate", {"BLOCK_C": 64, "num_warps": 8}, 0, 0, "9.0")]
    found = json.loads((tmp_path / "bench" / "results" / "found.json").read_text())
    assert found["rows"][0]["chosen"] == written[0].sizes and len(found["rows"][0]["tried"]) == 16


@interpreted
def test_no_kernel_is_begun_when_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "small", SimpleNamespace(mamba=SMALL))
    chosen = [g for g in grids() if g.kernel == "recur_and_gate"]
    with tiles_command.progress() as bar:
        assert tiles_command._tuned(SMALL, ("fp16",), chosen, Gpu(CPU), 0.0, bar) == []
    assert "no time left for recur_and_gate; its row stays" in capsys.readouterr().err


def test_tasks_say_what_they_compile():
    task = Task("cobra-mini", "fp16", "scan_many", 0, {"CHUNK": 16, "BLOCK_C": 32, "num_warps": 1}, "9.0")
    assert task in tasks_of("cobra-mini", ["fp16"], grids(), "9.0") and callable(compile_candidate)
