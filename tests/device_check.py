"""What `device.sh` runs on the device: logits beside those of the machine that exported, and a server that answers.

python device_check.py BUNDLE IMAGE LOGITS: writes LOGITS if there is none, else compares them.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np

import cobra_edge
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions

QUESTION = "Is there a red circle?"


def logits(directory: Path, seen: np.ndarray) -> dict[str, np.ndarray]:
    """Return the logits (seq, vocab) float32 of a question about an image's embeddings, by activations."""
    bundle = Bundle.open(directory)
    session = cobra_edge.load(bundle)
    tokens = session.codec.encode(session.template.first_turn(QUESTION))
    found = {}
    for activations in ("float32", "int8"):
        decoder = CpuDecoder(bundle, DecoderOptions(activations=activations))
        print(f"kernels {decoder.kernels}, {activations} activations")
        found[activations] = decoder.forward(np.concatenate([seen, decoder.embed(tokens)]), decoder.new_state())
    return found


def compare(directory: Path, image: Path, file: Path) -> None:
    """Write logits, or end this process unless they are those of the file within the table of tolerances."""
    if not file.exists():
        seen = cobra_edge.load(Bundle.open(directory)).visual_embeddings(image)
        np.savez(file, seen=seen, **logits(directory, seen))
        return
    from tolerance import TOLERANCES, distance

    with np.load(file) as theirs:
        for activations, ours in logits(directory, theirs["seen"]).items():
            limits, found = TOLERANCES["decoder", activations], distance(ours, theirs[activations])
            print(f"logits, {activations} activations: relative RMS {found[0]:.1e}, largest {found[1]:.1e}; limits {limits}")
            if found[0] > limits[0] or found[1] > limits[1]:
                sys.exit("device: the logits differ from those of the machine that exported")


def ask_server(directory: Path, image: Path) -> None:
    """Start a server, ask it about the image as an OpenAI client does, and stop it."""
    command = [sys.executable, "-m", "cobra_edge", "serve", str(directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
            url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
            with urllib.request.urlopen(f"{address}/v1/models") as models:
                model = json.load(models)["data"][0]["id"]
            body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}]}).encode()
            headers = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", body, headers)) as answer:
                print("served:", json.load(answer)["choices"][0]["message"]["content"])
        finally:
            server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    bundle, picture, reference = map(Path, sys.argv[1:])
    existed = reference.exists()
    compare(bundle, picture, reference)
    if existed:
        ask_server(bundle, picture)
