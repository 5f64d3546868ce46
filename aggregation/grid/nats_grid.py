"""Flower's Grid over NATS, for unmodified ServerApps.

The strategies of flwr, custom mains with push and pull, and the legacy API, which calls from several threads at
once. `send_and_receive` has waited when it returns, as in Flower. A round driver uses `stream`, which hands replies on
as they arrive and drops them once handed on; only what it sends belongs to its phase: an app may ask its nodes anything
else meanwhile.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator

from flwr.app import DEFAULT_TTL, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtide.aggregation.config import WorkerConfig
from fedtide.aggregation.folding.in_flight import Arrived, Inbox, Node
from fedtide.aggregation.grid.gathering import Gathering
from fedtide.aggregation.grid.outgoing import Outgoing, place_for
from fedtide.aggregation.grid.phases import Asked, Counted, Phase, Refused, TooFewUpdates
from fedtide.aggregation.grid.round_reports import Accounts
from fedtide.aggregation.link.grid_link import GridLink
from fedtide.aggregation.link.phase_id import NO_PHASE, PhaseId
from fedtide.aggregation.sums.admission import Refusal
from fedtide.aggregation.sums.round_sum import RoundSum
from fedtide.fabric.errors import FedtideError, MalformedMessage, NotFound
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.ids import flower_int
from fedtide.fabric.messages.tasks import Task, bytes_of
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.round_policy import Cause, TimeIsUp, quorum_of
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef

_REFUSED = flower.ErrorCode.UNKNOWN
"""Code of the error reply for an answer that does not count."""


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
        self._looked = False
        self._unread: set[str] = set()
        self._counted = self._withdrawn = 0
        self._has_asked = False
        self._refused = Refused()
        self._answered: dict[str, Asked] = {}
        self._sent: set[BlobRef] = set()
        """Records of the phase before: they are in the regions."""
        self.counted: set[str] = set()
        """Tasks whose replies this round has processed."""

    def enter(self, phase: Phase) -> None:
        """Begin `phase`. Its task names are deterministic: the next attempt would give the same ones."""
        self._phase = phase
        self._looked = False
        self._counted = self._withdrawn = 0
        self._refused = Refused()
        self._answered.clear()
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
        return self._look(self._config.spec.policy.min_updates if self._trains else 0)

    def share_sampling(self) -> None:
        """Let Flower's strategies wait for their nodes here, where the wait has a reason and an end."""
        flower.replace_sampling(lambda grid, wanted: self.wait_for_nodes(wanted) if grid is self else None)

    def wait_for_nodes(self, wanted: int) -> list[int]:
        """The ids of all nodes of the cohort, once there are as many as a strategy wants.

        Raises:
            TooFewUpdates: there were fewer until the policy's deadline.
        """
        found = self._look(wanted)
        if len(found) < wanted:
            waited_s = self._config.spec.policy.deadline_s
            raise TooFewUpdates(
                f"the app wants {wanted} nodes, and its cohort had {len(found)} for {waited_s:g} s",
                "See `fedtide fleet ls` and the run's `--nodes` and `--select`, or lower what the app wants",
            )
        return found

    @property
    def _trains(self) -> bool:
        return self._phase is not None and self._phase.name == "train"

    def _look(self, needed: int) -> list[int]:
        phase = self._phase
        if phase is not None and phase.pinned is not None:
            nodes = phase.pinned
        else:
            place = phase.place if phase is not None else NO_PHASE
            waits = lambda there, held: self._link.report(self._accounts.waits(place, needed, there, held))  # noqa: E731
            cohort = self._link.call(self._link.cohorts.at_least(needed, place.round, place.trial, place.phase, waits))
            nodes = [Node.of(n.name, n.region, n.codecs) for n in cohort.nodes]
        with self._lock:
            self._looked = True
            self._choice = nodes
            self._nodes |= {n.node_id: n for n in nodes}
        return [n.node_id for n in nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = self._push(messages, self._pulled, None)
        with self._lock:
            self._unread |= set(sent)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            while not self._pulled.empty():
                self._take_pulled(self._pulled.get())
            return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def _take_pulled(self, item: Arrived | TimeIsUp) -> None:
        if isinstance(item, Arrived):
            self._ready[item.task] = self._reply(item)
            self._unread.discard(item.task)

    def drain(self) -> None:
        """Wait for answers to what was pushed and not pulled: a message reaches its node, whoever waits."""
        until = time.monotonic() + self._config.spec.policy.deadline_s
        while self._unread and (left := until - time.monotonic()) > 0:
            try:
                self._take_pulled(self._pulled.get(timeout=left))
            except queue.Empty:
                return

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies, after all have arrived or `timeout` (seconds) or the policy's deadline has passed.

        A node that raised or went offline gives an error reply. Tasks without a reply are given up. The order is that
        of the nodes' ids, and of one node's messages: it does not depend on what arrived first.
        """
        inbox: Inbox = queue.SimpleQueue()
        limit_s = min(timeout if timeout is not None else DEFAULT_TTL, self._config.spec.policy.deadline_s)
        sent = self._push(messages, inbox, None)
        replies = list(self._replies(Gathering(inbox, set(sent), limit_s=limit_s), len(sent), None))
        place = {task: number for number, task in enumerate(sent)}
        return sorted(replies, key=lambda r: (r.metadata.src_node_id, place[r.metadata.reply_to_message_id]))

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Send the messages of the driven phase now; each reply is yielded when it arrives.

        Also an update that `admission` refuses gives an error reply.

        Raises:
            TooFewUpdates: (from the iterator) a training phase ended with too few answers.
        """
        phase, policy = self._phase, self._config.spec.policy
        assert phase is not None
        inbox: Inbox = queue.SimpleQueue()
        waiting = set(self._push(messages, inbox, phase))
        quorum = self._quorum(phase, len(waiting))
        grace = policy.grace_s > 0 and policy.mode == "sync"
        gathering = Gathering(inbox, waiting, quorum=quorum, grace=grace, limit_s=timeout)
        return self._replies(gathering, len(waiting), phase)

    def _quorum(self, phase: Phase | None, asked: int) -> int | None:
        """The quorum of a driven training phase; None elsewhere: wait for all."""
        if phase is None or phase.name != "train":
            return None
        return quorum_of(self._config.spec.policy, self._config.spec.selection, asked)

    def _replies(self, gathering: Gathering, asked: int, phase: Phase | None) -> Iterator[Message]:
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
        self._counted, self._has_asked = gathering.counted, bool(asked)
        if asked:
            self._accounts.collected(phase.place, gathering.counted, gathering.cause)
        needed = self._config.spec.policy.min_updates
        # An app may choose to ask no node; having no node to choose from is an error.
        nobody_there = self._looked and not self._choice
        if phase.name == "train" and (asked or nobody_there) and gathering.counted < needed:
            raise TooFewUpdates.of(gathering.counted, asked, needed, gathering.cause, self._refused)

    def collect_carried(self, messages: Iterable[Message]) -> list[Counted]:
        """Send to idle nodes, and collect the next updates, whichever round asked for them.

        Tasks without a reply when the phase ends stay outstanding and count in a later round.

        Raises:
            TooFewUpdates: as above.
        """
        phase, policy = self._phase, self._config.spec.policy
        assert phase is not None
        also = [asked.node.name for asked in self.outstanding().values()]
        self._push(self.to_free_nodes(messages), self._carried, phase, also=also)
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
                reply, size = arrived.reply, arrived.size_bytes
                counted.append(Counted(arrived.task, message, asked[arrived.task], size, reply))
        try:
            self._collected(phase, gathering, len(asked) + len(counted))
        except TooFewUpdates:
            self._kept = counted
            raise
        return counted

    def _book(self, kept: Counted) -> None:
        """Report a reply to an abandoned trial as received in the current one."""
        self._answered[kept.task] = kept.asked
        place, age = self._counts_at(kept.asked), self._age(kept.asked)
        again = kept.reply.model_copy(update={"usage": Usage()})  # it was reported in the trial that was abandoned
        self._accounts.received(place, kept.asked.node.name, again, size=kept.size_bytes, staleness=age)

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

    def _push(
        self, messages: Iterable[Message], inbox: Inbox, phase: Phase | None, *, also: Iterable[str] = ()
    ) -> list[str]:
        with self._lock:
            self._outgoing.begin_push(self._summing_regions(phase))
            sent = [self._prepare(message, phase) for message in messages]
            self._asked |= {task.task: asked for task, asked in sent}
        if self._phase is None:
            self._restarted()
        elif sent and phase is not None:
            phase.before_send(self._choice)
        self._announce(sent, phase, list(also))
        for task, asked in sent:
            self._link.call(self._link.send(task, asked.node, inbox))
        if phase is not None:
            self._link.call(self._link.start_clock(phase.round, phase.trial, phase.name, inbox))
        self._link.call(self._link.look_for_absent())
        return [task.task for task, _ in sent]

    def _summing_regions(self, phase: Phase | None) -> frozenset[str]:
        """Regions that sum their own updates in this phase."""
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

    def _announce(self, sent: list[tuple[Task, Asked]], phase: Phase | None, also: list[str]) -> None:
        groups = {place: list(group) for place, group in itertools.groupby(sent, key=lambda s: s[1].place)}
        if also and not groups and phase is not None:
            groups = {phase.place: []}
        for place, group in groups.items():
            nodes = [asked.node.name for _, asked in group] + also
            tasks = [task for task, _ in group]
            size, to_a_region = bytes_of(tasks, self._sent)
            # What a round evaluates is what the next one trains: it is stored once.
            self._sent = {ref for task in tasks for ref in task.message.carried()}
            wan, quorum = to_a_region * len(self._config.regions), self._quorum(phase, len(nodes))
            self._accounts.opened(place, nodes, size, wan, quorum, resumable=self._phase is not None)

    def _prepare(self, message: Message, phase: Phase | None) -> tuple[Task, Asked]:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            raise NotFound(
                f"no node with id {message.metadata.dst_node_id} takes part in this run",
                "Send only to ids that get_node_ids() returned",
            )
        place = phase.place if phase is not None else place_for(message, self._phase.place if self._phase else None)
        task = self._outgoing.prepare(message, node, place)
        return task, Asked(message, node, place, task.expires_at)

    def model_blob(self) -> list[BlobRef]:
        """The blobs of the last push; a driver deletes them when their round is closed."""
        return self._outgoing.blobs()

    def _reply(self, arrived: Arrived) -> Message:
        with self._lock:
            asked = self._asked.pop(arrived.task)
        if asked.place.driven:
            self._answered[arrived.task] = asked
        if arrived.reply is None:
            return self._refuse(asked, arrived.category, arrived.lost, flower.ErrorCode.NODE_UNAVAILABLE)
        try:
            sent = next(iter(asked.message.content.array_records.values()), None)
            message = flower.from_wire(arrived.reply.message, None if arrived.folded else arrived.frames, sent)
        except MalformedMessage as exc:
            return self._refuse(asked, "malformed", str(exc), flower.ErrorCode.UNKNOWN, arrived)
        if message.has_error():
            reason, code = message.error.reason or "no reason given", message.error.code
            return self._refuse(asked, "app_error", reason, code, arrived)
        admits = asked.place.driven and self._phase is not None and not arrived.folded
        admission = self._phase.admission if self._phase is not None and admits else None
        place, age = self._counts_at(asked), self._age(asked)
        if age > self._config.spec.policy.max_staleness:
            reason = f"was trained from the model of {age} rounds ago"
            return self._refuse(asked, "stale", reason, _REFUSED, arrived)
        try:
            refusal = admission(asked.message, message) if admission is not None else None
        except (MalformedMessage, ArithmeticError, MemoryError) as exc:
            refusal = Refusal("malformed", str(exc))
        if refusal is not None:
            return self._refuse(asked, refusal.category, refusal.reason, _REFUSED, arrived)
        self._accounts.received(place, asked.node.name, arrived.reply, size=arrived.size_bytes, staleness=age)
        return message

    def _counts_at(self, asked: Asked) -> PhaseId:
        """The place where a reply counts; a carried reply counts in the current round."""
        if self._phase is None or not asked.place.driven or asked.place.phase != self._phase.name:
            return asked.place
        return self._phase.place

    def _age(self, asked: Asked) -> int:
        return self._counts_at(asked).round - asked.place.round

    @property
    def has_asked(self) -> bool:
        """Whether this phase has asked any node, or found none to ask."""
        return self._has_asked

    def check_rest(self) -> None:
        """Raises TooFewUpdates if fewer than needed are left after `refuse`."""
        phase, needed = self._phase, self._config.spec.policy.min_updates
        left = self._counted - self._withdrawn
        if self._withdrawn and phase is not None and phase.name == "train" and left < needed:
            raise TooFewUpdates.of(left, self._counted, needed, "all answered", self._refused)

    def refuse(self, reply: Message, refusal: Refusal) -> Message:
        """Take back a reply of this phase that was taken as received; the error reply that takes its place."""
        asked = self._answered[reply.metadata.reply_to_message_id]
        self._withdrawn += 1
        return self._refuse(asked, refusal.category, refusal.reason, _REFUSED)

    def _refuse(self, asked: Asked, category: str, reason: str, code: int, arrived: Arrived | None = None) -> Message:
        said = f"{category}: {reason}"
        first = reason.partition("\n")[0]  # the traceback of the same error is told once a phase
        told = first if said in self._refused.reasons else reason
        self._accounts.refused(self._counts_at(asked), asked.node.name, category, told, arrived)
        if asked.place.driven:
            self._refused.add(said, code)
        return Message(Error(code, reason), reply_to=asked.message)

    def _give_up(self, waiting: set[str], reason: str, category: str) -> None:
        with self._lock:
            given_up = [self._asked.pop(t) for t in sorted(waiting) if t in self._asked]
        for asked in given_up:
            self._accounts.refused(asked.place, asked.node.name, category, reason)
        self._link.call(self._link.give_up(sorted(waiting)))
