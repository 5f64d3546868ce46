"""What a release authority vouches for: what the run's aggregator has signed, said as it is, once for each version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtide.coordinator.release_authority.judgement import judge
from fedtide.coordinator.release_authority.signed_before import SignedBefore
from fedtide.coordinator.runs.provenance import predicate
from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.messages.attestation import AttestationWanted
from fedtide.fabric.plans.release import Export, Lineage, ReleaseManifest
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust.chain import Chain, Files
from fedtide.fabric.trust.claims import produced_claim, signed_app
from fedtide.fabric.trust.provenance import attested, sealed, statement
from fedtide.fabric.trust.refusals import Untrusted
from tests.served import ref_of
from tests.trust import NOW, Keys, Published, aggregator

AT = NOW.timestamp()
PUBLISHED = Published.first()
OF: Keys = PUBLISHED.keys
CHAIN = Chain(Files(PUBLISHED.metadata.roots[0])).updated(PUBLISHED.metadata, AT)[0]
APP = signed_app(AppRef(name="digits", bundle=BlobRef(digest="a" * 64, size_bytes=1)), [OF.publisher])
BLOBS = {
    name: BlobRef(digest=letter * 64, size_bytes=1) for name, letter in (("onnx", "1"), ("arrays", "2"), ("smoke", "3"))
}


def produced(**changes: Any) -> ModelProduced:
    about = {"run": "run-1", "model": "digits", "export": Export(labels=["no", "yes"]), "metrics": {"a": 0.5}, **BLOBS}
    made = ModelProduced(**{**about, **changes})
    speaker = aggregator(OF)
    return made.model_copy(update={"signature": speaker.sign(produced_claim(made)), "mandate": speaker.mandate})


def manifest(**changes: Any) -> ReleaseManifest:
    lineage = Lineage(app=APP, run="run-1", rounds=2, participants=3, updates=6)
    about: dict[str, Any] = {"export": Export(labels=["no", "yes"]), "metrics": {"a": 0.5}, "lineage": lineage, **BLOBS}
    return ReleaseManifest(**{"model": "digits", "version": 1, **about, **changes})


def wanted(release: ReleaseManifest | None = None, **changes: Any) -> AttestationWanted:
    release = release or manifest()
    raw = to_json(release)
    said = statement(raw, predicate(release, None, NOW, "0"))
    about = {"manifest": raw, "statement": said, "produced": to_json(produced()), "trust": PUBLISHED.metadata}
    return AttestationWanted(**{**about, **changes})


def test_what_a_run_has_made_is_vouched_for() -> None:
    asked = wanted()
    assert judge(CHAIN, asked, AT).version == 1
    assert attested(CHAIN, asked.manifest, sealed(asked.statement, [OF.releases]), AT).roles == {"releases"}


def lineage(**changes: Any) -> ReleaseManifest:
    return manifest(lineage=manifest().lineage.model_copy(update=changes))


OTHERS: dict[str, Callable[[], ReleaseManifest]] = {
    "another model": lambda: manifest(model="faces"),
    "other bytes": lambda: manifest(onnx=BLOBS["smoke"]),
    "other labels": lambda: manifest(export=Export(labels=["yes", "no"])),
    "better metrics": lambda: manifest(metrics={"a": 1.0}),
    "a wide tolerance": lambda: manifest(smoke_tolerance=1e9),
    "another run": lambda: lineage(run="run-2"),
    "an app that nobody has signed": lambda: lineage(app=APP.model_copy(update={"signatures": {}})),
    "another app": lambda: lineage(
        app=signed_app(AppRef(name="digits", bundle=BlobRef(digest="b" * 64, size_bytes=1)), [OF.publisher])
    ),
    "a base that it did not begin from": lambda: lineage(base=BLOBS["onnx"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_release_that_its_run_did_not_make_is_not(name: str) -> None:
    with pytest.raises(Untrusted):
        judge(CHAIN, wanted(OTHERS[name]()), AT)


def changed(**changes: Any) -> bytes:
    """The statement of the release, with other content."""
    return json.dumps({**json.loads(wanted().statement), **changes}).encode()


def test_a_statement_is_about_one_release_and_says_what_is_so() -> None:
    own = json.loads(wanted().statement)
    other = {"name": "other@7", "digest": {"sha256": hashlib.sha256(b"other").hexdigest()}}
    lies = json.loads(json.dumps(own["predicate"]))
    lies["buildDefinition"]["internalParameters"]["updates"] = 1_000_000
    named = json.loads(json.dumps(own["predicate"]))
    named["buildDefinition"]["externalParameters"]["model"] = "faces"
    for bad in (
        changed(subject=[*own["subject"], other]),
        changed(subject=[{**own["subject"][0], "name": "other@7"}]),
        changed(subject=[]),
        changed(predicate=lies),
        changed(predicate=named),
        changed(predicate={}),
        changed(predicateType="https://example.com/other"),
        b"nonsense",
    ):
        with pytest.raises((Untrusted, MalformedMessage)):
            judge(CHAIN, wanted(statement=bad), AT)
    envelope = sealed(changed(subject=[*own["subject"], other]), [OF.releases])
    with pytest.raises(Untrusted):
        attested(CHAIN, wanted().manifest, envelope, AT)


@pytest.mark.parametrize(
    "changes",
    [{"signature": ""}, {"signature": "00"}, {"mandate": ""}, {"mandate": "{}"}, {"metrics": {"a": 1.0}}],
    ids=str,
)
def test_what_the_aggregator_has_not_signed_is_not_its(changes: dict[str, Any]) -> None:
    with pytest.raises(Untrusted):
        judge(CHAIN, wanted(produced=to_json(produced().model_copy(update=changes))), AT)


def test_what_a_release_began_from_is_vouched_for_too() -> None:
    base = to_json(manifest())
    began = lineage(base=ref_of(base)).model_copy(update={"version": 2})
    made = to_json(produced(base=ref_of(base)))
    envelope = sealed(statement(base, predicate(manifest(), None, NOW, "0")), [OF.releases])
    assert judge(CHAIN, wanted(began, produced=made, base=base, base_attestation=envelope), AT).version == 2
    for nothing in ("", sealed(statement(base, predicate(manifest(), None, NOW, "0")), [OF.director])):
        with pytest.raises(Untrusted):
            judge(CHAIN, wanted(began, produced=made, base=base, base_attestation=nothing), AT)


def test_a_version_is_one_release_for_ever(tmp_path: Path) -> None:
    SignedBefore(tmp_path).add(manifest(), "digest")
    SignedBefore(tmp_path).add(manifest(), "digest")
    with pytest.raises(Untrusted, match="was another release"):
        SignedBefore(tmp_path).add(manifest(), "another")
    SignedBefore(tmp_path).add(manifest(version=2), "another")
