"""The plain decoder against transformers' independent implementation."""

import pytest
import torch

from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.model.mamba import Mamba

from ..tolerance import assert_close

CONFIG = MambaConfig(64, 3, 97, 128, 16, 4, 4)


@pytest.fixture(scope="module")
def pair():
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    theirs = MambaForCausalLM(
        TheirConfig(
            vocab_size=CONFIG.vocab,
            hidden_size=CONFIG.d_model,
            num_hidden_layers=CONFIG.n_layer,
            state_size=CONFIG.d_state,
            time_step_rank=CONFIG.dt_rank,
            layer_norm_epsilon=CONFIG.norm_eps,
            residual_in_fp32=True,
            use_mambapy=False,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith(".D") or "A_log" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    ours = Mamba(CONFIG).eval()
    names = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(names)
    return ours, theirs


@pytest.mark.parametrize("length", [1, 63, 129])
@torch.inference_mode()
def test_whole_sequence(pair, length):
    ours, theirs = pair
    tokens = torch.randint(0, CONFIG.vocab, (2, length))
    logits, _ = ours(ours.embed(tokens))
    assert_close(logits.numpy(), theirs(tokens, use_cache=False).logits.numpy(), "decoder")


@pytest.mark.parametrize("length", [1, 63, 129])
@torch.inference_mode()
def test_token_by_token_from_carried_state(pair, length):
    ours, theirs = pair
    tokens = torch.randint(0, CONFIG.vocab, (1, length + 5))
    expected = theirs(tokens, use_cache=False).logits.numpy()
    logits, state = ours(ours.embed(tokens[:, :length]))
    rows = [logits]
    for t in range(length, length + 5):
        logits, state = ours(ours.embed(tokens[:, t : t + 1]), state)
        rows.append(logits)
    assert_close(torch.cat(rows, dim=1).numpy(), expected, "decoder")


@torch.inference_mode()
def test_the_state_has_a_fixed_size_and_is_not_changed_in_place(pair):
    ours, _ = pair
    _, state = ours(ours.embed(torch.randint(0, CONFIG.vocab, (1, 7))))
    before = [t.clone() for t in (*state.conv, *state.ssm)]
    _, after = ours(ours.embed(torch.randint(0, CONFIG.vocab, (1, 40))), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*state.conv, *state.ssm), strict=True))
    assert [t.shape for t in after.ssm] == [t.shape for t in state.ssm]


@torch.inference_mode()
def test_an_image_in_front_is_only_embeddings_in_front(pair):
    ours, _ = pair
    patches, text = torch.randn(1, 9, CONFIG.d_model), torch.randint(0, CONFIG.vocab, (1, 6))
    whole, _ = ours(torch.cat([patches, ours.embed(text)], dim=1))
    _, looked = ours(patches)
    asked, _ = ours(ours.embed(text), looked)
    assert_close(asked.numpy(), whole[:, 9:].numpy(), "decoder")
