"""Flower's Grid over NATS: replies are handed on as they arrive, and dropped once handed on.

Implements `flwr.serverapp.Grid` for unmodified ServerApps: the strategies of flwr, custom
mains with push and pull, and the legacy API, which calls from several threads at once.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator

from flwr.app import DEFAULT_TTL, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived, Inbox, Node
from fedtide.aggregation.grid.gathering import Gathering
from fedtide.aggregation.grid.outgoing import Outgoing, PhaseId, place_for
from fedtide.aggregation.grid.phases import Asked, Counted, Phase, TooFewUpdates
from fedtide.aggregation.grid.replies import Replies
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum
from fedtide.fabric.errors import FedtideError, MalformedMessage, NotFound
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.ids import flower_int
from fedtide.fabric.messages.tasks import Task
from fedtide.fabric.plans.round_policy import Cause, quorum_of
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef

_APP_ERROR = flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class NatsGrid(Grid):
    """The Grid of one run. A round driver, if there is one, announces each phase with `enter`."""

    def __init__(self, config: WorkerConfig, link: GridLink, accounts: Accounts, run_config: ConfigValues) -> None:
        self._config = config
        self._link = link
        self._accounts = accounts
        self._outgoing = Outgoing(config, link, run_config)
        self._run = flower.Run.create_empty(flower_int(config.run))
        self._nodes: dict[int, Node] = {}
        self._choice: list[Node] = []
        self._asked: dict[str, Asked] = {}
        self._pulled: Inbox = queue.SimpleQueue()
        self._carried: Inbox = queue.SimpleQueue()
        self._ready: dict[str, Message] = {}
        self._lock = threading.RLock()
        self._kept: list[Counted] = []
        self._told_restart = False
        self._phase: Phase | None = None
        self.counted: set[str] = set()
        """Tasks whose replies this round has processed."""

    def enter(self, phase: Phase) -> None:
        """Begin `phase`. Its task names are deterministic: the next attempt would give the same ones."""
        self._phase = phase
        self._outgoing.enter_phase()
        self._link.ingest.fold_into(phase.folding.expect if phase.folding is not None else None)
        if phase.pinned is not None:
            self._nodes |= {n.node_id: n for n in phase.pinned}

    def code_against(self, anchor: ArrayRecord) -> None:
        """Send models as coded differences to `anchor`, to nodes that read the policy's codec."""
        self._outgoing.code_against(anchor)

    def leave(self) -> None:
        """End the driven phases: later messages belong to none."""
        self._phase = None

    def finish(self) -> None:
        """Give up all outstanding tasks, after the last round was closed."""
        self._give_up(set(self.outstanding()), "the run is over", "not_needed")

    def set_run(self, run: flower.Run) -> None:
        self._run = run

    @property
    def carries(self) -> bool:
        """Whether the policy counts updates in later rounds than the one that asked for them."""
        return self._config.spec.policy.carries

    @property
    def run(self) -> flower.Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        phase = self._phase
        if phase is not None and phase.pinned is not None:
            nodes = phase.pinned
        else:
            where = (phase.round, phase.trial, phase.name) if phase is not None else (0, 1, "")
            needed = self._config.spec.policy.min_updates if phase is not None and phase.name == "train" else 0
            cohort = self._link.call(self._link.cohorts.at_least(needed, *where))
            nodes = [Node.of(n.name, n.region, n.codecs) for n in cohort.nodes]
        with self._lock:
            self._choice = nodes
            self._nodes |= {n.node_id: n for n in nodes}
        return [n.node_id for n in nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._push(messages, self._pulled)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            while not self._pulled.empty():
                arrived = self._pulled.get()
                if isinstance(arrived, Arrived):
                    self._ready[arrived.task] = self._reply(arrived)
            return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send now; the returned sequence yields each reply when it arrives.

        A node that raised, went offline or sent an update that `admission` refuses yields an error
        reply. Tasks without a reply when the policy or `timeout` (seconds) ends the phase are given
        up and reported as such.

        Raises:
            TooFewUpdates: (from the sequence) a driven training phase ended with too few answers.
        """
        inbox: Inbox = queue.SimpleQueue()
        limit_s = timeout if timeout is not None else DEFAULT_TTL
        if self._phase is None:
            limit_s = min(limit_s, self._config.spec.policy.deadline_s)
        waiting = set(self._push(messages, inbox))
        policy = self._config.spec.policy
        quorum = self._quorum(len(waiting))
        grace = policy.grace_s > 0 and policy.mode == "sync"
        gathering = Gathering(inbox, waiting, quorum=quorum, grace=grace, limit_s=limit_s)
        return Replies(self._replies(gathering, len(waiting)))

    def _quorum(self, asked: int) -> int | None:
        """The quorum of a driven training phase; None elsewhere: wait for all."""
        if self._phase is None or self._phase.name != "train":
            return None
        return quorum_of(self._config.spec.policy, self._config.spec.selection, asked)

    def _replies(self, gathering: Gathering, asked: int) -> Iterator[Message]:
        phase = self._phase
        for arrived in gathering:
            message = self._reply(arrived)
            self.counted.add(arrived.task)
            if message.has_content():
                gathering.count()
            yield message
        if phase is not None and phase.folding is not None:
            yield from self._settled(gathering, phase.folding.total())
        category = "timeout" if gathering.cause == "deadline" else "not_needed"
        self._give_up(gathering.waiting, f"not there when its phase ended ({gathering.cause})", category)
        if phase is not None:
            self._collected(phase, gathering, asked)

    def _settled(self, gathering: Gathering, total: RoundSum) -> Iterator[Message]:
        """Settle the sum before its use: whole updates count, partially folded ones are withdrawn."""
        try:
            self._link.call(self._link.ingest.settle(total))
        except FedtideError as exc:
            raise TooFewUpdates(f"an update that must not count could not be taken back: {exc.what}") from exc
        for arrived in gathering.rest():
            message = self._reply(arrived)
            self.counted.add(arrived.task)
            gathering.count()
            yield message

    def _collected(self, phase: Phase, gathering: Gathering, asked: int) -> None:
        if asked:
            self._accounts.collected(phase.place, gathering.counted, gathering.cause)
        needed = self._config.spec.policy.min_updates
        # An app may choose to ask no node; having no node to choose from is an error.
        if phase.name == "train" and (asked or not self._choice) and gathering.counted < needed:
            raise TooFewUpdates.of(gathering.counted, asked, needed, gathering.cause)

    def collect_carried(self, messages: Iterable[Message]) -> list[Counted]:
        """Send to idle nodes, and collect the next updates, whichever round asked for them.

        Tasks without a reply when the phase ends stay outstanding and count in a later round.

        Raises:
            TooFewUpdates: as above.
        """
        phase, policy = self._phase, self._config.spec.policy
        assert phase is not None
        also = [asked.node.name for asked in self.outstanding().values()]
        self._push(self.to_free_nodes(messages), self._carried, also=also)
        asked = self.outstanding()
        full: Cause = "buffer full" if policy.mode == "async" else "quorum"
        quorum = quorum_of(policy, self._config.spec.selection, len(asked) + len(self._kept))
        gathering = Gathering(self._carried, set(asked), quorum=quorum, grace=policy.grace_s > 0, full=full)
        counted, self._kept = self._kept, []
        for each in counted:
            gathering.count()
            self._book(each)
        for arrived in gathering:
            message = self._reply(arrived)
            self.counted.add(arrived.task)
            if message.has_content() and arrived.reply is not None:
                gathering.count()
                seconds = arrived.reply.seconds
                counted.append(Counted(arrived.task, message, asked[arrived.task], arrived.size_bytes, seconds))
        try:
            self._collected(phase, gathering, len(asked) + len(counted))
        except TooFewUpdates:
            self._kept = counted
            raise
        return counted

    def _book(self, kept: Counted) -> None:
        """Report a reply to an abandoned trial as received in the current one."""
        place, age = self._counts_at(kept.asked), self._age(kept.asked)
        self._accounts.received(place, kept.asked.node.name, size=kept.size_bytes, seconds=kept.seconds, staleness=age)

    def to_free_nodes(self, messages: Iterable[Message]) -> list[Message]:
        """The messages whose nodes have no outstanding training task of this run."""
        working = {asked.node.node_id for asked in self.outstanding().values()}
        return [m for m in messages if m.metadata.dst_node_id not in working]

    def outstanding(self) -> dict[str, Asked]:
        """Driven training tasks without a reply, by task."""
        with self._lock:
            return {t: a for t, a in self._asked.items() if a.place.driven and a.place.phase == "train"}

    def kept(self) -> dict[str, Asked]:
        """Tasks whose replies arrived in an abandoned trial and count in the next one."""
        return {counted.task: counted.asked for counted in self._kept}

    def adopt(self, task: str, node: Node, round_: int, expires_at: float, base: ArrayRecord | None) -> None:
        """Wait for a training task that a predecessor sent, with the model `base`, in an earlier round or trial."""
        content = RecordDict({"arrays": base}) if base is not None else RecordDict()
        message = Message(content, node.node_id, "train", group_id=str(round_))
        flower.stamp(message, task)
        with self._lock:
            self._asked[task] = Asked(message, node, PhaseId(round_, 1, "train", driven=True), expires_at)
        self._link.call(self._link.adopt(task, node, self._carried, expires_at))

    def _push(self, messages: Iterable[Message], inbox: Inbox, *, also: Iterable[str] = ()) -> list[str]:
        with self._lock:
            self._outgoing.begin_push(self._summing_regions())
            sent = [self._prepare(message) for message in messages]
            self._asked |= {task.task: asked for task, asked in sent}
        if self._phase is None:
            self._restarted()
        elif sent:
            self._phase.before_send(self._choice)
        self._announce(sent, list(also))
        for task, asked in sent:
            self._link.call(self._link.send(task, asked.node, inbox))
        if self._phase is not None:
            self._link.call(self._link.start_clock(self._phase.round, self._phase.trial, self._phase.name, inbox))
        self._link.call(self._link.look_for_absent())
        return [task.task for task, _ in sent]

    def _summing_regions(self) -> frozenset[str]:
        """Regions that sum their own updates in this phase."""
        phase = self._phase
        if phase is None or phase.folding is None:
            return frozenset()
        key, agreement = phase.key(self._config.run), phase.folding.total().total.agreement
        self._link.call(self._link.ingest.shards.begin(key, agreement))
        regions = self._config.regions if self._config.spec.policy.regional else []
        return self._link.call(self._link.ingest.regions.begin(key, agreement, regions))

    def _restarted(self) -> None:
        """Report, once, that a crashed run starts over: without a driver it cannot resume."""
        self._link.call(self._link.disable_resume())
        if self._config.attempt > 1 and not self._told_restart:
            self._told_restart = True
            self._accounts.restarted()

    def _announce(self, sent: list[tuple[Task, Asked]], also: list[str]) -> None:
        groups = {place: list(group) for place, group in itertools.groupby(sent, key=lambda s: s[1].place)}
        if also and not groups and self._phase is not None:
            groups = {self._phase.place: []}
        for place, group in groups.items():
            nodes = [asked.node.name for _, asked in group] + also
            self._accounts.opened(place, nodes, sum(t.size_bytes() for t, _ in group), self._quorum(len(nodes)))

    def _prepare(self, message: Message) -> tuple[Task, Asked]:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            raise NotFound(
                f"no node with id {message.metadata.dst_node_id} takes part in this run",
                "Send only to ids that get_node_ids() returned",
            )
        place = place_for(message, self._phase.place if self._phase is not None else None)
        task = self._outgoing.prepare(message, node, place)
        return task, Asked(message, node, place, task.expires_at)

    def model_blob(self) -> list[BlobRef]:
        """The blobs of the last push; a driver deletes them when their round is closed."""
        return self._outgoing.blobs()

    def _reply(self, arrived: Arrived) -> Message:
        with self._lock:
            asked = self._asked.pop(arrived.task)
        if arrived.reply is None:
            return self._refuse(asked, arrived.category, arrived.lost, flower.ErrorCode.NODE_UNAVAILABLE)
        try:
            sent = next(iter(asked.message.content.array_records.values()), None)
            message = flower.from_wire(arrived.reply.message, None if arrived.folded else arrived.frames, sent)
        except MalformedMessage as exc:
            return self._refuse(asked, "malformed", str(exc), flower.ErrorCode.UNKNOWN)
        if message.has_error():
            return self._refuse(asked, "app_error", message.error.reason or "no reason given", message.error.code)
        admission = self._phase.admission if self._phase is not None and not arrived.folded else None
        place, age = self._counts_at(asked), self._age(asked)
        if age > self._config.spec.policy.max_staleness:
            return self._refuse(asked, "stale", f"was trained from the model of {age} rounds ago", _APP_ERROR)
        try:
            refusal = admission(message) if admission is not None else None
        except (MalformedMessage, ArithmeticError, MemoryError) as exc:
            refusal = Refusal("malformed", str(exc))
        if refusal is not None:
            return self._refuse(asked, refusal.category, refusal.reason, _APP_ERROR)
        size, seconds = arrived.size_bytes, arrived.reply.seconds
        self._accounts.received(place, asked.node.name, size=size, seconds=seconds, staleness=age)
        return message

    def _counts_at(self, asked: Asked) -> PhaseId:
        """The place where a reply counts; a carried reply counts in the current round."""
        if self._phase is None or asked.place.phase != self._phase.name:
            return asked.place
        return self._phase.place

    def _age(self, asked: Asked) -> int:
        return self._counts_at(asked).round - asked.place.round

    def _refuse(self, asked: Asked, category: str, reason: str, code: int) -> Message:
        self._accounts.refused(self._counts_at(asked), asked.node.name, category, reason)
        return Message(Error(code, reason), reply_to=asked.message)

    def _give_up(self, waiting: set[str], reason: str, category: str) -> None:
        with self._lock:
            given_up = [self._asked.pop(t) for t in sorted(waiting) if t in self._asked]
        for asked in given_up:
            self._accounts.refused(asked.place, asked.node.name, category, reason)
        self._link.call(self._link.give_up(sorted(waiting)))
