"""The FastAPI application: routes and error handlers."""

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
from .errors import ApiError, error_response
from .metrics import Metrics
from .page_route import page_router
from .paths import not_found_message
from .request_errors import api_error_of, not_json
from .scheduler import Scheduler, shutting_down
from .schemas import ErrorResponse, Model, ModelList
from .served_model import ServedModel
from .watch_route import WatchRoute

log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(chat: ChatRoute, watch: WatchRoute) -> FastAPI:
    """Return the application with these routes; `middleware.stack` wraps it."""
    app = FastAPI(
        title="cobra_edge",
        version=__version__,
        summary="Quantized Mamba vision-language models, in the shape of OpenAI's API.",
        docs_url=None,  # these pages load scripts from a CDN
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,  # the target, made of the Host header, is wrong behind a proxy that terminates TLS
    )
    app.include_router(chat.router())
    app.include_router(watch.router())
    app.include_router(_models(chat.model))
    app.include_router(_health_and_metrics(chat.scheduler, chat.metrics))
    app.include_router(page_router())
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    original = app.openapi

    def openapi() -> dict[str, Any]:
        """Return the document without FastAPI's 422 response, which this server never sends."""
        document = original()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as in FastAPI's documentation
    return app


def _models(model: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model=ModelList, summary="List the models", responses=_error_responses(401, 403))
    async def models() -> ModelList:
        return ModelList(data=[model.to_schema()])

    @router.get(
        "/v1/models/{name:path}", response_model=Model, summary="Get a model", responses=_error_responses(401, 403, 404)
    )
    async def one(name: str) -> Model:
        model.require(name)
        return model.to_schema()

    return router


def _health_and_metrics(scheduler: Scheduler, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", summary="Liveness: the process runs", responses=_error_responses(403))
    async def healthz() -> dict[str, str]:
        if not scheduler.alive:
            raise ApiError(500, "the decoder thread has ended; restart the server", "server_error")
        return {"status": "ok"}

    router.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)  # as some load balancers ask

    @router.get("/readyz", summary="Readiness: requests are accepted", responses=_error_responses(403, 503))
    async def readyz() -> dict[str, str]:
        if not scheduler.open:
            raise shutting_down()
        return {"status": "ready"}

    router.add_api_route("/readyz", readyz, methods=["HEAD"], include_in_schema=False)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses=text | _error_responses(401, 403),
    )
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _validation_error(_request: Request, error: Exception) -> Response:
    """Send 400 in the shape of OpenAI's errors, not FastAPI's 422."""
    assert isinstance(error, RequestValidationError)
    return error_response(api_error_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.__cause__ is not None and error.status_code == 400:  # FastAPI could not parse the body
        return error_response(not_json(error.__cause__))
    method, path = request.method, request.url.path
    if error.status_code == 404:
        message = not_found_message(method, path)
    elif error.status_code == 405:
        message = f"{method} {path[:200]}: method not allowed; use {(error.headers or {}).get('Allow', 'another method')}"
    else:
        message = f"{method} {path[:200]}: {error.detail}"
    headers = error.headers or {}
    return error_response(ApiError(error.status_code, message, _CODES.get(error.status_code, "bad_request"), headers=headers))


async def _unexpected(_request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, f"unexpected {type(error).__name__}; see the server's log", "server_error"))
