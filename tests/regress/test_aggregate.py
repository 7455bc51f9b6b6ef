"""Line metrics and their aggregate: every figure compared with plain numpy over synthetic values."""

import math
import tracemalloc

import msgspec
import numpy as np
import pytest

from cobra_edge.errors import DriftError, InputError
from cobra_edge.regress import intervals
from cobra_edge.regress.aggregate import IMAGES_NEEDED, WORST, Aggregate, kind_of
from cobra_edge.regress.line_metrics import measure_line
from cobra_edge.regress.measures import MEASURES, measure_named
from cobra_edge.regress.predictions import Prediction
from cobra_edge.regress.report import Figure, TooFew
from cobra_edge.regress.top_tokens import TopTokens
from cobra_edge.suite.scoring import METRICS

from .regress_lines import line_metrics, plain_kl, random_log_probs, tokenized_line


def made(count=40, seed=0, text_only=False):
    """Return pairs of lines with drift: three per image, two tasks, answers of two to five tokens."""
    rng, pairs = np.random.default_rng(seed), []
    for number in range(1, count + 1):
        task = ("color", "count")[number % 2]
        image = None if text_only or number % 7 == 0 else number // 3
        tokens = int(rng.integers(2, 6))
        reference = -rng.random(tokens)
        reply, other = ([int(t) for t in rng.integers(0, 3, rng.integers(0, 4))] for _ in range(2))
        reply = other if rng.random() < 0.6 else reply
        line = line_metrics(
            number,
            image,
            prompt_kld=rng.random(int(rng.integers(0, 4))).tolist(),
            answer_kld=(rng.random(tokens) ** 4).tolist(),
            agrees=(rng.random(tokens) < 0.8).tolist(),
            right=(reference + 0.1 * rng.standard_normal(tokens)).clip(max=0).tolist(),
            right_reference=reference.tolist(),
            states=[(rng.random(), 4 + rng.random()), (3 * rng.random(), 8 + rng.random()), (0.1 * rng.random(), 1.0)],
            vision=None if image is None else (0.01 * (image + 1), 2.0 + image),
            reply=reply,
            reference_reply=other,
            text=" ".join(map(str, reply)),
            reference_text=" ".join(map(str, other)),
            score=float(rng.random() < 0.7),
            reference_score=float(rng.random() < 0.8),
            tail=float(rng.random() * 1e-5),
            prompt_tail=float(rng.random()),
            kept=int(rng.integers(8, 20)),
        )
        pairs.append((tokenized_line(number, task, image), line))
    return pairs


def aggregate_of(pairs):
    aggregate = Aggregate()
    for tokenized, line in pairs:
        aggregate.add(tokenized, line)
    return aggregate


def references(lines):
    """Return every measure, by plain sums over all lines."""
    kld = np.concatenate([line.answer_kld for line in lines])
    prompt = np.concatenate([line.prompt_kld for line in lines])
    right, reference = (np.concatenate([getattr(line, of) for line in lines]) for of in ("right", "right_reference"))
    change = np.exp(right) - np.exp(reference)
    states = np.array([line.states for line in lines])  # (lines, layers, 2)
    seen = {line.image: line.vision for line in lines if line.vision is not None}
    prefix = []
    for line in lines:
        same = 0
        while same < min(len(line.reply), len(line.reference_reply)) and line.reply[same] == line.reference_reply[same]:
            same += 1
        longer = max(len(line.reply), len(line.reference_reply))
        prefix.append(1.0 if line.reply == line.reference_reply else same / longer)
    return {
        "kld_mean": kld.mean(),
        "kld_median": np.median(kld),
        "kld_p90": np.quantile(kld, 0.9),
        "kld_p99": np.quantile(kld, 0.99),
        "kld_max": kld.max(),
        "prompt_kld_mean": prompt.mean(),
        "prompt_kld_p99": np.quantile(prompt, 0.99),
        "top1_agreement": np.concatenate([line.agrees for line in lines]).mean(),
        "right_change_mean": change.mean(),
        "right_change_rms": np.sqrt((change**2).mean()),
        "perplexity": np.exp(-right.mean()),
        "perplexity_ratio": np.exp((reference - right).mean()),
        "state_error": np.sqrt((states[..., 0] / states[..., 1]).mean(0)).max(),
        "vision_error": np.sqrt(sum(d for d, _ in seen.values()) / sum(n for _, n in seen.values())) if seen else None,
        "greedy_match": np.mean([line.reply == line.reference_reply for line in lines]),
        "greedy_prefix": np.mean(prefix),
        "length_ratio": sum(len(line.reply) + 1 for line in lines) / sum(len(line.reference_reply) + 1 for line in lines),
        "accuracy": np.mean([line.score for line in lines]),
        "accuracy_change": np.mean([line.score - line.reference_score for line in lines]),
    }


@pytest.mark.parametrize("text_only", [False, True])
def test_every_measure_is_what_plain_sums_say(text_only):
    pairs = made(400, text_only=text_only)
    expected = {name: value for name, value in references([line for _, line in pairs]).items() if value is not None}
    aggregate = aggregate_of(pairs)
    values = aggregate.values()
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert set(expected) == {m for m in MEASURES if MEASURES[m].gate == "absolute"} - ({"vision_error"} if text_only else set())
    figures = aggregate.figures()
    # Those of tasks and layers too: an export judges by a budget that `regress` wrote.
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(values, rel=1e-9)
    assert {"accuracy.color", "accuracy_change.count", "state_error.2"} <= set(values)
    for name, figure in figures.items():
        assert figure.low <= figure.value <= figure.high, name
        if name != "kld_max":
            assert figure.low < figure.high, name
    assert not text_only or "vision_error" not in figures


def test_lines_are_counted():
    pairs = made()
    lines, aggregate = [line for _, line in pairs], aggregate_of(pairs)
    assert aggregate.total("lines") == 40 and aggregate.total("tokens") == sum(len(line.answer_kld) for line in lines)
    assert aggregate.total("prompt_tokens") == sum(len(line.prompt_kld) for line in lines)
    assert aggregate.images == len({(line.image, line.image is None and line.number) for line in lines})
    assert aggregate.largest("prompt_tail") == max(line.prompt_tail for line in lines)
    assert aggregate.largest("tail") == max(line.tail for line in lines)
    assert aggregate.largest("kept") == max(line.kept for line in lines)
    assert aggregate_of(made(text_only=True)).images == 40


def test_intervals_are_of_images():
    """Lines of one image are resampled together, a line without an image alone."""
    lines = [line for _, line in made()]
    groups = {}
    for line in lines:
        groups.setdefault(("text", line.number) if line.image is None else line.image, []).append(line)
    sums = np.array([sum(sum(line.answer_kld) for line in of) for of in groups.values()])
    counts = np.array([sum(len(line.answer_kld) for line in of) for of in groups.values()])
    matches = np.array([sum(line.reply == line.reference_reply for line in of) for of in groups.values()], float)
    each = np.array([float(len(of)) for of in groups.values()])
    gained, lost = (np.array([sum(line.score - line.reference_score == way for line in of) for of in groups.values()], float)
                    for way in (1, -1))  # fmt: skip
    values = [np.concatenate([line.answer_kld for line in of]) for of in groups.values()]
    figures = aggregate_of(made()).figures()
    assert figures["kld_mean"] == Figure.of(intervals.mean(sums, counts))
    assert figures["greedy_match"] == Figure.of(intervals.share(matches, each))
    assert figures["accuracy_change"] == Figure.of(intervals.difference_of_shares(gained, lost, each))
    assert figures["kld_p90"] == Figure.of(intervals.quantile(values, 0.9))
    alone = aggregate_of(
        [(tokenized_line(line.number, image=line.number), line_of(line, line.number)) for line in lines]
    ).figures()
    assert alone["kld_mean"] != figures["kld_mean"] and alone["kld_mean"].value == pytest.approx(figures["kld_mean"].value)


def line_of(line, image):
    return msgspec.structs.replace(line, image=image)


def test_a_resampled_aggregate_is_that_of_a_suite_of_these_images():
    """An image that is drawn twice counts as two images with the same lines."""
    pairs = made()
    keys = list(dict.fromkeys((line.image is None, line.number if line.image is None else line.image) for _, line in pairs))
    images = [3, 0, 3, 5, len(keys) - 1]
    drawn = [
        (tokenized, line_of(line, at))
        for at, image in enumerate(images)
        for tokenized, line in pairs
        if (line.image is None, line.number if line.image is None else line.image) == keys[image]
    ]
    drawn = [(tokenized, msgspec.structs.replace(line, vision=line.vision or (0.0, 0.0))) for tokenized, line in drawn]
    found, expected = aggregate_of(pairs).resampled(images), aggregate_of(drawn)
    assert found.figures() == expected.figures() and found.positions() == expected.positions()
    assert found.total("tokens") == expected.total("tokens") and found.images == 5


def test_memory_is_that_of_the_columns():
    """Texts and lists of a line are forgotten once it is added."""
    line, count = metrics_of_layers(64, text="word " * 2000), 500
    pairs = [(tokenized_line(i, image=i // 4), msgspec.structs.replace(line, number=i, image=i // 4)) for i in range(count)]
    bytes_per_line = 8 * (22 + 64) + 24 * (len(line.prompt_kld) + len(line.answer_kld))
    tracemalloc.start()
    aggregate = aggregate_of(pairs)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert aggregate.total("lines") == count
    assert used < 1.25 * count * bytes_per_line + 65_536  # arrays grow by an eighth; worst lines, names and images


def metrics_of_layers(n_layer, **changes):
    return line_metrics(1, states=[(0.1, 1.0)] * n_layer, prompt_kld=[0.1] * 40, answer_kld=[0.1] * 2, **changes)


def test_tasks_are_figures_of_their_own_lines():
    pairs = made()
    tasks = {task.task: task for task in aggregate_of(pairs).tasks()}
    figures = aggregate_of(pairs).figures()
    assert list(tasks) == ["color", "count"]
    for name, found in tasks.items():
        of = [line for tokenized, line in pairs if tokenized.line.task == name]
        expected = references(of)
        assert found.lines == len(of) and found.metric == "exact" and found.summary == {}
        assert found.score.value == pytest.approx(expected["accuracy"])
        assert found.reference == pytest.approx(np.mean([line.reference_score for line in of]))
        assert found.change.value == pytest.approx(expected["accuracy_change"], abs=1e-12)
        assert found.kld_mean.value == pytest.approx(expected["kld_mean"])
        assert found.greedy_match.value == pytest.approx(expected["greedy_match"])
        assert (figures[f"accuracy.{name}"], figures[f"accuracy_change.{name}"]) == (found.score, found.change)


def test_layers_and_places():
    pairs = made()
    lines, aggregate = [line for _, line in pairs], aggregate_of(pairs)
    states = np.array([line.states for line in lines])
    expected = np.sqrt((states[..., 0] / states[..., 1]).mean(0))
    assert [layer.layer for layer in aggregate.layers()] == [0, 1, 2]
    assert [layer.state_error.value for layer in aggregate.layers()] == pytest.approx(expected)
    figures = aggregate.figures()
    assert [figures[f"state_error.{i}"] for i in range(3)] == [layer.state_error for layer in aggregate.layers()]
    assert figures["state_error"] == figures[f"state_error.{expected.argmax()}"]
    places = {}
    for line in lines:
        for at, value in enumerate(line.prompt_kld):
            places.setdefault(at - len(line.prompt_kld), []).append(value)
        for at, value in enumerate(line.answer_kld):
            places.setdefault(at, []).append(value)
    found = aggregate.positions()
    assert [(p.at, p.tokens) for p in found] == [(at, len(places[at])) for at in sorted(places)]
    assert [p.kld_mean for p in found] == pytest.approx([np.mean(places[at]) for at in sorted(places)])


def test_the_worst_lines_come_first_and_of_equals_the_first():
    pairs = made()
    means = {line.number: np.mean(line.answer_kld) for _, line in pairs}
    worst = aggregate_of(pairs).worst()
    assert [w.number for w in worst] == sorted(means, key=lambda n: -means[n])[:WORST]
    first, by_number = worst[0], {line.number: (tokenized, line) for tokenized, line in pairs}
    tokenized, line = by_number[first.number]
    assert (first.prompt, first.answer, first.task, first.image) == (
        tokenized.line.prompt,
        "Red",
        tokenized.line.task,
        tokenized.line.image,
    )
    assert (first.reply, first.reference_reply) == (line.text, line.reference_text)
    assert (first.kld_mean, first.kld_max) == pytest.approx((np.mean(line.answer_kld), max(line.answer_kld)))
    same = [(tokenized_line(n, image=n), line_metrics(n, n)) for n in range(1, WORST + 5)]
    assert [w.number for w in aggregate_of(same).worst()] == list(range(1, WORST + 1))


@pytest.mark.parametrize(
    ("reply", "reference", "at"),
    [((), (), None), ((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((), (1,), 0), ((1,), (1, 2), 1), ((1, 2, 3), (1, 2), 2)],
)
def test_where_answers_part(reply, reference, at):
    line = line_metrics(1, reply=list(reply), reference_reply=list(reference))
    assert line.diverges_at == at
    found = aggregate_of([(tokenized_line(1), line), (tokenized_line(2, image=1), line_metrics(2, 1))]).values()
    share = 1.0 if at is None else at / max(len(reply), len(reference))
    assert found["greedy_prefix"] == pytest.approx((1 + share) / 2) and found["greedy_match"] == (1.0 if at is None else 0.5)
    assert found["length_ratio"] == pytest.approx((len(reply) + 3) / (len(reference) + 3))


def test_an_answer_right_in_part_counts_in_part():
    """VQA gives 0.3, 0.6, 0.9."""
    rng = np.random.default_rng(0)
    scores, before = rng.choice([0, 0.3, 0.6, 1.0], (2, 30))
    pairs = [
        (tokenized_line(i, "vqa", i), line_metrics(i, i, score=float(a), reference_score=float(b)))
        for i, (a, b) in enumerate(zip(scores, before, strict=True), 1)
    ]
    whole = [(tokenized_line(i, "color", i), line_metrics(i, i)) for i in range(31, 61)]
    figures, one = aggregate_of([*pairs, *whole]).figures(), np.ones(30)
    gained, lost = np.maximum(scores - before, 0), np.maximum(before - scores, 0)
    assert figures["accuracy.vqa"].value == pytest.approx(scores.mean())
    assert figures["accuracy_change.vqa"] == Figure.of(intervals.difference_of_shares(gained, lost, one))
    assert figures["accuracy.color"] == Figure.of(intervals.share(one, one))
    assert figures["accuracy"].value == pytest.approx((scores.sum() + 30) / 60)


def test_a_metric_with_a_summary_gives_it_of_build_and_reference():
    said = [("Yes", "Yes", "Yes"), ("No", "Yes", "No"), ("Yes", "No", "No"), ("Yes", "Yes", "No")]  # right, build, reference
    pairs = []
    for i, (right, build, reference) in enumerate(said, 1):
        tokenized = tokenized_line(i, "exist", i, metric="yes-no")
        tokenized = type(tokenized)(
            i, msgspec.structs.replace(tokenized.line, answer=right), tokenized.prompt, tokenized.answer, i
        )
        scores = {"score": float(build == right), "reference_score": float(reference == right)}
        pairs.append((tokenized, line_metrics(i, i, text=build, reference_text=reference, **scores)))
    (task,) = aggregate_of(pairs).tasks()
    assert METRICS["yes-no"].summary is not None
    assert task.summary == pytest.approx({"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_share": 0.75})
    expected = {"accuracy": 0.5, "precision": 1.0, "recall": 1 / 3, "f1": 0.5, "yes_share": 0.25}
    assert task.reference_summary == pytest.approx(expected)
    assert (task.score.value, task.reference) == (0.5, 0.5)


def test_no_drift_is_ideal():
    pairs = [(tokenized_line(i, image=i), line_metrics(i, i)) for i in range(1, 9)]
    values = aggregate_of(pairs).values()
    assert values.pop("perplexity") == pytest.approx(math.exp(0.1))
    assert values == {name: measure_named(name).ideal for name in values}


def test_one_image_has_no_interval():
    aggregate = aggregate_of([(tokenized_line(i), line_metrics(i)) for i in range(1, 9)])
    assert aggregate.values()["kld_mean"] == 0
    with pytest.raises(InputError, match="image"):
        aggregate.figures()


def test_what_only_one_image_tells_has_a_figure_without_interval():
    """A task of one line, one image among questions about text, one question of more than a token."""
    several = [(tokenized_line(i, "text", None), line_metrics(i, None, prompt_kld=[])) for i in range(2, 40)]
    one = line_metrics(1, 0, prompt_kld=[0.5, 0.25], answer_kld=[1.0, 2.0], score=0.0, vision=(1.0, 4.0), reply=[])
    aggregate = aggregate_of([(tokenized_line(1), one), *several])
    figures, tasks = aggregate.figures(), {task.task: task for task in aggregate.tasks()}
    assert figures["vision_error"] == only(0.5, "root") and figures["prompt_kld_mean"] == only(0.375, "mean")
    assert figures["prompt_kld_p99"] == only(float(np.quantile([0.25, 0.5], 0.99)), "quantile")
    assert (figures["accuracy.color"], figures["accuracy_change.color"]) == (only(0.0, "share"), only(-1.0, "share change"))
    assert (tasks["color"].kld_mean, tasks["color"].greedy_match) == (only(1.5, "mean"), only(0.0, "share"))
    for figure in (figures["kld_mean"], figures["accuracy.text"], tasks["text"].score):
        assert figure.low is not None and figure.high is not None


def only(value, kind):
    return Figure(value, too_few=TooFew(1, IMAGES_NEEDED[kind]))


@pytest.mark.parametrize("name", [m.name for m in MEASURES.values() if m.gate == "absolute" and m.name != "kld_max"])
def test_an_interval_needs_images(name):
    """One fewer than the kind of measure needs, and exactly as many; each image has a line."""
    needed = IMAGES_NEEDED[kind_of(name)]
    lines = [
        (tokenized_line(i, image=i), line_metrics(i, i, prompt_kld=[0.1 * i], answer_kld=[0.1, 0.2 * i])) for i in range(needed)
    ]
    few, enough = aggregate_of(lines[1:]).figures()[name], aggregate_of(lines).figures()[name]
    assert (few.low, few.high, few.too_few) == (None, None, TooFew(needed - 1, needed)) and few.value is not None
    assert str(few.too_few) == f"too few to judge ({needed - 1} images; {needed} needed)"
    assert enough.too_few is None and enough.low <= enough.value <= enough.high


def test_probabilities_have_bounds_and_so_have_their_intervals():
    """Half of the lines lose all of the probability of the right token."""
    lost = [(0.0, -50.0) if i % 2 else (-0.5, -0.5) for i in range(40)]
    pairs = [
        (tokenized_line(i, image=i), line_metrics(i, i, right_reference=[a, a], right=[b, b])) for i, (a, b) in enumerate(lost)
    ]
    wide = dict.fromkeys(IMAGES_NEEDED, 2)
    for count in (2, 3, 40):
        aggregate = Aggregate(wide)
        for tokenized, line in pairs[:count]:
            aggregate.add(tokenized, line)
        figures = aggregate.figures()
        assert -1 <= figures["right_change_mean"].low <= figures["right_change_mean"].high <= 1
        assert 0 <= figures["right_change_rms"].low <= figures["right_change_rms"].high <= 1


def test_a_ratio_beyond_all_bounds_is_still_a_number():
    pairs = [(tokenized_line(i, image=i), line_metrics(i, i, right=[-2000.0, -2000.0])) for i in range(1, 4)]
    values = aggregate_of(pairs).values()
    assert all(map(math.isfinite, values.values())) and values["perplexity_ratio"] > 1e300


# --- one line -------------------------------------------------------------------------------------------------------------


def predictions_of(tokenized, vocab=40):
    rng = np.random.default_rng(tokenized.number)
    positions = len(tokenized.tokens) - 1
    p = random_log_probs(positions, vocab, 3.0, 1)
    q = p + 0.5 * rng.standard_normal(p.shape)
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    state = rng.standard_normal((2, 2, 256)).astype(np.float32)
    seen = rng.standard_normal((2, 4, 8)).astype(np.float32)
    return Prediction(p, state[0], (5, 6), seen[0]), Prediction(q, state[1], (5,), seen[1])


@pytest.mark.parametrize("kept", [False, True])
def test_a_line_compared_by_hand(kept):
    tokenized = tokenized_line(3)
    reference, build = predictions_of(tokenized)
    targets = np.array(tokenized.tokens[1:])
    truth = reference
    if kept:
        truth = Prediction(TopTokens.of(reference.log_probs, targets), reference.state, reference.reply, reference.embeddings)
    line = measure_line(tokenized, truth, build, lambda tokens: {(5, 6): "Green", (5,): "Red"}[tuple(tokens)])
    p, q = reference.log_probs, build.log_probs
    exact = plain_kl(p, q)
    assert line.prompt_kld + line.answer_kld == pytest.approx(exact, abs=1e-5 if kept else 1e-12)
    assert len(line.prompt_kld) == 2 and len(line.answer_kld) == 2  # of three question tokens the last foretells the answer
    assert line.agrees == (p[2:].argmax(-1) == q[2:].argmax(-1)).tolist()
    assert line.right == pytest.approx([q[2, 5], q[3, 0]]) and line.right_reference == pytest.approx(
        [p[2, 5], p[3, 0]], rel=1e-6
    )
    difference = build.state.astype(float) - reference.state
    expected = np.stack([(difference**2).sum(1), (reference.state.astype(float) ** 2).sum(1)], axis=1)
    assert np.allclose(line.states, expected, rtol=1e-6)
    seen = build.embeddings.astype(float) - reference.embeddings
    assert line.vision == pytest.approx(((seen**2).sum(), (reference.embeddings.astype(float) ** 2).sum()))
    assert (line.text, line.reference_text, line.score, line.reference_score) == ("Red", "Green", 1.0, 0.0)
    assert (line.reply, line.reference_reply, line.diverges_at) == ([5], [5, 6], 1)
    assert (line.kept > 0, line.tail > 0) == (kept, kept)


@pytest.mark.parametrize("broken", ["log_probs", "state"])
def test_what_is_not_finite_has_no_distance(broken):
    tokenized = tokenized_line(17)
    reference, build = predictions_of(tokenized)
    getattr(build, broken)[1, 2] = np.nan
    with pytest.raises(DriftError, match="line 17: the build's logits or states are not finite"):
        measure_line(tokenized, reference, build, str)
