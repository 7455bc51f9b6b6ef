"""`bench serve`: clients, aggregation, what it refuses to report, and a short run. No speed is judged here."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from bench.serving_goals import serving_goals_table
from cobra_edge.bench import command as commands
from cobra_edge.bench import serving_command, serving_memory
from cobra_edge.bench.serving_client import Question, Reply, ask, client, image_url, photograph_url
from cobra_edge.bench.serving_load import check_shutdown, load_summary, tail
from cobra_edge.bench.serving_memory import memory_summary, slope
from cobra_edge.bench.serving_prefix_reuse import FIRST, SECOND, Pair, check, summary
from cobra_edge.bench.serving_process import Resident, served
from cobra_edge.bench.serving_result import (
    Clock,
    LoadResult,
    ServedPrefixReuse,
    ServeResult,
    Slope,
    Tail,
    serving_table,
)
from cobra_edge.bench.serving_workload import KINDS, Images, SimulatedClient
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import markdown
from cobra_edge.errors import MachineError
from cobra_edge.terminal.output import run_command

from ..machine_case import MACHINE

USAGE = {"prompt_tokens": 70, "completion_tokens": 2, "total_tokens": 72}
OWN = {"remembered": "image", "queue_ms": 1.0, "ttft_ms": 5.0, "tpot_ms": None}
TEXT = {"choices": [{"index": 0, "delta": {"content": "Yes"}, "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "cobra_edge": OWN}
COUNTS = {"choices": [], "usage": USAGE}


def events(*sent: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in sent] + ["data: [DONE]\n\n"] * done
    return "".join(lines).encode()


def asked(response: Callable[[httpx.Request], httpx.Response], question: Question) -> Reply:
    async def once() -> Reply:
        async with httpx.AsyncClient(transport=httpx.MockTransport(response), base_url="http://server") as connection:
            return await ask(connection, "mini", question)

    return asyncio.run(once())


def test_a_question_is_a_request_in_openai_s_shape() -> None:
    body = Question("And now?", "data:x", (("What?", "A star."),), stream=True, max_tokens=3).body("mini")
    assert body["model"] == "mini" and body["max_tokens"] == 3 and body["stream_options"] == {"include_usage": True}
    first, answer, last = body["messages"]
    assert first["content"][0]["image_url"]["url"] == "data:x" and first["content"][1]["text"] == "What?"
    assert (answer, last) == ({"role": "assistant", "content": "A star."}, {"role": "user", "content": "And now?"})
    assert "stream" not in Question("What?", stream=False).body("mini")


def test_a_stream_is_read_to_its_end() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    content = events(role, TEXT, TEXT, LAST, COUNTS)
    reply = asked(lambda _: httpx.Response(200, content=content), Question("?"))
    assert reply.answered and reply.text == "YesYes" and (reply.prompt_tokens, reply.new_tokens) == (70, 2)
    assert reply.remembered == "image" and reply.server_ttft_ms == 5.0
    assert reply.ttft_ms is not None and 0 < reply.ttft_ms <= reply.latency_ms


def test_an_answer_without_text_has_its_first_token_at_its_end() -> None:
    reply = asked(lambda _: httpx.Response(200, content=events(LAST)), Question("?"))
    assert reply.answered and reply.ttft_ms == reply.latency_ms


@pytest.mark.parametrize(
    ("content", "failure"),
    [
        (events(TEXT, done=False), "without its finish_reason"),
        (events(TEXT, LAST, done=False), r"without its \[DONE\]"),
        (events(TEXT), "without its finish_reason"),
        (events(TEXT, {"error": {"message": "the deadline"}}), "error in the stream: the deadline"),
        (b"data: {half", "neither an answer nor an error .JSONDecodeError"),
    ],
)
def test_a_cut_stream_is_no_answer(content: bytes, failure: str) -> None:
    reply = asked(lambda _: httpx.Response(200, content=content), Question("?"))
    assert not reply.answered and reply.failure is not None
    with pytest.raises(AssertionError, match=failure):
        raise AssertionError(reply.failure)


def test_an_answer_in_one_piece_and_a_refusal_are_read() -> None:
    whole = {"choices": [{"message": {"content": "No"}}], "usage": USAGE, "cobra_edge": OWN}
    reply = asked(lambda _: httpx.Response(200, json=whole), Question("?", stream=False))
    assert reply.answered and (reply.text, reply.ttft_ms, reply.new_tokens) == ("No", None, 2)
    refusal = {"error": {"message": "come again"}}
    reply = asked(lambda _: httpx.Response(429, json=refusal, headers={"Retry-After": "3"}), Question("?"))
    assert (reply.status, reply.retry_after, reply.text, reply.failure) == (429, 3.0, "come again", None)
    reply = asked(lambda _: httpx.Response(500, content=b"<html>"), Question("?"))
    assert reply.status == 500 and reply.failure is not None


def test_no_response_is_told_from_a_refusal() -> None:
    def gone(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    reply = asked(gone, Question("?"))
    assert reply.status == 0 and reply.failure == "ConnectError: refused" and not reply.answered


def test_images_differ_by_number_alone() -> None:
    urls = [image_url(number) for number in (0, 1, 500, 501, 2**32 - 1)]
    assert len(set(urls)) == 5 and urls == [image_url(number) for number in (0, 1, 500, 501, 2**32 - 1)]
    with pytest.raises(ValueError, match="expected 0 to"):
        image_url(2**32)
    images = Images(3)
    new = [images.new() for _ in range(4)]
    assert len({*images.known, *new}) == 7


def test_a_client_asks_all_kinds_and_goes_on_only_from_whole_answers() -> None:
    simulated_client = SimulatedClient(Images(2), random.Random(0))
    seen = set()
    for number in range(200):
        question = simulated_client.next()
        assert all(answer != "lost" for _, answer in question.before)
        seen.add((question.image is None, bool(question.before), question.stream))
        simulated_client.record(question, Reply(200, text="kept") if number % 2 else Reply(429, text="lost", retry_after=1.0))
    assert len(seen) == 2**3 and len(KINDS) == 4


def test_the_same_seed_asks_the_same() -> None:
    one, two = (SimulatedClient(Images(2), random.Random(5)) for _ in range(2))
    assert [one.next() for _ in range(20)] == [two.next() for _ in range(20)]


def pairs(count: int, remembering: bool, first: float = 100.0, second: float = 10.0) -> list[Pair]:
    remembered = "image" if remembering else "nothing"
    return [
        Pair(
            Reply(200, ttft_ms=first + n, server_ttft_ms=first, text="Yes", prompt_tokens=70, remembered="nothing"),
            Reply(200, ttft_ms=second, server_ttft_ms=second, text="No", prompt_tokens=70, remembered=remembered),
            3.0,
        )
        for n in range(count)
    ]


def test_prefix_reuse_is_compared_within_a_round() -> None:
    check(pairs(3, True), pairs(2, False))
    kept = summary(pairs(3, True), 2)
    assert kept.client.speedup == Spread(10.1, 10.0, 10.2)
    assert kept.server.first_ms.high == 100.0 and kept.rounds == 3
    assert kept.http_ms == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, {"text": "Maybe"}, "the prefix cache changes an answer from 'No' to 'Maybe'"),
        (1, {"text": "Maybe"}, "the prefix cache changes an answer from 'Maybe' to 'No'"),
        (0, {"remembered": "nothing"}, "reused 'nothing', expected 'image'"),
        (1, {"remembered": "image"}, "reused 'image', expected 'nothing'"),
        (0, {"prompt_tokens": 71}, "70 and 71 tokens"),
        (0, {"status": 504, "text": "too late"}, "got 504 .too late."),
        (1, {"failure": "cut"}, "got 200 .cut."),
    ],
)
def test_prefix_reuse_that_is_not_as_expected_is_not_reported(which: int, change: dict[str, Any], message: str) -> None:
    both = pairs(2, True), pairs(2, False)
    for name, value in change.items():
        setattr(both[which][1].second, name, value)
    with pytest.raises(MachineError, match=message):
        check(*both)


def test_a_missing_time_is_not_left_out() -> None:
    found = pairs(2, True)
    found[1].second.server_ttft_ms = None
    with pytest.raises(MachineError, match="has no time to first token"):
        summary(found, 1)


def load() -> list[Reply]:
    answered = [
        Reply(200, latency_ms=20.0 * n, ttft_ms=10.0 * n, new_tokens=4, remembered="image", ended=n) for n in range(1, 21)
    ]
    return [*answered, Reply(200, latency_ms=5.0, new_tokens=2, remembered="nothing"), Reply(429, retry_after=1.0)]


def test_a_load_is_summed_up() -> None:
    kept = load_summary(load(), 2.0)
    assert kept.statuses == {"200": 21, "429": 1} and kept.refused == 1 and kept.streamed == 20
    assert (kept.requests_per_s, kept.tokens_per_s) == (10.5, 41.0)
    assert kept.remembered == {"image": 20, "nothing": 1}
    assert kept.ttft_ms == tail([10.0 * n for n in range(1, 21)]) == Tail(105.0, pytest.approx(190.5))
    assert kept.latency_ms.median == 200.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Reply(500, text="oh"), "got 500 .oh., expected 200, or 429"),
        (Reply(503, retry_after=1.0), "got 503"),
        (Reply(429), "got 429 .without a reason., expected 200, or 429 with Retry-After"),
        (Reply(200, failure="a stream without its [DONE]"), "got 200 .a stream without"),
        (Reply(failure="ReadError: "), "got no response .ReadError"),
    ],
)
def test_no_load_is_reported_with_other_replies(other: Reply, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        load_summary([*load(), other], 2.0)


def test_a_load_without_a_stream_has_no_time_to_the_first_token() -> None:
    with pytest.raises(MachineError, match="increase --seconds"):
        load_summary([Reply(200, latency_ms=5.0), Reply(429, retry_after=1.0)], 2.0)


def test_a_slope_is_that_of_the_line_through_all_points() -> None:
    counts = np.array([100.0, 200, 300, 400, 500])
    exact = slope(counts, 7 + 0.002 * counts)
    assert exact == Slope(pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    noisy = 7 + 0.002 * counts + np.array([0.1, -0.1, 0.2, -0.1, 0.0])
    (value, _), covariance = np.polyfit(counts, noisy, 1, cov=True)
    found = slope(counts, noisy)
    assert found.value == pytest.approx(1000 * value)
    assert found.standard_error == pytest.approx(1000 * covariance[0, 0] ** 0.5)


def test_memory_is_summed_up_after_the_warm_up() -> None:
    samples = [(100 * n, Resident(50 + n, 20 + 0.5 * n)) for n in range(1, 5)]
    kept = memory_summary(Resident(40.0, 10.0), samples, [Reply(200, remembered="image")])
    assert (kept.warm_up, kept.requests, kept.before_mib, kept.growth_mib) == (100, 300, 40.0, 3.0)
    assert kept.slope_mib_per_1000["rss"].value == pytest.approx(10)
    assert kept.slope_mib_per_1000["anonymous"].value == pytest.approx(5)
    with pytest.raises(MachineError, match="got 429"):
        memory_summary(Resident(40.0, 10.0), samples, [Reply(429, retry_after=1.0)])


def test_a_shutdown_may_refuse_and_may_not_cut() -> None:
    before, after = {"began": 1.0, "ended": 3.0}, {"began": 2.5, "ended": 3.0}
    whole = [Reply(200, **before), Reply(503, **before), Reply(429, **after), Reply(failure="ConnectError", **after)]
    check_shutdown(whole, 2.0)
    for reply, message in (
        (Reply(200, failure="a stream without its [DONE]", **before), "sent 1.00 s before SIGTERM got 200"),
        (Reply(200, failure="a stream without its [DONE]", **after), "sent 0.50 s after SIGTERM got 200"),
        (Reply(failure="ReadError", began=1.99), "sent 0.01 s before SIGTERM got no response"),
        (Reply(failure="ReadError", **before), "sent 1.00 s before SIGTERM got no response"),
        (Reply(500, text="oh", **after), "got 500"),
    ):
        with pytest.raises(MachineError, match=message):
            check_shutdown([reply], 2.0)


def result(model: str, times: float, load_result: LoadResult | None = None) -> ServeResult:
    clock = Clock(Spread(100.0, 90.0, 110.0), Spread(100 / times, 1.0, 2.0), Spread(times, times, times))
    reuse = ServedPrefixReuse(
        rounds=1,
        images_checked=1,
        prompt_tokens=70,
        questions=(FIRST, SECOND),
        client=clock,
        server=clock,
        http_ms=Spread(2.0, 1.0, 3.0),
    )
    weights = "random" if model == "cobra-3b" else "trained"
    return ServeResult(model=model, weights=weights, scheme="w4a16-g128", prefix_reuse=reuse, load=load_result, machine=MACHINE)


def test_tables_show_what_was_measured_and_what_was_not() -> None:
    found = LoadResult(clients=2, waiting=1, **msgspec.structs.asdict(load_summary(load(), 2.0)))
    both = [result("cobra-mini", 9.9, found), result("cobra-3b", 25.0)]
    table = markdown([serving_table(both)]).splitlines()
    assert "cobra-mini, w4a16-g128 | cobra-3b, random weights, w4a16-g128" in table[2]
    assert "| speedup, a small image (112 × 112) | 9.9 (9.9–9.9) | 25.0 (25.0–25.0) |" in table
    assert "| 2 clients, 2 s: time to first token, ms | 105 / 190 | – |" in table
    assert "| 2 clients, 2 s: HTTP statuses, queue of 1 | 21 × 200, 1 × 429 | – |" in table
    missed, untried, reached, _ = markdown([serving_goals_table(both)]).splitlines()[2:]
    assert missed.endswith(
        "at least 10 times shorter than for the first question | 9.9, **missed** (9.9 by the server's own clock) |"
    )
    assert untried.endswith("| not measured |") and "photograph" in untried
    assert reached.endswith(
        "at least 20 times shorter than for the first question | 25.0, reached (25.0 by the server's own clock) |"
    )
    assert markdown([serving_goals_table([])]).count("not measured") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["BUNDLE", "--shape", "cobra-3b"], "give them instead of BUNDLE"),
        (["BUNDLE", "--bundle-dir", "x"], "give them instead of BUNDLE"),
        (["--shape", "cobra-mimi"], "did you mean 'cobra-mini'"),
        (["--name", "../x"], "is not a valid result name"),
        (["--requests", "100"], "--requests"),
        (["--part", "follow-up"], "follow-up is now called prefix-reuse"),
        (["--part", "lod"], "'lod' is not one of prefix-reuse, load, memory, shutdown"),
        (["BUNDLE"], "BUNDLE"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["serve", *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_text_only_bundle_is_refused(tiny_bundle, capsys) -> None:
    assert run_command(commands.command, ["serve", str(tiny_bundle)]) == 2
    assert "text-only model" in capsys.readouterr().err


def test_a_kept_bundle_of_another_shape_is_refused(tiny_bundle, capsys) -> None:
    assert run_command(commands.command, ["serve", "--shape", "cobra-3b", "--bundle-dir", str(tiny_bundle)]) == 2
    assert "another shape than cobra-3b" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert run_command(commands.command, ["serve"]) == 3
    assert "pip install httpx" in capsys.readouterr().err
    with pytest.raises(MachineError, match="pip install httpx"):
        client("http://server", 1)


def test_a_server_that_does_not_start_says_why(tmp_path) -> None:
    with (
        pytest.raises(MachineError, match=r"exit code 2, last messages: .*no-such-bundle"),
        served(tmp_path / "no-such-bundle"),
    ):
        pass


def test_a_short_run(mini_bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving_command, "_SHUTDOWNS", 1)
    short = ["--rounds", "1", "--clients", "2", "--seconds", "1", "--name", "try"]
    parts = ["--part", "prefix-reuse", "--part", "load", "--part", "shutdown"]
    assert run_command(commands.command, ["serve", str(mini_bundle("w4a16-g128")), *short, *parts]) == 0
    assert "wrote bench/results/try.json" in capsys.readouterr().out
    kept = json.loads((tmp_path / "bench" / "results" / "try.json").read_text())
    assert kept["model"] == "cobra-mini" and kept["prefix_reuse"]["questions"] == [FIRST, SECOND]
    assert kept["prefix_reuse"]["client"]["speedup"]["median"] > 0 and kept["prefix_reuse"]["rounds"] == 1
    assert set(kept["load"]["statuses"]) <= {"200", "429"} and kept["load"]["requests_per_s"] > 0
    assert kept["shutdown"]["exit_code"] == 0 and kept["shutdown"]["rounds"] == 1 and "memory" not in kept
    table = serving_table([msgspec.convert(kept, ServeResult)])
    assert all(isinstance(cell, str) for row in table.rows for cell in row)


def test_memory_is_read_while_a_server_forgets(mini_bundle, monkeypatch) -> None:
    monkeypatch.setattr(serving_memory, "WARM_UP", 40)
    monkeypatch.setattr(serving_memory, "SAMPLE_EVERY", 20)
    seen = []
    kept = serving_memory.measure_memory(mini_bundle("w4a16-g128"), 40, lambda *step: seen.append(step))
    assert [sample.requests for sample in kept.samples] == [40, 60, 80] and kept.requests == 40
    assert kept.evicted > 0 and sum(kept.remembered.values()) == 80
    assert all(0 < sample.anonymous_mib < sample.rss_mib for sample in kept.samples)
    assert seen[-1] == ("memory", 80, 80)


def test_photographs_differ_as_files_and_look_alike() -> None:
    urls = [photograph_url(number) for number in (0, 3, 6)]
    assert len(set(urls)) == 3 and all(url.startswith("data:image/jpeg;base64,") for url in urls)
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]
    assert {p.shape for p in pixels} == {(720, 1280, 3)}
