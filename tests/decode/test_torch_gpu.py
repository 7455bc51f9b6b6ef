"""The decoders in torch on a real GPU, beside plain torch on the processor. Skipped (conftest.py), and counted, without one."""

from __future__ import annotations

import numpy as np
import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.bitsandbytes_codes import why_no_bitsandbytes
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named

from ..conftest import write_text_only
from ..tolerance import assert_close

pytestmark = pytest.mark.gpu

# No width is a power of two, dt_rank is no multiple of 16.
CONFIG = MambaConfig(384, 3, 512, 768, 16, 4, 24, tied=True)
FOREIGN = [s for s in SCHEMES if SCHEMES[s].code_format != "int"]
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, 300).tolist()
# Of the decoder by bitsandbytes beside plain torch over the same codes.
FOREIGN_TOLERANCE = {"bnb-nf4": "float16", "bnb-int8": "bnb-int8"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that exports the bundle of a scheme."""
    root = tmp_path_factory.mktemp("gpu")
    source = str(write_text_only(root / "mamba-tiny", config=CONFIG))

    def made(scheme):
        export_bundle(source, target_named("cpu"), root / scheme, scheme=scheme, method="rtn", golden_lines=16)
        return Bundle.open(root / scheme)

    return made


def both_read(ours, truth, dtype):
    """Read a prompt, every position of another, and go on from there; both states have to agree as well."""
    a, b = ours.new_state(), truth.new_state()
    embeddings = truth.embed(TOKENS)
    assert_close(ours.embed(TOKENS), embeddings, "decoder")
    assert_close(ours.forward(embeddings[:129], a), truth.forward(embeddings[:129], b), "decoder", dtype)
    assert_close(ours.prefill(embeddings[129:130], a), truth.prefill(embeddings[129:130], b), "decoder", dtype)
    assert_close(ours.prefill(embeddings[130:], a), truth.prefill(embeddings[130:], b), "decoder", dtype)
    assert_close(a.ssm, b.ssm, "decoder", dtype)
    assert_close(a.conv, b.conv, "decoder", dtype)
    assert a.n_tokens == b.n_tokens == len(TOKENS)


def both_step(ours, truth, dtype, count=6):
    a, b = ours.new_state(), truth.new_state()
    for token in TOKENS[:count]:
        assert_close(ours.step(token, a), truth.step(token, b), "decoder", dtype)
    assert_close(a.ssm, b.ssm, "decoder", dtype)
    assert_close(a.conv, b.conv, "decoder", dtype)


@pytest.mark.skipif(why_no_bitsandbytes() is not None, reason=f"{why_no_bitsandbytes()}")
@pytest.mark.parametrize("scheme", FOREIGN)
def test_bitsandbytes_reads_its_own_codes(exported, scheme):
    bundle = exported(scheme)
    ours = open_decoder(bundle, "cuda")
    assert ours.name == "bitsandbytes"
    both_read(ours, TorchDecoder(bundle), FOREIGN_TOLERANCE[scheme])
    both_step(ours, TorchDecoder(bundle), FOREIGN_TOLERANCE[scheme])


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g64"])
def test_plain_torch_runs_there_too(exported, scheme):
    bundle = exported(scheme)
    both_read(open_decoder(bundle, "cuda", "torch"), TorchDecoder(bundle), "float32")
