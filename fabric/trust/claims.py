"""What is signed of things that travel in messages: exactly these fields, in a form that all versions spell alike."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust.chain import Chain, app_path
from fedtide.fabric.trust.libraries import Signer
from fedtide.fabric.trust.signatures import pae, sign

_APP = "application/vnd.fedtide.app.v1+json"
_PRODUCED = "application/vnd.fedtide.produced.v1+json"


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _blob(ref: BlobRef | None) -> list[str | int] | None:
    return [ref.digest, ref.size_bytes] if ref is not None else None


def app_claim(app: AppRef) -> bytes:
    """What its publisher signs: its name, its bytes, and the wheels that travel with it."""
    wheels = {name: _blob(ref) for name, ref in app.wheels.items()}
    about = {"name": app.name, "bundle": _blob(app.bundle), "requirements": list(app.requirements), "wheels": wheels}
    return pae(_APP, _canonical(about))


def signed_app(app: AppRef, signers: Iterable[Signer]) -> AppRef:
    """The app with the signatures of these keys too."""
    return app.model_copy(update={"signatures": {**app.signatures, **sign(signers, app_claim(app))}})


def publishers_of(chain: Chain, app: AppRef, now: float) -> frozenset[str]:
    """The roles that vouch for an app. Raises Untrusted: none does."""
    return chain.roles_for(app_path(app.name), app_claim(app), app.signatures, now)


def produced_claim(produced: ModelProduced) -> bytes:
    """What an aggregator signs of the model that its run has made."""
    about = {
        "run": produced.run,
        "model": produced.model,
        "base": _blob(produced.base),
        **{name: _blob(getattr(produced, name)) for name in ("onnx", "arrays", "smoke")},
        "parts": [_blob(part) for part in produced.parts],
        "export": produced.export.model_dump(mode="json"),
        "metrics": {name: repr(value) for name, value in produced.metrics.items()},
        "privacy": produced.privacy.model_dump(mode="json") if produced.privacy is not None else None,
    }
    return pae(_PRODUCED, _canonical(about))
