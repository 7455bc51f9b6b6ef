"""The README's table and its four reasons; the pages under docs/results have the full tables."""

from __future__ import annotations

from typing import Any

from .quality_tables import measured

Row = dict[str, Any]

# Few rows that tell the story: what we offer at a number of bits, above the peer that it is compared with.
HEADLINE = (
    "w8a16-g128 gptq, rotated",
    "llama.cpp Q8_0",
    "mixed, 4.3 bits",
    "mixed, 4.0 bits",
    "llama.cpp Q4_K_M",
    "bitsandbytes nf4",
)
DEFAULT = "w4a16-g128"  # what export writes for a Jetson or an RTX GPU without a flag


def headline_table(quality: Row) -> str:
    """Return bits per weight, drift and agreement of the default and of HEADLINE as Markdown."""
    rows = {row["label"]: row for kind in ("ours", "peer") for row in measured(quality, kind)}
    whole = rows[DEFAULT]
    asked = f"cobra-mini on its whole held-out suite: {whole['lines']} questions, {whole['images']} images."
    lines = [
        asked,
        "",
        "| build | bits per weight | mean KLD from fp16, nats (95 % interval) | same next token |",
        "|---|---|---|---|",
    ]
    for label in (DEFAULT, *HEADLINE):
        row = rows[label]
        kld = row["kld_mean"]
        name = f"{label}, the default for Jetson and RTX" if label == DEFAULT else label
        cells = [name, f"{row['bits_matrices']:.2f}", f"{kld['value']:.1e} ({kld['low']:.1e}–{kld['high']:.1e})"]
        lines.append("| " + " | ".join([*cells, f"{row['top1_agreement']['value']:.2%}"]) + " |")
    return "\n".join(lines)


def reasons(quality: Row, decode: Row, server: Row) -> str:
    """Return the four reasons of the front page, a number each, as a Markdown list."""
    rows = {row["label"]: row for kind in ("ours", "peer") for row in measured(quality, kind)}
    ours, peer = rows["mixed, 4.3 bits"], rows["llama.cpp Q4_K_M"]
    ratio = ours["against"][peer["label"]]["kld_ratio"]["value"]
    four = next(r for r in decode["rows"] if r["scheme"] == "w4a16-g128")
    own = next(c["name"] for c in four["runners"] if c["name"].startswith("cobra_edge"))
    faster = four["ratios"][own]["decode_at_64_tok_s"]["median"]
    figures = next(c["figures"] for c in four["runners"] if c["name"] == own)
    short, long = min(four["contexts"]), max(four["contexts"])
    flat = figures[f"decode_{long}_over_{short}"]["median"]
    state_mb = four["prefix_reuse"]["state_file_bytes"] / 1e6
    again = server["prefix_reuse_photo"]["client"]["speedup"]["median"]
    return "\n".join(
        [
            "* **It still answers like the float model, and proves it.** "
            f"At {ours['bits_matrices']:.2f} bits per weight the drift is {ratio:.2f} times that of "
            f"{peer['label']} at {peer['bits_matrices']:.2f}; `regress` measures it on the device "
            "and fails a build that exceeds its budget.",
            f"* **Fast on a plain CPU.** With `--activations int8` the 3.5B shape decodes {faster:.1f} times as fast as "
            f"{four['peer']} on {decode['machine']['cores']} cores.",
            f"* **Flat in context.** A token after {long:,} others comes at {flat:.3f} times the rate of one after {short}; "
            f"the state of the 3.5B shape takes {state_mb:.0f} MB, whatever was read.",
            f"* **Look once, ask often.** A second question about a photograph starts {again:.0f} times sooner at full size: a "
            "saved state stands for the image.",
        ]
    )
