"""The API's description in OpenAPI (https://spec.openapis.org/oas/v3.1.0), made from the types of its routes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fedtide.coordinator.api.routes import Route, operation_id, words
from fedtide.fabric.messages.views import Problem

_REF = "#/components/schemas/{model}"
_PROBLEM = "application/problem+json"
MODE: Literal["validation"] = "validation"
"""Also of answers: what writes the tags of unions tells pydantic nothing of their fields."""
Refs = dict[type[BaseModel], dict[str, Any]]


def description(routes: Iterable[Route], version: str) -> dict[str, Any]:
    """The whole document; every path in it is served, and every one that is served is in it."""
    kept = list(routes)
    found, definitions = models_json_schema(
        [(kind, MODE) for kind in sorted(_models(kept), key=str)], ref_template=_REF
    )
    refs: Refs = {kind: schema for (kind, _), schema in found.items() if issubclass(kind, BaseModel)}
    paths: dict[str, dict[str, Any]] = {}
    for route in kept:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fedtide",
            "version": version,
            "summary": "Event-driven federated learning from cloud to edge",
            "description": "Times are UTC, sizes bytes, durations seconds, money decimal strings. "
            "A request that starts something takes an `Idempotency-Key`: the same key starts nothing new.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _models(routes: Iterable[Route]) -> set[type[BaseModel]]:
    return {kind for route in routes for kind in (route.answers, route.body) if kind is not None} | {Problem}


def _operation(route: Route, refs: Refs) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation_id(route),
        "summary": route.summary,
        "tags": [route.path.split("/")[2] if route.path.startswith("/v1/") else "process"],
        "parameters": list(_parameters(route)),
        "responses": {
            str(route.status): {
                "description": route.summary,
                "content": {route.media: {"schema": _answer(route, refs)}},
            },
            "default": {
                "description": "Why not, and what to do next (RFC 9457)",
                "content": {_PROBLEM: {"schema": refs[Problem]}},
            },
        },
    }
    if route.is_open:
        found["security"] = []
    if route.body is not None:
        schema = refs[route.body]
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif route.takes:
        found["requestBody"] = {"required": True, "content": {route.takes: {"schema": {}}}}
    return found


def _answer(route: Route, refs: Refs) -> dict[str, Any]:
    return refs[route.answers] if route.answers is not None else {}


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in words(route):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    if route.query is None:
        return
    schema = route.query.model_json_schema()
    for name, field in schema.get("properties", {}).items():
        inner = {key: value for key, value in field.items() if key not in ("description", "title")}
        told = {"description": field["description"]} if "description" in field else {}
        needed = name in schema.get("required", [])
        yield {"name": name, "in": "query", "required": needed, "schema": _inlined(inner, schema), **told}


def _inlined(value: Any, schema: dict[str, Any]) -> Any:
    """With the definitions that it refers to in their places: parameters have none of their own."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(schema["$defs"][value["$ref"].rsplit("/", 1)[1]], schema)
        return {key: _inlined(each, schema) for key, each in value.items()}
    return [_inlined(each, schema) for each in value] if isinstance(value, list) else value
