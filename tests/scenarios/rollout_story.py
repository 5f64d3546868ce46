"""What scenarios of roll-outs share."""

from __future__ import annotations

from typing import Any

from fedtide.coordinator.commands import SetDesired
from fedtide.coordinator.rollouts import rollouts, waves
from fedtide.coordinator.rollouts import views as rollout_views
from fedtide.fabric.messages.views import RolloutView
from tests.scenarios.build import Story, phase, rollout, wave

TWO_WAVES = (wave("eu", "e1", "e2 e3"), wave("us", "", "u1 u2"))


def started(*told: Any, **plan: Any) -> Story:
    story = Story()
    story.tell(rollout(*(told or TWO_WAVES), **plan))
    return story


def state_of(story: Story) -> Any:
    return story.world.rollout("ro-1")


def nodes_of(story: Story) -> dict[str, waves.NodeState]:
    return dict(rollouts.nodes_of(state_of(story)))


def view_of(story: Story) -> RolloutView:
    return rollout_views.rollout(state_of(story))


def offers(commands: Any) -> list[str]:
    """Who is offered a release, with a deadline."""
    return [c.node for c in commands if isinstance(c, SetDesired) and c.expires_at is not None]


def confirm(story: Story, *names: str, counter: int = 1) -> tuple[Any, ...]:
    return story.tell(*(phase(n, "confirmed", counter=counter) for n in names))
