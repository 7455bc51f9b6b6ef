"""Run: ask a bundle about a picture.

python -m cobra_edge.run bundles/cobra-mini-jetson-orin-nano-w4a16-g128 --image scene.png --prompt "Is there a red circle?"
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .decode.backends import DEVICES, KERNELS
from .decode.decoder import ACTIVATIONS, DecoderOptions
from .generate import Sampling
from .session import load
from .terminal import debug_option, main_of, plain, print_json, tell
from .vision.runtimes import RUNTIME_NAMES


@click.command(epilog='Example: python -m cobra_edge.run BUNDLE --image scene.png --prompt "What is in the image?"')
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", type=click.Path(path_type=Path), help="A picture; leave it out for a text-only model.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="The answer's limit.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, default=0, help="Choose among the k likeliest tokens; 0 for all.")
@click.option("--top-p", type=float, default=1.0, help="Choose among the likeliest tokens that hold this share.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same answer.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where it runs.")
@click.option("--decoder-kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help="Which decoder.")
@click.option("--vision-runtime", type=click.Choice(RUNTIME_NAMES), default="auto", show_default=True, help="What sees.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads on a processor; default: one a physical core.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="What enters a product; int8: faster. Default: as the bundle's recipe says.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@debug_option
def command(
    bundle: Path,
    image: Path | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: str,
    decoder_kernels: str,
    vision_runtime: str,
    threads: int | None,
    activations: str | None,
    as_json: bool,
) -> None:
    """Ask BUNDLE a question, about a picture or not, and stream the answer."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    options = DecoderOptions(threads, activations)
    session = load(bundle, device=device, kernels=decoder_kernels, options=options, vision_runtime=vision_runtime)
    if image is None and session.config.vision is not None:
        tell("no --image given: asking about nothing seen")
    answer = session.ask(image, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    for piece in answer:
        if not as_json:
            sys.stdout.write(plain(piece))
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
        return
    print_json({
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "new_tokens": len(answer.tokens),
        "ttft_ms": answer.ttft_ms,
        "tpot_ms": answer.tpot_ms,
        "decoder": session.decoder.name,
        "device": session.decoder.runs_on,
        "vision": None if session.vision is None else session.vision.name,
    })  # fmt: skip


main = main_of(command)

if __name__ == "__main__":
    main()
