"""Variants of the API's paths, and 404 messages for other APIs."""

import pytest

from cobra_edge.serve.paths import canonical_path, not_found_message

COMPLETIONS = "/v1/chat/completions"


@pytest.mark.parametrize(
    "path",
    [
        COMPLETIONS,
        "/chat/completions",
        "/v1/chat/completions/",
        "/v1/v1/chat/completions",
        "/v1/chat/completions/chat/completions",
        "/chat/completions/chat/completions",
        "/api/v1/chat/completions",
        "/api/chat/completions",
    ],
)
def test_spellings_of_the_conversation(path):
    assert canonical_path(path) == COMPLETIONS


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("/v1/chat/completions/models", "/v1/models"),
        ("/models/cobra-mini", "/v1/models/cobra-mini"),
        ("/models/a/b", "/v1/models/a/b"),
    ],
)
def test_spellings_of_the_models(path, meant):
    assert canonical_path(path) == meant


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/metrics",
        "/healthz",
        "/page/script.js",
        "/v1/chat",
        "/v2/chat/completions",
        "/v1/chat/completions2",
        "/x/chat/completions",
        "/modelsx",
        "/v1/responses",
        "/api/chat",
        "//chat/completions",
        "/v1/../chat/completions",
    ],
)
def test_other_paths_stay_what_they_are(path):
    assert canonical_path(path) == path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/responses", "Responses API"),
        ("/responses", "Responses API"),
        ("/v1/completions", "text completion"),
        ("/completions", "text completion"),
        ("/completion", "text completion"),
        ("/v1/messages", "Anthropic"),
        ("/v1/embeddings", "embeddings"),
        ("/api/chat", "Ollama"),
        ("/api/generate", "Ollama"),
        ("/api/tags", "Ollama"),
        ("/generate", "Text Generation Inference"),
        ("/v1", "no such path"),
        ("/somewhere", "no such path"),
    ],
)
def test_404_of_other_apis(path, name):
    said = not_found_message("POST", path)
    assert said.startswith(f"POST {path}: ") and name in said
    assert f"POST {COMPLETIONS}" in said and "base URL that ends in /v1" in said


def test_a_path_of_any_length_is_looked_at_in_no_time():
    for path in ("/v1" * 20_000, "/chat/completions" * 4_000 + "x", "/models/" + "/" * 60_000 + "\n"):
        assert canonical_path(path) == path or path.startswith("/models/")
