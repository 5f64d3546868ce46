"""Verifies a release without a coordinator: its manifest, who vouches for it, and the bytes that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtide.fabric.errors import ConfigError, DigestMismatch
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.messages.views import AttestationView
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.process.files import map_file
from fedtide.fabric.tensors.blobs import chunked, manifest_of
from fedtide.fabric.trust import provenance
from fedtide.fabric.trust.chain import Chain, Files
from fedtide.fabric.trust.provenance import Attested

ONNX, MANIFEST, ATTESTATION, TRUST = FILES = ("model.onnx", "manifest.json", "attestation.json", "trust.json")


@dataclass(frozen=True, slots=True)
class Verified:
    """`as_of`: when the metadata were vouched for by which the signatures were judged, seconds since the epoch."""

    manifest: ReleaseManifest
    attested: Attested
    as_of: float


def write(folder: Path, view: AttestationView, onnx: bytes) -> None:
    """A copy of a release that can be verified anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ONNX).write_bytes(onnx)
    (folder / MANIFEST).write_text(view.manifest, encoding="utf-8")
    (folder / ATTESTATION).write_text(view.envelope, encoding="utf-8")
    (folder / TRUST).write_text(view.trust.model_dump_json(), encoding="utf-8")


def verified(folder: Path, root: str) -> Verified:
    """A copy of a release, by the metadata that lie beside it.

    Args:
        root: whom the reader believes: metadata of a root of the installation.

    Raises:
        ConfigError: a file is missing.
        Untrusted: who may vouch for it has not; DigestMismatch: the bytes are others.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
        envelope = (folder / ATTESTATION).read_text(encoding="utf-8")
        trust = TrustMetadata.model_validate_json((folder / TRUST).read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(str(folder), f"is no copy of a release: {exc}", "fedtide model pull --folder") from exc
    found = judged(manifest, envelope, trust, root)
    check_onnx(found.manifest, folder / ONNX)
    return found


def judged(manifest: bytes, envelope: str, trust: TrustMetadata, root: str) -> Verified:
    """Who vouches for a manifest, as of the day of the metadata. Raises Untrusted, MalformedMessage."""
    first = Chain(Files(root))
    offered = trust.model_copy(update={"roots": trust.roots[first.root.version - 1 :]})
    chain, refusal = first.updated(offered, 0.0)  # what has expired is found below, as of the day of the metadata
    if refusal is not None:
        raise refusal
    as_of = chain.issued
    return Verified(decode_release(manifest), provenance.attested(chain, manifest, envelope, as_of), as_of)


def check_onnx(manifest: ReleaseManifest, file: Path) -> None:
    """Raises DigestMismatch: the file is not the one that the manifest names."""
    try:
        found = manifest_of(list(chunked([map_file(file)]))).ref
    except (OSError, ValueError) as exc:
        raise ConfigError(str(file), f"cannot be read: {exc}") from exc
    if found != manifest.onnx:
        raise DigestMismatch(f"{file} is not the ONNX file of {provenance.named(manifest)}")
