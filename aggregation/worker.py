"""The aggregator process: runs one Flower ServerApp to its end and reports the result."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import ServerApp

from fedtide.aggregation import app_packages
from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.grid.nats_grid import NatsGrid
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.aggregation.link.app_output import AppOutput
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.link.mandates import End
from fedtide.aggregation.release.onnx_export import export
from fedtide.aggregation.release.onnx_parts import cut
from fedtide.aggregation.rounds.driver import RoundDriver
from fedtide.aggregation.rounds.legacy_driver import LegacyDriver
from fedtide.fabric import trace_context
from fedtide.fabric.errors import ConfigError, FedtideError, OutOfMemory, TransientError
from fedtide.fabric.events.envelope import ModelProduced
from fedtide.fabric.events.runs import AggregatorStarted, RunCompleted, RunFailed
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.flower.app_errors import told
from fedtide.fabric.flower.apps import AppDescription, describe, fuse
from fedtide.fabric.flower.working_dir import enter
from fedtide.fabric.ids import flower_int
from fedtide.fabric.plans.release import Privacy, ReleaseManifest, decode_release
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of
from fedtide.fabric.tensors.frame import Buffer, encode
from fedtide.fabric.trace_context import TraceContext
from fedtide.fabric.trust.claims import produced_claim

log = logging.getLogger(__name__)


STOPPED_CODE = 128 + signal.SIGTERM


class Stopped(BaseException):
    """SIGTERM arrived: the run was cancelled, or the aggregator is preempted."""


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def run(config: WorkerConfig, file: Path, end: End) -> int:
    """Run the app and report how it ended; the exit code is then 0, and another if stopped or cut off.

    An app that needs other packages than this process has takes its place in an interpreter that has them.

    Args:
        file: `config` is read from it.
        end: ends the process at once, when it is no longer the run's current attempt.
    """
    signal.signal(signal.SIGTERM, _stop)
    trace_context.enter(TraceContext.parse(config.trace))
    link = GridLink(config, end)
    output = AppOutput(config.work_dir / "log.jsonl", link.log_lines)
    try:
        link.open(meanwhile=output.start)
    except BaseException:
        output.stop()
        raise
    try:
        ended: RunCompleted | RunFailed
        try:
            bundle = link.call(_begin(config, link))
            python = app_packages.python_for(config, bundle, link)
            if python is not None:
                output.stop()
                link.close()
                app_packages.become(python, file)
            note = _run_app(config, link)
            link.call(link.close_round((), carries=False))
            link.call(link.storage.forget_anchors())
            link.call(link.stop_listening())
            ended = RunCompleted(run=config.run, attempt=config.attempt, note=note)
        except TransientError as exc:
            log.error("run.broken_off", extra={"reason": str(exc)})
            return exc.exit_code
        except FedtideError as exc:
            ended = _failed(config, str(exc))
        except SystemExit as exc:
            ended = _failed(config, f"the ServerApp called sys.exit({exc.code})")
        except Stopped:
            log.warning("run.stopped")
            return STOPPED_CODE
        except Exception as exc:  # a ServerApp may raise anything
            if config.larger_machine and is_out_of_memory(exc):
                log.error("run.out_of_memory", extra={"reason": str(exc)})
                return OutOfMemory.exit_code
            logging.getLogger("serverapp").exception("raised")
            ended = _failed(config, f"the ServerApp raised {told(exc, config.work_dir / 'app')}")
        # Before the last report: what is stored for a run that has ended is cleaned up.
        output.stop()
        link.call(link.store_lines())
        link.call(link.report(ended.model_copy(update={"usage": link.used()})))
    finally:
        output.stop()
        link.close()
    return 0


async def _begin(config: WorkerConfig, link: GridLink) -> bytes:
    """Report the start; the app's bundle, which arrives meanwhile."""
    fetching = asyncio.create_task(link.storage.fetch(config.spec.app.bundle))
    await link.report(AggregatorStarted(run=config.run, attempt=config.attempt))
    return bytes(await fetching)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether the machine's or the GPU's memory was too small; torch has an error of its own for that."""
    return isinstance(exc, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(exc).__mro__)


def _failed(config: WorkerConfig, reason: str) -> RunFailed:
    return RunFailed(run=config.run, attempt=config.attempt, reason=reason[:4000])


def _run_app(config: WorkerConfig, link: GridLink) -> str:
    spec = config.spec
    app_dir = app_packages.app_dir(config)
    app = describe(app_dir)
    run_config = fuse(app.config, spec.run_config)
    run_id = flower_int(config.run)
    flower.adopt_identity(run_id, flower.SUPERLINK_NODE_ID)
    accounts = Accounts(config, link)
    base = _base(config, link)
    driver = RoundDriver(config, link, accounts, _first_arrays(config, base, link))
    driver.install()
    legacy = LegacyDriver(config, accounts)
    legacy.install()
    server_app = flower.load_component(app.serverapp, app_dir)
    if not isinstance(server_app, ServerApp):
        raise ConfigError(app.serverapp, "is not a flwr ServerApp")
    context = flower.context_of(run_id, flower.SUPERLINK_NODE_ID, {}, run_config, RecordDict())
    enter(config.work_dir / "out", app_dir)
    grid = NatsGrid(config, link, accounts, run_config)
    grid.share_sampling()
    server_app(grid=grid, context=context)
    grid.drain()
    if not driver.drives and legacy.arrays is None:
        accounts.close_open()
    driver.check()
    if (config.spec.base or config.spec.start) is not None and not driver.drives:
        raise ConfigError("base", "this app does not call strategy.start, so it cannot start from a release")
    if not driver.drives and (spec.policy.carries or spec.stop is not None):
        raise ConfigError("policy", "this app does not call strategy.start: it takes no mode and no stop rule")
    if spec.purpose == "evaluate":
        return "evaluated; no release is made"
    if driver.drives and not driver.trained:
        return "no release: nothing was trained"
    arrays = driver.arrays or legacy.arrays or _left_in(context)
    # What the run has spent whose checkpoint this one started from is in no ledger.
    privacy = driver.privacy(base.lineage.privacy if base is not None else None) if spec.start is None else None
    metrics = driver.metrics or legacy.metrics
    published = _publish(config, link, app, app_dir, arrays, context, metrics, privacy)
    return "; ".join(note for note in (driver.note, published) if note)


def _base(config: WorkerConfig, link: GridLink) -> ReleaseManifest | None:
    if config.spec.base is None:
        return None
    return decode_release(bytes(link.call(link.storage.fetch_release(config.spec.base))))


def _first_arrays(config: WorkerConfig, base: ReleaseManifest | None, link: GridLink) -> ArrayRecord | None:
    """What a run starts from instead of the app's own arrays."""
    if config.spec.start is not None:
        return flower.record_of(memoryview(link.call(link.storage.fetch(config.spec.start))))
    if base is None:
        return None
    return flower.record_of(memoryview(link.call(link.storage.fetch_release(base.arrays))))


def _left_in(context: Context) -> ArrayRecord | None:
    """A custom main hands its model over as the array record `model` of its context's state."""
    record = context.state.array_records.get("model")
    return record if isinstance(record, ArrayRecord) else None


def _publish(
    config: WorkerConfig,
    link: GridLink,
    app: AppDescription,
    app_dir: Path,
    arrays: ArrayRecord | None,
    context: Context,
    metrics: dict[str, float],
    privacy: Privacy | None,
) -> str:
    model = config.spec.model or app.model
    if app.export is None or model is None:
        return "no release: the app names no export hook"
    if arrays is None or not arrays:
        return "no release: the app left no global model"
    exported = export(app, app_dir, arrays, context, config.work_dir)

    def keep(parts: Sequence[Buffer]) -> BlobRef:
        return link.call(link.storage.store_release(parts))

    produced = ModelProduced(
        run=config.run,
        model=model,
        onnx=manifest_of(list(chunked([exported.onnx]))).ref,
        parts=[keep([part]) for part in cut(exported.onnx)],
        arrays=keep(encode(flower.tensors_of(arrays))),
        smoke=keep(encode(exported.smoke)),
        export=exported.export,
        metrics={**metrics, "onnx_max_abs_diff": exported.max_abs_diff},
        base=config.spec.base,
        privacy=privacy,
    )
    signer = link.mandates.signer
    signed = {"signature": signer.sign(produced_claim(produced)), "mandate": signer.mandate} if signer.mandate else {}
    link.call(link.report(produced.model_copy(update=signed)))
    return ""
