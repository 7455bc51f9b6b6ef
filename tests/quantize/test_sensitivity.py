"""Sensitivity and bit allocation: the knapsack against brute force, the scan against a bundle, budgets, and what is refused."""

import itertools
import json
import math

import msgspec
import numpy as np
import pytest

from cobra_edge import sensitivity as command
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.errors import InputError
from cobra_edge.export import command as export_module
from cobra_edge.formats.model_config import decoder_shapes
from cobra_edge.formats.recipe import MIXED, Recipe, matrix_bits, matrix_weights, uniform_recipe
from cobra_edge.formats.safetensors_file import map_tensors
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize import bit_allocation
from cobra_edge.quantize.bit_allocation import allocate_bits, option_bits, require_reachable, solve
from cobra_edge.quantize.calibration_data import calibration_suite
from cobra_edge.quantize.sensitivity import Sensitivity, candidates, passes, read_sensitivity, scan, write_sensitivity
from cobra_edge.regress.metrics import kl_divergence
from cobra_edge.regress.recipe_eval import RecipeEvaluation
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import CALIBRATION, read_suite, spread
from cobra_edge.terminal.output import run_command

from ..conftest import MINI, MINI_MAMBA, TINY_MAMBA
from ..handmade import write_bundle

LINES = [Line("What is there?", "a red cup", "t"), Line("How many?", "two of them", "t")]
BASE = Recipe(MIXED, "rtn", {}, rotations=("residual", "out-proj"))


def brute(costs, sizes, budget):
    best = (math.inf, None)
    for chosen in itertools.product(*(row for row in costs.values())):
        bits = sum(sizes[n][s] for n, s in zip(costs, chosen, strict=True))
        cost = sum(costs[n][s] for n, s in zip(costs, chosen, strict=True))
        if bits <= budget and cost < best[0]:
            best = cost, chosen
    return best


def test_the_knapsack_is_solved_as_by_brute_force():
    random = np.random.default_rng(0)
    unsolvable = 0
    for _ in range(200):
        names = [str(i) for i in range(random.integers(1, 6))]
        rows = {n: [f"s{i}" for i in range(random.integers(1, 5))] for n in names}
        sizes = {n: {s: int(random.integers(1, 40)) * 24 for s in row} for n, row in rows.items()}
        costs = {n: {s: float(random.exponential()) for s in row} for n, row in rows.items()}
        budget = float(random.uniform(0, 24 * 30 * len(names)))
        expected, chosen = brute(costs, sizes, budget)
        found = solve(costs, sizes, budget)
        if chosen is None:
            unsolvable += 1
            assert found is None
        else:
            assert sum(costs[n][s] for n, s in found.items()) == pytest.approx(expected, rel=1e-12)
            assert sum(sizes[n][s] for n, s in found.items()) <= budget
    assert 0 < unsolvable < 150


def test_a_knapsack_too_fine_for_its_units_still_keeps_the_budget():
    random = np.random.default_rng(1)
    sizes = {str(n): {s: int(random.integers(10**8, 10**9)) for s in "abcd"} for n in range(12)}
    costs = {n: {s: 1e9 / bits for s, bits in row.items()} for n, row in sizes.items()}
    budget = 12 * 4.0e8
    found = solve(costs, sizes, budget)
    spent = sum(sizes[n][s] for n, s in found.items())
    assert budget * 0.95 < spent <= budget


@pytest.fixture
def trial(text_only):
    return RecipeEvaluation(open_checkpoint(str(text_only)), BASE, None, LINES, text_only)


def test_a_trial_measures_what_a_bundle_of_the_same_recipe_answers(text_only, tiny_bundle, tmp_path, trial):
    checkpoint, name = open_checkpoint(str(text_only)), "backbone.layers.1.mixer.in_proj.weight"
    recipe = msgspec.structs.replace(BASE, tensors={name: "w3a16-g64"})
    assert trial.kld(BASE) < 1e-12
    suite, klds = calibration_suite(checkpoint, LINES, text_only), []
    floats = msgspec.structs.replace(BASE, tensors={}, rotations=())
    bundles = [write_bundle(Bundle.open(tiny_bundle), checkpoint, r, tmp_path / str(i)) for i, r in enumerate((floats, recipe))]
    # round_to_nearest by least-error scales is what the method takes; write_bundle takes the plain ones.
    from cobra_edge.quantize.decoder_file import write_decoder

    write_decoder(checkpoint, recipe, bundles[1].directory / "decoder.safetensors", lambda: None)
    for line in suite.lines:
        logits = []
        for bundle in bundles:
            decoder = NumpyDecoder(bundle)
            logits.append(decoder.forward(decoder.embed(line.inputs), decoder.new_state())[line.answer_from :])
        klds.append(kl_divergence(*logits))
    expected = np.concatenate(klds)
    assert trial.positions == len(expected) and trial.lines == 2
    assert trial.kld(recipe) == pytest.approx(expected.mean(), rel=1e-3) and expected.mean() > 1e-6


def test_a_scan_measures_every_matrix_by_every_scheme_that_fits():
    seen = []

    def measure(recipe):
        seen.append(recipe.tensors)
        return math.inf if recipe.tensors.get("backbone.embedding.weight") == "w3a16-g64" else 1.0

    table = scan(MINI_MAMBA, BASE, measure)
    assert len(seen) == passes(MINI_MAMBA) == sum(len(row) for row in table.values()) + 1
    assert all(len(tensors) == 1 for tensors in seen) and "w3a16-g64" not in table["backbone.embedding.weight"]
    assert list(table["backbone.layers.0.mixer.dt_proj.weight"]) == ["w8a16-channel", "float16"]
    assert list(table["backbone.layers.3.mixer.x_proj.weight"])[-1] == "float16" and len(table) == 17
    with pytest.raises(InputError, match="not finite in any"):
        scan(MINI_MAMBA, BASE, lambda recipe: math.inf)


def additive(config):
    """Return costs that fall with the bits, and a measure by which errors of matrices just add up."""
    sizes = option_bits(config, BASE)
    table = {n: {s: (i + 1) / bits for s, bits in row.items()} for i, (n, row) in enumerate(sizes.items())}
    return table, lambda recipe: sum(table[n][s] for n, s in recipe.tensors.items())


def test_an_allocation_keeps_its_budget_and_beats_what_fits_it():
    table, measure = additive(MINI_MAMBA)
    for budget in (3.478, 4.0, 4.3, 7.9, 99.0):
        allocation = allocate_bits(MINI_MAMBA, BASE, table, budget, measure)
        bits = sum(matrix_bits(MINI_MAMBA, msgspec.structs.replace(BASE, tensors=allocation.tensors)).values())
        assert allocation.bits_per_weight == bits / matrix_weights(MINI_MAMBA) <= budget
        expected = solve(table, option_bits(MINI_MAMBA, BASE), budget * matrix_weights(MINI_MAMBA))
        assert allocation.kld <= measure(msgspec.structs.replace(BASE, tensors=expected))
    assert set(allocation.tensors.values()) == {"float16"}  # more than the largest: the best there is


def test_an_allocation_is_chosen_by_its_measured_kld():
    """If errors of two matrices interact, an allocation other than the knapsack's is taken."""
    table, measure = additive(MINI_MAMBA)
    knapsack = solve(table, option_bits(MINI_MAMBA, BASE), 4.0 * matrix_weights(MINI_MAMBA))
    spoilt = "backbone.layers.2.mixer.in_proj.weight"

    def interacting(recipe):
        return measure(recipe) + (1.0 if recipe.tensors[spoilt] == knapsack[spoilt] else 0.0)

    allocation = allocate_bits(MINI_MAMBA, BASE, table, 4.0, interacting)
    assert allocation.tensors[spoilt] != knapsack[spoilt]
    assert allocation.kld < interacting(msgspec.structs.replace(BASE, tensors=knapsack))


def test_the_search_ends_with_its_last_measurement(monkeypatch):
    """Whatever is left to be looked at: of a large model each knapsack takes a second, and thousands would be left."""
    table, measure = additive(MINI_MAMBA)
    events = []
    monkeypatch.setattr(bit_allocation, "solve", lambda *given: events.append("solve") or solve(*given))

    def measured(recipe):
        events.append("measure")
        return measure(recipe)

    allocate_bits(MINI_MAMBA, BASE, table, 4.0, measured)
    assert events.count("measure") == bit_allocation._MOST_MEASURED
    after = len(events) - 1 - events[::-1].index("measure")
    assert "solve" not in events[after:]


def test_a_budget_out_of_reach_is_refused_with_the_least_there_is():
    with pytest.raises(InputError, match=r"at least 3\.353.*w3a16-g64 \(embedding, in_proj.*w8a16-channel \(dt_proj"):
        require_reachable(MINI_MAMBA, BASE, 2.0)
    require_reachable(MINI_MAMBA, BASE, 3.353)


def test_bits_are_those_of_the_file(text_only, tmp_path):
    from cobra_edge.formats.recipe import stored_tensors
    from cobra_edge.quantize.decoder_file import write_decoder

    table, measure = additive(TINY_MAMBA)
    allocation = allocate_bits(TINY_MAMBA, BASE, table, 4.2, measure)
    recipe, file = msgspec.structs.replace(BASE, tensors=allocation.tensors), tmp_path / "decoder.safetensors"
    write_decoder(open_checkpoint(str(text_only)), recipe, file, lambda: None)
    stored = map_tensors(file, [t for entries in stored_tensors(TINY_MAMBA, recipe).values() for t in entries])
    quantized = allocation.tensors
    bits = sum(8 * a.nbytes for n, a in stored.items() if n.removesuffix(".codes").removesuffix(".scales") in quantized)
    weights = sum(
        math.prod(s) for n, s in decoder_shapes(TINY_MAMBA).items() if n.endswith(("proj.weight", "embedding.weight"))
    )
    assert bits / weights == allocation.bits_per_weight <= 4.2 and len(set(allocation.tensors.values())) > 1


@pytest.fixture
def kept(tmp_path):
    """Return a file of sensitivities, and a function that writes it with some fields changed."""
    table, _ = additive(TINY_MAMBA)
    fields = dict(
        schema_version=1, cobra_edge="0", model_id="m", model_sha256="abc", method="rtn", rotations=("residual", "out-proj"),
        activations="float32", activation_percentile=None, lines=1, positions=1, kld=table,
    )  # fmt: skip

    def write(**changed):
        write_sensitivity(Sensitivity(**(fields | changed)), tmp_path / "s.json")
        return tmp_path / "s.json"

    return write


def test_sensitivities_come_back(kept):
    assert read_sensitivity(kept(), TINY_MAMBA, "abc", BASE).kld == additive(TINY_MAMBA)[0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"model_sha256": "def"}, "of another model"),
        ({"method": "gptq"}, "method 'gptq', this export has 'rtn'"),
        ({"rotations": ()}, "rotations"),
        ({"activations": "int8"}, "activations 'int8'"),
        ({"activation_percentile": 99.0}, "activation_percentile"),
        ({"kld": {}}, "has 0 matrices"),
        ({"kld": {n: {} for n in candidates(TINY_MAMBA)}}, "has no KLDs"),
        ({"kld": {n: {"float16": -1.0} for n in candidates(TINY_MAMBA)}}, "negative ones"),
        ({"kld": {n: {"w2a16": 1.0} for n in candidates(TINY_MAMBA)}}, "schemes that do not fit"),
    ],
)
def test_foreign_sensitivities_are_refused(kept, changed, says):
    with pytest.raises(InputError, match=says):
        read_sensitivity(kept(**changed), TINY_MAMBA, "abc", BASE)


def test_a_file_of_something_else_is_no_sensitivities(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}')
    for name in ("x", "nowhere"):
        with pytest.raises(InputError, match=r"cobra_edge\.sensitivity"):
            read_sensitivity(tmp_path / name, TINY_MAMBA, "abc", BASE)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Return a suite of a few calibration lines, images where they are."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = spread(read_suite(CALIBRATION), 10)
    texts = [json.dumps(msgspec.to_builtins(line) | {"image": line.image and str(MINI / line.image)}) for line in lines]
    file.write_text("\n".join(texts))
    return file


def test_the_best_allocation_drifts_no_more_than_the_uniform_recipe_that_fits(few, tmp_path, capfd, sharing):
    choices = ["--method", "gptq", "--rotation", "both", "--calibration", str(few)]
    file, plot = tmp_path / "s.json", tmp_path / "s.png"
    given = ["--checkpoint", "mini", *choices, "--out", str(file), "--plot", str(plot)]
    assert run_command(command.command, given) == 0
    assert "layers.2.x_proj" in capfd.readouterr().out and plot.read_bytes()[1:4] == b"PNG"
    assert run_command(command.command, given) == 2 and "already there" in capfd.readouterr().err

    def exported(*arguments):
        out = tmp_path / "-".join(arguments)
        given = [
            "--target",
            "cpu",
            "--checkpoint",
            "mini",
            *choices,
            *arguments,
            "--golden-lines",
            "32",
            "--out",
            str(out),
            "--json",
        ]
        with sharing():
            assert run_command(export_module.command, given) == 0
        data = json.loads(capfd.readouterr().out)
        return data["bit_allocation"], Bundle.open(out).manifest

    allocation, mixed = exported("--bits", "4.1", "--activations", "float32", "--sensitivity", str(file))
    _, uniform = exported("--scheme", "w3a16-g64")
    assert mixed.recipe.scheme == MIXED and mixed.recipe.tensors == allocation["tensors"] and mixed.recipe.statistics
    bits = sum(matrix_bits(mixed.model.mamba, mixed.recipe).values()) / matrix_weights(mixed.model.mamba)
    assert 3.5 < bits == allocation["bits_per_weight"] <= 4.1
    assert mixed.drift.measures["kld_mean"] < uniform.drift.measures["kld_mean"]
    fits, _ = uniform_recipe(uniform.model.mamba, SCHEMES["w4a16-g128"])
    assert sum(matrix_bits(uniform.model.mamba, fits).values()) / matrix_weights(uniform.model.mamba) > 4.1


def test_costs_are_foretold_without_a_scan(text_only, tmp_path, capfd):
    """The same costs that an export allocates bits by, and nothing is left beside the file."""
    suite, file, plot = tmp_path / "suite.jsonl", tmp_path / "s.json", tmp_path / "s.png"
    suite.write_text("".join(f'{{"prompt": "What is {n}?", "answer": "It is {n}.", "task": "text"}}\n' for n in range(8)))
    given = ["--checkpoint", str(text_only), "--calibration", str(suite), "--out", str(file), "--plot", str(plot)]
    assert run_command(command.command, given) == 0
    assert "guided: expected KLD (nats) with one matrix quantized" in " ".join(capfd.readouterr().out.split())
    costs = json.loads(file.read_bytes())["kld"]
    assert list(costs) == list(candidates(TINY_MAMBA)) and plot.read_bytes()[1:4] == b"PNG"
    assert all(row["float16"] == 0 < row["w8a16-channel" if "dt_proj" in name else "w8a16-g128"] for name, row in costs.items())
    assert {f.name for f in tmp_path.iterdir()} == {text_only.name, "suite.jsonl", "s.json", "s.png"}


def test_lines_without_answers_get_the_models_own(text_only, tmp_path, capfd):
    suite, file = tmp_path / "suite.jsonl", tmp_path / "s.json"
    suite.write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(4)))
    assert run_command(command.command, ["--checkpoint", str(text_only), "--calibration", str(suite), "--out", str(file)]) == 0
    assert "suite.jsonl: 4 answers by the float model" in " ".join(capfd.readouterr().err.split())
    assert {f.name for f in tmp_path.iterdir()} == {text_only.name, "suite.jsonl", "s.json"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bits", "2"), "not possible"),
        (("--bits", "4", "--scheme", "w4a16-g128"), "--bits allocates several; give one of the two"),
        (("--sensitivity", "x"), "--bits 4.0"),
        (("--bits", "0"), "--bits: "),
        (("--bits", "4", "--sensitivity", "/nowhere"), "cobra_edge.sensitivity"),
    ],
)
def test_impossible_allocations(text_only, tmp_path, capfd, arguments, says):
    given = ["--target", "cpu", "--checkpoint", str(text_only), "--method", "rtn", *arguments, "--out", str(tmp_path / "b")]
    assert run_command(export_module.command, given) == 2
    assert says in " ".join(capfd.readouterr().err.split()) and not (tmp_path / "b").exists()


def test_a_plot_without_matplotlib(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    given = ["--checkpoint", "mini", "--out", str(tmp_path / "s"), "--plot", str(tmp_path / "p")]
    assert run_command(command.command, given) == 3 and "pip install" in capfd.readouterr().err
