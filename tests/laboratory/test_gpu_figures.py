"""The tables of GPUs, and `bench end-to-end`. No speed is judged here."""

import json

import msgspec
import pytest

from bench import figures
from bench.gpu_goals import end_to_end_table, gpu_goals_table, gpu_table
from bench.gpu_result import (
    AnswerParity,
    GpuKernelsResult,
    GpuParityResult,
    GpuSanitizerResult,
    ImageParity,
    KernelTime,
    SanitizerRun,
    SchemeKernels,
    kernels_tables,
    parity_table,
    sanitizer_table,
)
from cobra_edge.bench import command as commands
from cobra_edge.bench.decode_result import GpuDecodeResult, GpuFacts
from cobra_edge.bench.end_to_end import PUBLISHED_TOK_S, EndToEndResult, measure_end_to_end
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import markdown
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.native.library import why_not
from cobra_edge.errors import InputError, MachineError
from cobra_edge.inference.session import Session
from cobra_edge.terminal.output import progress, run_command

from ..machine_case import MACHINE


def alike(value):
    return {"median": value, "low": value * 0.9, "high": value * 1.1}


def made_up(name="NVIDIA H200", rate=1250.0, times_ssm=3.5, times_bnb=4.5, prefill=1.1, steady=0.99):
    def runner(name, first, **facts):
        speeds = {"decode_at_1024_tok_s": alike(first), "decode_at_1024_share": alike(0.5)}
        return {
            "name": name,
            "weights_bytes": 1_480_000_000,
            "peak_bytes": 2_000_000_000,
            "figures": speeds | facts.pop("figures"),
        } | facts

    own = {"decode_at_65536_tok_s": alike(rate), "decode_65536_over_1024": alike(steady)}
    own |= {"prefill_768_tok_s": alike(9000.0), "prefill_768_peak_share": alike(0.4)}
    prefix_reuse = {"scratch_seconds": alike(0.1), "reuse_seconds": alike(0.01), "speedup": alike(10.0)}
    prefix_reuse |= {"visual_tokens": 729, "question_tokens": 24, "rounds": 3, "state_file_bytes": 0, "part": "decoder"}
    ours = "cobra_edge w4a16-g128"
    row = {
        "batch": 1,
        "new_tokens": 16,
        "state_bytes": 1,
        "rounds": 5,
        "prompt_tokens": [768],
        "contexts": [1024, 65536],
        "limits": {"read_gb_s": alike(4300.0), "peak_macs_per_s": {"float16": alike(350e12)}},
        "runners": [
            runner(ours, rate, figures=own, prefix_reuse=prefix_reuse, scheme="w4a16-g128"),
            runner("transformer fp16", 300.0, figures={}, version="torch 2", contexts_without_memory=[65536]),
            runner("mamba-ssm fp16", 400.0, figures={}, version="mamba-ssm 2"),
        ],
        "ratios": {
            "mamba-ssm fp16": {ours: {"decode_at_1024_tok_s": alike(times_ssm)}},
            "bitsandbytes nf4": {ours: {"decode_at_1024_tok_s": alike(times_bnb)}},
            "cobra_edge fp16": {ours: {"prefill_768_tok_s": alike(prefill)}},
        },
    }
    gpu = {"name": name, "driver": "CUDA 13.0", "bindings": "13.1", "torch": "2.15"}
    machine = msgspec.to_builtins(MACHINE)
    return {"model": "cobra-3b", "weights": "random", "device": "cuda", "gpu": gpu, "rows": [row], "machine": machine}


def made(*given, **changed):
    return msgspec.convert(made_up(*given, **changed), GpuDecodeResult)


def goals(*results):
    return markdown([gpu_goals_table(results)])


def test_the_table_of_a_gpu():
    shown = markdown([gpu_table(made())])
    assert "on NVIDIA H200: batch 1, 5 alternating rounds" in shown and "same run 4300 GB/s" in shown and "700 TFLOP/s" in shown
    lines = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    ours = next(line for line in lines if "w4a16" in line[0] and "1.48" in line[1])
    assert ours[2:6] == ["2.00", "1250.0 (1125.0–1375.0)", "50%", "1250.0 (1125.0–1375.0)"]
    assert "100.0 (90.0–110.0)" in ours and "10.0 (9.0–11.0)" in ours and ours[-1] == "– |"
    assert "| does not fit |" in shown and "mamba-ssm fp16 (mamba-ssm 2)" in shown and shown.count("| 3.50 |") == 1


def test_goals_are_judged_where_they_were_measured():
    assert goals(made()).count(", reached") == 5
    worse = goals(made(rate=999.0, times_ssm=2.9, times_bnb=3.9, prefill=0.9, steady=0.9))
    assert worse.count("**missed**") == 5 and "reached" not in worse
    assert "999, no goal for this GPU" in goals(made("NVIDIA GeForce RTX 4090", rate=999.0))
    alone = made_up()
    alone["rows"][0]["ratios"] = {}
    assert goals(msgspec.convert(alone, GpuDecodeResult)).count("not measured") == 3
    own = made_up()
    own["rows"][0]["ratios"], own["rows"][0]["runners"] = {}, own["rows"][0]["runners"][:1]
    beside = made_up(rate=1.0)  # its own rate counts where there is no other
    assert goals(*(msgspec.convert(each, GpuDecodeResult) for each in (own, beside))).count(", reached") == 5
    both = goals(made(), made("NVIDIA L4")).splitlines()
    assert both[0].endswith("| NVIDIA H200 | NVIDIA L4 |") and len({line.count("|") for line in both}) == 1


def test_pages_say_what_was_not_measured_and_take_results_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    names = ("gpu", "gpu_goals", "gpu_parity", "gpu_kernels", "gpu_sanitizer", "end_to_end", "prediction")
    text = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names)
    empty = figures.with_tables(text)
    assert empty.count("not measured") == 1 + 5 + 1 + 1 + 1 + 3 + 1 and "assumption:" in empty
    assert "| 166.5 |" in empty and "published, not measured here" in empty
    (tmp_path / "gpu-end-to-end-x.json").write_text(json.dumps(answered()))
    (tmp_path / "gpu-peers-mamba-ssm-h200.json").write_text(json.dumps(made_up()))
    (tmp_path / "gpu-parity-h200.json").write_text(json.dumps(msgspec.to_builtins(PARITY)))
    filled = figures.with_tables(text)
    assert "| cobra-3b w4a16-g128 | NVIDIA H200 | 500.0 (450.0–550.0) |" in filled and "1250, reached" in filled
    assert "698 of 700 cases pass, **missed**" in filled


FACTS = GpuFacts(name="NVIDIA H200", driver="CUDA 13.0", bindings="13.1", torch="2.11")
PARITY = GpuParityResult(
    gpu=FACTS,
    machine=MACHINE,
    images=(
        ImageParity(image="sm_90", load_seconds=0.01, passed=698, failed=2, skipped=4, failures=("gemv: NaN",), seconds=40),
        ImageParity(image="compute_80", refused="CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    ),
    answers=(
        AnswerParity(scheme="fp16", lines=8, tokens=100, same=8),
        AnswerParity(scheme="w3a16-g64", lines=8, tokens=99, same=7),
    ),
)


def test_parity_says_what_passed_what_was_refused_and_which_answers_differ():
    shown = markdown([parity_table([PARITY])])
    assert "698 of 700 cases pass, **missed**" in shown and "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in shown
    assert "8 of 8 answers (100 tokens) are the native decoder's, reached" in shown and "7 of 8" in shown
    assert not PARITY.holds
    image = ImageParity(image="sm_90", passed=700)
    good = msgspec.structs.replace(PARITY, images=(image,), answers=PARITY.answers[:1])
    assert good.holds and not msgspec.structs.replace(good, images=()).holds
    assert not msgspec.structs.replace(good, answers=PARITY.answers).holds
    assert not msgspec.structs.replace(good, images=(ImageParity(image="sm_90"),)).holds  # nothing ran


def test_kernels_have_a_share_of_the_bandwidth_where_they_read_weights():
    microseconds = msgspec.convert(alike(5.0), Spread)
    times = [
        KernelTime(
            part="token",
            kernel="gemv_w4",
            role="in_proj",
            launches=64,
            microseconds=microseconds,
            weight_bytes=13_500_000,
            macs=26_214_400,
            gb_s=2700.0,
            bandwidth_share=0.625,
        ),
        KernelTime(
            part="token", kernel="choose_likeliest", role="", launches=1, microseconds=microseconds, weight_bytes=0, macs=0
        ),
    ]
    found = SchemeKernels(
        scheme="w4a16-g128",
        read_gb_s=msgspec.convert(alike(4320.0), Spread),
        parts_ms={"token": microseconds},
        kernels=tuple(times),
    )
    result = GpuKernelsResult(shape="cobra-3b", rounds=5, gpu=FACTS, machine=MACHINE, schemes=(found,))
    shown = markdown(kernels_tables(result))
    assert "| token | `gemv_w4` | in_proj | 64 | 5.0 (4.5–5.5) | 2700 | 62% | 10.5 |" in shown
    assert "| token | `choose_likeliest` | – | 1 | 5.0 (4.5–5.5) | – | – | – |" in shown
    assert "| token | all, one graph | – | – | 5000 (4500–5500) | – | – | – |" in shown and "4320 GB/s" in shown


def test_sanitizers_count_errors_or_say_that_they_came_to_no_end():
    runs = (
        SanitizerRun(tool="memcheck", errors=0, seconds=3),
        SanitizerRun(tool="racecheck", errors=2, seconds=3),
        SanitizerRun(tool="synccheck", errors=None, seconds=20),
    )
    result = GpuSanitizerResult(gpu=FACTS, machine=MACHINE, version="2025.3", runs=runs)
    shown = markdown([sanitizer_table([result, GpuSanitizerResult(gpu=FACTS, machine=MACHINE, version=None)])])
    assert "0 errors, reached" in shown and "2 errors, **missed**" in shown and "came to no end" in shown
    assert "compute-sanitizer | not installed there" in shown


def answered():
    return {
        "model": "cobra-3b",
        "weights": "random",
        "scheme": "w4a16-g128",
        "machine_name": "NVIDIA H200",
        "visual_tokens": 729,
        "prompt_tokens": 20,
        "new_tokens": 256,
        "rounds": 5,
        "figures": {"tok_s": alike(500.0), "encode_seconds": alike(0.1), "first_token_seconds": alike(0.2)},
        "decoder": "cuda",
        "vision_runtime": None,
        "published_tok_s": PUBLISHED_TOK_S,
        "machine": msgspec.to_builtins(MACHINE),
    }


def test_an_answer_about_an_image_is_milliseconds_of_its_parts():
    shown = markdown([end_to_end_table([msgspec.convert(answered(), EndToEndResult)])])
    assert (
        "100.0 (90.0–110.0) | 200.0 (180.0–220.0)" in shown
        and "random weights, 729 + 20 prompt tokens, 256 new tokens" in shown
    )


def test_an_answer_has_the_length_that_was_asked_for_and_its_first_token_comes_after_the_image(mini_bundle):
    session = Session(Bundle.open(mini_bundle("fp16")), "cpu", "numpy")
    taken, step = [], session.decoder.step
    session.decoder.step = lambda token, state: taken.append(state.n_tokens) or step(token, state)
    found = measure_end_to_end(session, 5, 2, progress())
    read = found.visual_tokens + found.prompt_tokens
    assert taken == [read, read + 1, read + 2, read + 3] * 3  # one answer goes before the two that count
    parts = found.figures
    assert 0 < parts.encode_seconds.low < parts.first_token_seconds.low
    assert parts.tok_s.high < 5 / parts.first_token_seconds.low


def test_a_text_only_bundle_has_no_image_to_answer_about(tiny_bundle):
    with pytest.raises(InputError, match="text-only model; give a bundle with a vision graph"):
        measure_end_to_end(Session(Bundle.open(tiny_bundle), "cpu", "numpy"), 2, 1, progress())


def test_the_command_keeps_what_it_found_beside_what_is_published(mini_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [
        "end-to-end",
        str(mini_bundle("fp16")),
        "--device",
        "cpu",
        "--kernels",
        "numpy",
        "--new-tokens",
        "3",
        "--rounds",
        "1",
    ]
    assert run_command(commands.command, [*given, "--weights", "random"]) == 0
    shown = capsys.readouterr().out
    assert "published, not measured here" in shown and "166.5" in shown
    result = json.loads((tmp_path / "bench" / "results" / "cpu-end-to-end-cobra-mini.json").read_text())
    assert result["decoder"] == "numpy" and result["weights"] == "random" and result["scheme"] == "fp16"
    assert result["figures"]["tok_s"]["median"] > 0 and result["published_tok_s"] == 166.5


@pytest.mark.skipif(why_not() is not None, reason=f"no native decoder: {why_not()}")
def test_a_wrong_decoder_is_not_timed_from_end_to_end(mini_bundle, tmp_path, monkeypatch, capsys):
    from cobra_edge.bench import gate

    def refuse(*_arguments):
        raise MachineError("no speed is reported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gate, "check", refuse)
    given = ["end-to-end", str(mini_bundle("fp16")), "--device", "cpu", "--kernels", "native", "--rounds", "1"]
    assert run_command(commands.command, given) == 3
    assert "no speed is reported" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert PUBLISHED_TOK_S == 166.5
