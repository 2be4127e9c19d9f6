"""The front of the endpoint: OpenAI's addresses for a base and its adapters, behind the key. Imported to serve only."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.exceptions import HTTPException as AnyHTTPException

from cluster.api_key import KeyRequired
from cluster.served import BASE

CPUS = 0.25  # that Ray counts for this front


class Ingress(OpenAiIngress):
    """One engine under many names: the base's, and each adapter's.

    Ray Serve LLM knows adapters of a cloud bucket only, loaded by need as `base:name`. Ours are few, lie on the disk
    and are loaded when the engine starts; it tells them apart by the name of the model in the request.
    """

    def __init__(self, server: DeploymentHandle, names: Sequence[str], eos_ids: Sequence[int]) -> None:
        began = int(time.time())
        self._cards = {name: _card(name, began) for name in names}
        self._eos_ids = list(eos_ids)
        super().__init__(dict.fromkeys(names, server), dict(self._cards))  # pyright: ignore[reportArgumentType]

    async def models(self) -> Response:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All models by name."""
        return JSONResponse({"object": "list", "data": list(self._cards.values())})

    async def model_data(self, model: str) -> Response:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One model."""
        return JSONResponse(self._cards[self._known(model)])

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """An answer to messages, through the chat template of the base's tokenizer, as in training."""
        self._prepare(body)
        return await _answered(super().chat(body, request))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """A continuation of a text as it is."""
        self._prepare(body)
        return await _answered(super().completions(body, request))

    def _prepare(self, body: Any) -> None:
        self._known(body.model)
        # All tokens that ended an answer in training: the engine knows those of the tokenizer and generation_config.
        body.stop_token_ids = sorted({*(body.stop_token_ids or ()), *self._eos_ids})

    def _known(self, name: str | None) -> str:
        if name not in self._cards:
            raise HTTPException(404, f"There is no model {name!r}. There are {', '.join(self._cards)}.")
        return name


ENDPOINTS = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model}"),
    "completions": lambda app: app.post("/v1/completions", response_model=None),
    "chat": lambda app: app.post("/v1/chat/completions", response_model=None),
}


def build_endpoint(config: LLMConfig, names: Sequence[str], eos_ids: Sequence[int], digest: str | None) -> Application:
    """The Serve application: the front, and behind it the engine. `digest` is that of the key; None asks for none."""
    front = make_fastapi_ingress(Ingress, endpoint_map=ENDPOINTS, app=make_app(digest))
    deployment = serve.deployment(
        front, name="front", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": CPUS}
    )
    return deployment.bind(server=build_llm_deployment(config), names=list(names), eos_ids=list(eos_ids))


def make_app(digest: str | None) -> FastAPI:
    """The web application around the ingress. It has no page, no schema, and lets no other site's script in."""
    app = FastAPI(title="Tenfold", docs_url=None, redoc_url=None, openapi_url=None)
    if digest is not None:
        app.add_middleware(KeyRequired, digest=digest)
    app.add_exception_handler(AnyHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    return app


async def _refused(request: Request, error: Any) -> Response:
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return _error(error.status_code, str(error.detail), kind)


async def _malformed(request: Request, error: Any) -> Response:
    first = next(iter(error.errors()), {})
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    return _error(400, f"{where}: {first.get('msg', 'malformed')}".removeprefix(": "), "invalid_request_error")


async def _answered(answer: Awaitable[Response]) -> Response:
    """The engine's answer; what it refused, with its own status; or a failure of ours, of which only the log tells."""
    try:
        return await answer
    except HTTPException:
        raise
    except Exception as error:
        status = getattr(error, "status_code", 500)
        if isinstance(status, int) and 400 <= status < 500:
            return _error(status, str(getattr(error, "message", error)), "invalid_request_error")
        logging.getLogger("ray.serve").exception("a request failed")
        return _error(500, "The server failed at this request; its log says why.", "server_error")


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _card(name: str, created: int) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tenfold",
        "parent": None if name == BASE else BASE,
    }
