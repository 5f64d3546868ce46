"""The API of trust: who may say what, who vouches for a release, and what a node's updates have influenced."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from fedtide.coordinator import influence
from fedtide.coordinator.adapters.attesting import Attesting
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.api.http import answer, asker, name_in, read_body
from fedtide.coordinator.api.routes import Route, get, post, put
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.models.registry import Release
from fedtide.fabric.errors import NotFound
from fedtide.fabric.events.identity import NodeQuarantined
from fedtide.fabric.messages.requests import AttestationRequest, QuarantineRequest
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.messages.views import AttestationView, InfluenceView, LineageNode, LineageView, TrustView
from fedtide.fabric.tensors.blobs import BlobRef


class TrustApi:
    """Handlers."""

    def __init__(self, engine: Engine, director: Director, attesting: Attesting) -> None:
        self._engine = engine
        self._director = director
        self._attesting = attesting

    def routes(self) -> list[Route]:
        version = "/v1/models/{model}/versions/{version}"
        return [
            get("/v1/trust", self._show, "Who may say what", TrustView),
            put(
                "/v1/trust",
                self._publish,
                "Publish metadata of the offline keys",
                TrustView,
                body=TrustMetadata,
                needs="admin",
            ),
            get(f"{version}/attestation", self._attestation, "Who vouches for a release", AttestationView),
            put(
                f"{version}/attestation", self._attest, "Vouch for a release", AttestationView, body=AttestationRequest
            ),
            get(f"{version}/lineage", self._lineage, "What a release was made from, and what from it", LineageView),
            get("/v1/nodes/{node}/influence", self._influence, "What a node's updates have influenced", InfluenceView),
            post(
                "/v1/nodes/{node}/quarantine",
                self._quarantine,
                "Ask a node to train no more, or again",
                InfluenceView,
                body=QuarantineRequest,
            ),
        ]

    async def _show(self, _: web.Request) -> web.Response:
        return answer(self._director.view())

    async def _publish(self, request: web.Request) -> web.Response:
        await self._director.publish(await read_body(request, TrustMetadata), by=asker(request))
        return answer(self._director.view())

    async def _attestation(self, request: web.Request) -> web.Response:
        return answer(await self._attestation_of(self._release(request)))

    async def _attest(self, request: web.Request) -> web.Response:
        asked = await read_body(request, AttestationRequest)
        await self._attesting.take(self._release(request), asked.envelope)
        return answer(await self._attestation_of(self._release(request)))

    async def _attestation_of(self, release: Release) -> AttestationView:
        raw, envelope = await self._attesting.shown(release)
        return AttestationView(
            model=release.manifest.model,
            version=release.manifest.version,
            manifest=raw.decode(),
            envelope=envelope,
            signed=release.attestation is not None,
            trust=self._director.view().metadata if self._director.is_used else TrustMetadata(),
        )

    def _release(self, request: web.Request) -> Release:
        model, wanted = self._engine.world.model(name_in(request, "model")), name_in(request, "version")
        for release in model.releases:
            if wanted in ("latest", str(release.manifest.version)):
                found = model.latest if wanted == "latest" else release
                assert found is not None
                return found
        raise NotFound(f"model {model.name!r} has no release {wanted}", "See `fedtide model ls`")

    async def _lineage(self, request: web.Request) -> web.Response:
        world, release = self._engine.world, self._release(request)
        by_ref = {r.ref: r for m in world.models.values() for r in m.releases}

        def node(each: Release) -> LineageNode:
            lineage = each.manifest.lineage
            return LineageNode(
                model=each.manifest.model,
                version=each.manifest.version,
                run=lineage.run,
                rounds=lineage.rounds,
                updates=lineage.updates,
                participants=lineage.participants,
                signed=each.attestation is not None,
            )

        ancestors: list[Release] = []
        at = release
        while at.manifest.lineage.base in by_ref and len(ancestors) < len(by_ref):
            at = by_ref[at.manifest.lineage.base]
            ancestors.append(at)
        descendants, known = [], {release.ref}
        for each in sorted(by_ref.values(), key=lambda r: r.manifest.version):
            if each.manifest.lineage.base in known:
                known.add(each.ref)
                descendants.append(each)
        serving: Mapping[str, BlobRef] = world.serving.get(release.manifest.model, {})
        served_by = sorted(name for name, ref in serving.items() if ref == release.ref)
        return answer(
            LineageView(
                release=node(release),
                ancestors=[node(each) for each in ancestors],
                descendants=[node(each) for each in descendants],
                served_by=served_by,
            )
        )

    async def _influence(self, request: web.Request) -> web.Response:
        return answer(influence.of_node(self._engine.world, name_in(request, "node")))

    async def _quarantine(self, request: web.Request) -> web.Response:
        node, asked = name_in(request, "node"), await read_body(request, QuarantineRequest)
        self._engine.world.node(node)
        told = NodeQuarantined(node=node, reason=asked.reason, by=asker(request), lifted=asked.lift)
        await self._engine.submit(told)
        return answer(influence.of_node(self._engine.world, node))
