"""The bar that a release may not fall below: the best revision that was ever proven."""

from __future__ import annotations

import json
from datetime import timedelta

from release_worlds import World, reason, serving

from tributary_api.release import Revision


def release_of(world: World, model: str, loss: float) -> None:
    """A revision of this loss is promoted, watched and settled."""
    world.candidate_loss = loss
    world.ask_for(model=model)
    world.settle()
    world.now += timedelta(hours=1)
    world.settle()


def best(world: World) -> str:
    found = world.release.status.best
    assert found is not None
    return found.revision


def stable_of(world: World) -> Revision:
    found = world.release.status.stable
    assert found is not None
    return found


def test_small_losses_do_not_add_up() -> None:
    """A chain of candidates, each hardly worse than the one before, is compared with the first all along."""
    world = serving("m1")
    first = stable_of(world)
    for model, loss in (("m2", 3.26), ("m3", 3.27), ("m4", 3.28)):
        release_of(world, model, loss)
        assert best(world) == first.revision
    world.ask_for(model="m5")
    world.run_pass()
    world.succeed()
    assert world.situation().rivals.best == first.model
    task = json.loads(next(text for name, text in reversed(world.tasks.items()) if "gate" in name))
    assert task["best"] == first.model.to_json_object()


def test_the_bar_rises_with_a_better_revision_and_never_falls() -> None:
    world = serving("m1")
    release_of(world, "m2", 3.0)
    better = stable_of(world)
    assert best(world) == better.revision
    release_of(world, "m3", 3.1)
    assert best(world) == better.revision
    # Gone back to, m1 once was the best; that is no longer so.
    release_of(world, "m1", 3.1)
    assert best(world) == better.revision


def test_a_revision_that_turns_out_badly_is_no_bar() -> None:
    world = serving("m1")
    first = stable_of(world)
    world.candidate_loss = 1.0
    world.ask_for(model="m2")
    for _ in range(20):
        world.run_pass()
        if reason(world) == "Watching":
            break
        world.succeed()
        world.now += timedelta(seconds=1)
    world.lose_pod(world.service.revision if world.service else "")
    world.run_pass()
    world.settle()
    assert best(world) == first.revision
