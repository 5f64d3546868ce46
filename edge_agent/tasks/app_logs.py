"""What apps print on this node, for whoever asks over the broker, unless the node's owner keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.owner_policy import Owner
from fedtide.fabric.encoding import from_json
from fedtide.fabric.errors import RemoteError
from fedtide.fabric.flower.app_log import AppLog
from fedtide.fabric.messages.logs import LogPage, LogQuestion
from fedtide.fabric.nats.broker import Answerer, Broker
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.node_answers import answered
from fedtide.fabric.nats.subjects import Question, Subjects, parse_as


def app_log_file(data_dir: Path, run: str) -> Path:
    """What a run's app prints on this node."""
    return data_dir / "app-logs" / f"{run}.jsonl"


class AppLogs:
    """Answers on `logs.<region>.<node>.<run>`."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config

    async def listen(self, broker: Broker, subjects: Subjects, guarded: Callable[[Answerer], Answerer]) -> None:
        subject = subjects.logs(self._config.region, self._config.node, "*")
        await broker.answer(subject, guarded(self._on_question))

    async def _on_question(self, message: Received) -> tuple[bytes, dict[str, str]]:
        return await answered(self._page(message))

    async def _page(self, message: Received) -> LogPage:
        asked = from_json(LogQuestion, message.data, "question")
        if not (self._config.share_logs and Owner(self._config.policy_file).policy().logs):
            raise RemoteError("the node's owner keeps what apps print there", "Set share_logs in the agent's settings")
        log = AppLog(app_log_file(self._config.data_dir, parse_as(Question, message.subject).about))
        return LogPage.of(await asyncio.to_thread(lambda: list(log.lines(asked.after))))
