"""The server's routes, and how every error leaves it."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..version import __version__
from .chat_completions import ChatRoute
from .errors import Refusal, refusal_response
from .metrics import Metrics
from .page_route import page_router
from .paths import nothing_here
from .request_errors import not_json, refusal_of
from .scheduler import Scheduler, shutting_down
from .schemas import ErrorResponse, Model, ModelList
from .served_model import ServedModel

log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(chat: ChatRoute) -> FastAPI:
    """Return the application around a route for conversations; its doors are put before it elsewhere."""
    app = FastAPI(
        title="cobra_edge",
        version=__version__,
        summary="Quantized Mamba vision-language models, in the shape of OpenAI's API.",
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,  # to an address made of the Host header: behind a proxy that speaks TLS it is the wrong one
    )
    app.include_router(chat.router())
    app.include_router(_models(chat.model))
    app.include_router(_health_and_metrics(chat.scheduler, chat.metrics))
    app.include_router(page_router())
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    original = app.openapi

    def openapi() -> dict[str, Any]:
        """Return the document without FastAPI's own form of a failed validation, which never leaves this server."""
        document = original()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign] # as FastAPI's documentation has it
    return app


def _models(model: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model=ModelList, summary="The models served", responses=_refusals(401, 403))
    async def models() -> ModelList:
        return ModelList(data=[model.described()])

    @router.get("/v1/models/{name:path}", response_model=Model, summary="One model", responses=_refusals(401, 403, 404))
    async def one(name: str) -> Model:
        model.require(name)
        return model.described()

    return router


def _health_and_metrics(scheduler: Scheduler, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", summary="Whether the process lives", responses=_refusals(403))
    async def healthz() -> dict[str, str]:
        if not scheduler.alive:
            raise Refusal(500, "the decoder's thread has ended; start the server again", "server_error")
        return {"status": "ok"}

    router.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)  # as some balancers ask

    @router.get("/readyz", summary="Whether questions are taken", responses=_refusals(403, 503))
    async def readyz() -> dict[str, str]:
        if not scheduler.open:
            raise shutting_down()
        return {"status": "ready"}

    router.add_api_route("/readyz", readyz, methods=["HEAD"], include_in_schema=False)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get(
        "/metrics", summary="Counts and times, for Prometheus", response_class=Response, responses=text | _refusals(401, 403)
    )
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refusal_response(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    """Answer in the shape of OpenAI's errors: a 400, not FastAPI's 422."""
    assert isinstance(error, RequestValidationError)
    return refusal_response(refusal_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.__cause__ is not None and error.status_code == 400:  # FastAPI met what is not JSON's own kind of error
        return refusal_response(not_json(error.__cause__))
    method, path = request.method, request.url.path
    if error.status_code == 404:
        message = nothing_here(method, path)
    elif error.status_code == 405:
        message = f"{method} {path[:200]}: only {(error.headers or {}).get('Allow', 'another method')} is answered here"
    else:
        message = f"{method} {path[:200]}: {error.detail}"
    headers = error.headers or {}
    return refusal_response(Refusal(error.status_code, message, _CODES.get(error.status_code, "bad_request"), headers=headers))


async def _unexpected(_request: Request, error: Exception) -> Response:
    return refusal_response(Refusal(500, f"unforeseen {type(error).__name__}; the server's log says more", "server_error"))
