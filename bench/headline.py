"""The README's table and its four reasons; docs/results has the full tables."""

from __future__ import annotations

from cobra_edge.bench.decode_result import CpuDecodeResult
from cobra_edge.bench.serving_result import ServeResult
from cobra_edge.bench.tables import Table

from .builds import DEFAULT, DEFAULT_ON_GPU
from .quality_result import QualityResult, interval_cell

# A few rows: ours at some bits per weight, before the peer to compare with.
HEADLINE = (
    "best, w8a16-g128",
    "llama.cpp Q8_0",
    DEFAULT_ON_GPU,
    DEFAULT,
    "best, 3.5 bits",
    "balanced",
    "fast",
    "llama.cpp Q4_K_M",
    "bitsandbytes nf4",
)


def headline_table(quality: QualityResult) -> Table:
    """Return bits per weight, drift and agreement of HEADLINE."""
    by_label = {row.label: row for row in quality.rows}
    whole = by_label[DEFAULT]
    title = f"cobra-mini on its whole held-out suite: {whole.lines} questions, {whole.images} images."
    rows = []
    for row in (by_label[label] for label in HEADLINE):
        drift = [interval_cell(row.kld_mean, ".1e"), f"{row.top1_agreement.value:.2%}"]
        rows.append([row.label, f"{row.bits_matrices:.2f}", *drift])
    return Table(["build", "bits per weight", "mean KLD from fp16, nats (95 % interval)", "same next token"], rows, title)


def reasons(quality: QualityResult, decode: CpuDecodeResult, server: ServeResult) -> str:
    """Return the four reasons of the front page, with a number each, as a Markdown list."""
    by_label = {row.label: row for row in quality.rows}
    ours, peer = by_label[DEFAULT_ON_GPU], by_label["llama.cpp Q4_K_M"]
    compared = ours.against[peer.label].kld_ratio
    assert compared is not None and server.prefix_reuse_photo is not None
    four = next(row for row in decode.rows if row.scheme == "w4a16-g128")
    own = next(runner for runner in four.runners if runner.name.startswith("cobra_edge"))
    faster = four.ratios[own.name]["decode_at_64_tok_s"].median
    short, long = min(four.contexts), max(four.contexts)
    flat = own.figures[f"decode_{long}_over_{short}"].median
    state_mb = four.prefix_reuse.state_file_bytes / 1e6
    again = server.prefix_reuse_photo.client.speedup.median
    return "\n".join(
        [
            "* **It still answers like the float model, and proves it.** "
            f"At {ours.bits_matrices:.2f} bits per weight the drift is {compared.value:.2f} times that of "
            f"{peer.label} at {peer.bits_matrices:.2f}; `regress` measures it on the device "
            "and fails a build that exceeds its budget.",
            "* **Fast on a plain CPU.** With int8 activations, the default there, the 3.5B shape "
            f"as {four.scheme} decodes "
            f"{faster:.1f} times as fast as {four.peer} on {decode.machine.cores} cores.",
            f"* **Flat in context.** A token after {long:,} others comes at {flat:.3f} times the rate of one after {short}; "
            f"the state of the 3.5B shape takes {state_mb:.0f} MB, whatever was read.",
            f"* **Look once, ask often.** A second question about a photograph starts {again:.0f} times sooner at full size: a "
            "saved state stands for the image.",
        ]
    )
