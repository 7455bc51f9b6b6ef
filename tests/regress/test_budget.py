"""Budgets: what is refused, what a build's limits are, how they are judged, and how today's figures become limits."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cobra_edge.errors import InputError, MachineError
from cobra_edge.regress.budget import Limit, judge, read_budget
from cobra_edge.regress.measures import MEASURES, measure_named
from cobra_edge.regress.report import Figure, TooFew
from cobra_edge.regress.update_budget import LIMITED, update_budget


@pytest.fixture
def budget(tmp_path):
    """Return a function that reads a budget of some text."""

    def read(text):
        (tmp_path / "budget.toml").write_text(text)
        return read_budget(tmp_path / "budget.toml")

    return read


# --- parsing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[schemes.fp16]\nkld_maen = {max = 1.0}", "unknown measure 'kld_maen'; did you mean 'kld_mean'"),
        ("[schemes.fp16]\nkld_mean = {mx = 1.0}", "kld_mean = { mx = 1.0 } is no limit"),
        (
            "[schemes.fp16]\nkld_mean = 0.0001",
            "[schemes.fp16] kld_mean = 0.0001 is no limit; write kld_mean = { max = 0.0001 }",
        ),
        ("[schemes.fp16]\ntop1_agreement = 0.9", "write top1_agreement = { min = 0.9 }"),
        ("[schemes.fp16]\naccuracy.color = {min = 0.5}", 'accuracy.color needs quotes: "accuracy.color" = { min = LIMIT }'),
        ("[targets.x.schemes.fp16]\nkld_mean = true", "[targets.x.schemes.fp16] kld_mean = True is no limit"),
        ("[schemes.fp16]\nkld_mean = {max = '1.0'}", "it needs a finite max, min or max_times_floor; write kld_mean = "),
        ("[schemes.fp16]\nkld_mean = {max = nan}", "kld_mean = { max = nan } is no limit: it needs a finite max"),
        ("[schemes.fp16]\nkld_mean = {max = 1.0, min = -inf}", "needs a finite max"),
        ("[schemes.fp16]\nkld_mean = {}", "kld_mean = {  } is no limit: it needs a finite max"),
        ("[schemes.fp16]\naccuracyy.color = {max = 1.0}", "unknown measure 'accuracyy'"),
        ("[schemes.fp16]\n'kld_mean.color' = {max = 1.0}", "unknown measure 'kld_mean.color'"),
        ("[schemes.fp16]\n'state_error.first' = {max = 1.0}", "unknown measure 'state_error.first'"),
        ("[vision.fp61]\nkld_mean = {max = 1.0}", "fp61"),
        ("[vision.fp16]\nkld_maen = {max = 1.0}", "unknown measure 'kld_maen'"),
        ("[targets.x.schemes.fp16]\nkld_maen = {max = 1.0}", "unknown measure 'kld_maen'"),
        ("[targets.x.shcemes.fp16]\nkld_mean = {max = 1.0}", "`shcemes`"),
        ("[scheme.fp16]", "`scheme`"),
        ("[scheme.fp16]", "its sections are [schemes.SCHEME]"),
        ("[schemes", "not TOML"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_what_is_no_budget_is_refused(tmp_path, text, says):
    file = tmp_path / "budget.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        read_budget(file)
    assert says in str(caught.value) and str(caught.value).startswith(str(file))


def test_a_budget_that_is_not_there():
    with pytest.raises(InputError, match="no such budget; write one .* --budget /nowhere.toml --update-budget"):
        read_budget(Path("/nowhere.toml"))


def test_a_scheme_without_limits_is_refused(budget):
    with pytest.raises(InputError, match=r"no limits for scheme 'w4a16-g12'.*'w4a16-g128'"):
        budget("[schemes.w4a16-g128]").limits_of("w4a16-g12")
    with pytest.raises(InputError, match="no limits for scheme 'fp16'"):  # the one target that has it is another
        budget("[targets.jetson.schemes.fp16]").limits_of("fp16", target="rtx")


# --- limits of a build ------------------------------------------------------------------------------------------------------

PARTS = """
[schemes.fp16]
kld_mean = {max = 0.5, max_times_floor = 3}
top1_agreement = {min = 0.9}
perplexity_ratio = {max = 1.5}
accuracy_change = {min = -0.125}

[vision.int8]
kld_mean = {max = 0.25}
top1_agreement = {min = 0.75}
perplexity_ratio = {max = 2.0}
accuracy_change = {min = -0.25}
kld_p99 = {max = 9.0}
vision_error = {max = 0.125}

[targets.jetson.schemes.fp16]
kld_mean = {max = 1.0}

[targets.jetson.vision.int8]
kld_mean = {max = 4.0}
"""


def test_limits_of_decoder_and_vision_add_up(budget):
    read = budget(PARTS)
    alone = read.limits_of("fp16")
    assert alone["kld_mean"] == Limit(max=0.5, max_times_floor=3.0) and "vision_error" not in alone
    both = read.limits_of("fp16", "int8")
    assert both == {
        "kld_mean": Limit(max=0.75, max_times_floor=3.0),  # times the floor: the scheme's alone
        "top1_agreement": Limit(min=pytest.approx(0.65)),  # 10 % and 25 % of disagreement
        "perplexity_ratio": Limit(max=3.0),
        "accuracy_change": Limit(min=-0.375),
        "vision_error": Limit(max=0.125),
    }  # kld_p99 is the scheme's to judge, which does not
    assert read.limits_of("fp16") == alone  # nothing is added twice
    assert read.limits_of("fp16", "fp32") == alone


def test_a_target_has_its_own(budget):
    read = budget(PARTS)
    assert read.limits_of("fp16", target="jetson")["kld_mean"] == Limit(max=1.0)
    assert read.limits_of("fp16", target="jetson")["top1_agreement"] == Limit(min=0.9)  # measure by measure
    assert read.limits_of("fp16", "int8", "jetson")["kld_mean"] == Limit(max=5.0)
    assert read.limits_of("fp16", "int8", "rtx") == read.limits_of("fp16", "int8")


# --- judging ----------------------------------------------------------------------------------------------------------------


def verdict(figure, limit, floor=None, name="kld_mean"):
    floors = {} if floor is None else {"bf16": {name: floor}, "fp16": {name: 1e9}}
    (found,) = judge({name: figure}, {name: limit}, floors)
    return found


def test_the_worse_end_of_the_interval_is_judged():
    figure = Figure(1.0, 0.5, 2.0)
    assert verdict(figure, Limit(max=2.0)).within and verdict(figure, Limit(min=0.5)).within
    for limit, judged in ((Limit(max=1.5), 2.0), (Limit(min=0.75), 0.5)):
        found = verdict(figure, limit)
        assert not found.within and found.judged == judged
        assert found.note == "its value is within, the bound of its interval is not: use more lines"
    for limit in (Limit(max=0.9), Limit(min=1.1)):
        assert not verdict(figure, limit).within and verdict(figure, limit).note == ""


def test_nothing_is_rounded():
    limit = 0.0123
    assert verdict(Figure(limit), Limit(max=limit)).within
    assert not verdict(Figure(limit * (1 + 1e-15)), Limit(max=limit)).within
    assert not verdict(Figure(0.9999999), Limit(min=1.0)).within


@pytest.mark.parametrize("limit", [Limit(max=1e9), Limit(min=-1e9), Limit(max_times_floor=1e9)])
def test_what_was_not_taken_fails(limit):
    for figures in ({}, {"kld_mean": Figure(None)}):
        (found,) = judge(figures, {"kld_mean": limit}, {"bf16": {"kld_mean": 1.0}})
        assert not found.within and found.judged is None and found.note == "not measured"
        (found,) = judge(figures, {"kld_mean": limit}, {"bf16": {"kld_mean": 1.0}}, {"kld_mean": "no vision encoder"})
        assert not found.within and found.note == "no vision encoder"
    assert not verdict(Figure(float("nan")), limit, 1.0).within


@pytest.mark.parametrize("limit", [Limit(max=1e9), Limit(min=-1e9), Limit(max_times_floor=1e9), Limit(max=0.5)])
def test_too_few_images_do_not_pass(limit):
    """Whatever the value is: it has no evidence."""
    found = verdict(Figure(1.0, too_few=TooFew(4, 16)), limit, 1.0)
    assert not found.within and found.judged is None
    assert found.note == "too few to judge (4 images; 16 needed): use a larger suite, or export with more --golden-lines"


def test_limits_relative_to_the_noise_floor_in_bf16():
    found = verdict(Figure(0.02, 0.01, 0.03), Limit(max_times_floor=4), 0.01)
    assert found.within and (found.limit, found.judged) == (pytest.approx(0.04), 0.03)
    assert found.note == "4 times the reference's own 0.01 in bf16"
    assert not verdict(Figure(0.02, 0.01, 0.05), Limit(max_times_floor=4), 0.01).within
    found = verdict(Figure(0.0), Limit(max_times_floor=4))
    assert not found.within and found.note == "no noise floor of kld_mean in bf16 was measured; export the bundle again"


def test_each_rule_of_a_limit_has_its_verdict():
    found = judge({"length_ratio": Figure(1.0, 0.9, 1.2)}, {"length_ratio": Limit(max=1.1, min=0.8)}, {})
    assert [(v.rule, v.within, v.limit) for v in found] == [("max", False, 1.1), ("min", True, 0.8)]
    assert judge({"kld_mean": Figure(9.0)}, {}, {}) == ()


# --- today's figures as limits ------------------------------------------------------------------------------------------------

BUDGET = """# Reviewed by all of us.

[schemes.fp16]  # the plain one
kld_mean = { max = 1e-5, max_times_floor = 3.0 }
top1_agreement = { min = 0.5 }
kld_p99 = { max = 7.0 }

# Four bits.
[schemes.w4a16-g128]
kld_mean = { max = 0.02 } # nats

[vision.int8]
kld_mean = { max = 5e-4 }
"""
TODAY = {
    "kld_mean": Figure(0.01, 0.008, 0.0123456),
    "top1_agreement": Figure(0.98, 0.9712345, 0.99),
    "perplexity_ratio": Figure(1.01, 0.995, 1.0234567),
    "accuracy": Figure(0.88, 0.84, 0.91),
    "accuracy_change": Figure(-0.01, -0.03, 0.005),
    "state_error": Figure(0.2, 0.1, 0.3),
    "state_error.0": Figure(0.1, 0.05, 0.15),
    "state_error.1": Figure(0.2, 0.1, 0.3),
    "vision_error": Figure(0.004, 0.003, 0.005),
    "greedy_match": Figure(1.0, 1.0, 1.0),
    "kld_p99": Figure(None),
}


def test_todays_figures_and_a_margin(tmp_path):
    file = tmp_path / "budget.toml"
    file.write_text(BUDGET)
    limits = update_budget(file, "fp16", TODAY, {}, 0.25)
    # Of what the section has; distances from the ideal are enlarged and rounded away from it, to three digits.
    assert limits == {
        "kld_mean": Limit(max=0.0155, max_times_floor=3.0),  # 0.01543
        "top1_agreement": Limit(min=0.964),  # 1 - 0.03596
        "kld_p99": Limit(max=7.0),  # not measured
    }
    text = file.read_text()
    for kept in ("# Reviewed by all of us.", "# the plain one", "# Four bits.", "kld_mean = { max = 0.02 } # nats"):
        assert kept in text
    assert dict(read_budget(file).schemes["fp16"]) == limits
    assert read_budget(file).schemes["w4a16-g128"] == {"kld_mean": Limit(max=0.02)}
    assert read_budget(file).vision["int8"] == {"kld_mean": Limit(max=5e-4)}
    assert [f.name for f in tmp_path.iterdir()] == ["budget.toml"]


@pytest.mark.parametrize("before", [None, BUDGET])
def test_a_new_scheme_gets_what_is_gated(tmp_path, before):
    file = tmp_path / "deep" / "budget.toml"
    if before is not None:
        file.parent.mkdir()
        file.write_text(before)
    limits = update_budget(file, "w8a8", TODAY, {}, 0.5)
    assert set(limits) == {
        n for n in (*LIMITED, "state_error.0", "state_error.1") if TODAY.get(n, Figure(None)).value is not None
    }
    assert limits["perplexity_ratio"] == Limit(max=1.0352)  # 1 + 0.02346 · 1.5 = 0.03519
    assert limits["accuracy"] == Limit(min=0.76) and limits["accuracy_change"] == Limit(min=-0.045)
    assert limits["greedy_match"] == Limit(min=1.0) and limits["state_error.0"] == Limit(max=0.225)
    assert dict(read_budget(file).schemes["w8a8"]) == limits
    figures = {name: TODAY[name] for name in limits}
    assert all(v.within for v in judge(figures, read_budget(file).limits_of("w8a8"), {}))


@pytest.mark.parametrize("margin", [0, 0.1, 0.25, 3])
def test_the_same_figures_pass_whatever_they_are(tmp_path, margin):
    """Rounding is away from the ideal, so that no limit is stricter than what was meant; nor much looser."""
    rng, file = np.random.default_rng(0), tmp_path / "budget.toml"
    for _ in range(20):
        figures = {}
        for name, measure in MEASURES.items():
            off = float(10 ** rng.uniform(-12, 1))
            sign = {"low": 1, "high": -1, "near": rng.choice([1, -1])}[measure.better]
            value = measure.ideal + sign * off
            figures[name] = Figure(float(value), float(value - off * 0.3), float(value + off * 0.3))
        file.write_text("[schemes.fp16]\n" + "".join(f"{name} = {{max = 0, min = 0}}\n" for name in figures))
        limits = update_budget(file, "fp16", figures, {}, margin)
        assert set(limits) == set(MEASURES)
        assert all(v.within for v in judge(figures, read_budget(file).limits_of("fp16"), {}))
        for name, limit in limits.items():
            measure = measure_named(name)
            assert (limit.max is None, limit.min is None) == (measure.better == "high", measure.better == "low")
            for end, seen in ((limit.max, figures[name].high), (limit.min, figures[name].low)):
                if end is not None and end != measure.ideal:
                    meant = abs(seen - measure.ideal) * (1 + margin)
                    assert meant - 1e-15 <= abs(end - measure.ideal) <= meant * 1.0101 + 1e-15


def test_no_limit_is_stricter_than_the_reference_is_to_itself(tmp_path):
    floor = {"kld_mean": 0.08, "top1_agreement": 0.75, "vision_error": 1e-9}
    limits = update_budget(tmp_path / "b.toml", "fp16", TODAY, floor, 0.25)
    assert limits["kld_mean"] == Limit(max=0.1) and limits["top1_agreement"] == Limit(min=0.687)
    assert limits["vision_error"] == Limit(max=0.00625)
    perfect = {"kld_mean": Figure(0.0, 0.0, 0.0), "top1_agreement": Figure(1.0, 1.0, 1.0)}
    limits = update_budget(tmp_path / "c.toml", "fp16", perfect, floor, 0)
    assert limits == {"kld_mean": Limit(max=0.08), "top1_agreement": Limit(min=0.75)}


def test_too_few_images_make_no_limit(tmp_path):
    few = {"kld_mean": Figure(0.01, too_few=TooFew(4, 16)), "greedy_match": Figure(0.9, 0.8, 1.0)}
    assert set(update_budget(tmp_path / "new.toml", "fp16", few, {}, 0.25)) == {"greedy_match"}
    (tmp_path / "old.toml").write_text("[schemes.fp16]\nkld_mean = { max = 7.0 }\n")
    assert update_budget(tmp_path / "old.toml", "fp16", few, {}, 0.25) == {"kld_mean": Limit(max=7.0)}


def test_a_better_side_does_not_become_a_limit(tmp_path):
    """A build whose interval lies beyond the ideal may fall back to the ideal."""
    better = {"accuracy_change": Figure(0.05, 0.02, 0.08), "perplexity_ratio": Figure(0.97, 0.95, 0.99)}
    limits = update_budget(tmp_path / "b.toml", "fp16", better, {}, 0.25)
    assert limits == {"accuracy_change": Limit(min=0.0), "perplexity_ratio": Limit(max=1.0)}


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*give another path"):
        update_budget(tmp_path / "file" / "budget.toml", "fp16", TODAY, {}, 0.25)
    with pytest.raises(InputError, match="Is a directory"):
        update_budget(tmp_path, "fp16", TODAY, {}, 0.25)
    (tmp_path / "bad.toml").write_text("[schemes.fp16]\nkld_maen = {max = 1}")
    with pytest.raises(InputError, match="kld_maen"):
        update_budget(tmp_path / "bad.toml", "fp16", TODAY, {}, 0.25)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_directory_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        update_budget(tmp_path / "b.toml", "fp16", TODAY, {}, 0.25)


def test_a_failed_write_leaves_the_old_budget_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "budget.toml"
    file.write_text(BUDGET)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MachineError, match="No space left"):
        update_budget(file, "fp16", TODAY, {}, 0.25)
    assert file.read_text() == BUDGET and [f.name for f in tmp_path.iterdir()] == ["budget.toml"]


def test_without_tomlkit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    with pytest.raises(MachineError, match=r"--update-budget needs tomlkit; install it with: pip install '\.\[regress\]'"):
        update_budget(tmp_path / "b.toml", "fp16", TODAY, {}, 0.25)
