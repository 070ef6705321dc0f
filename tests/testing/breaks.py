"""What any plugin with state by slot can get wrong: a sound one is copied, and each copy breaks one promise."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, create_model

from trtllm_core.plugin import hookimpl


class ForksOneByOne:
    """0←1, 1←0 leaves both equal."""

    def fork(self, src, dst):
        for i in range(len(src)):
            super().fork(src[i : i + 1], dst[i : i + 1])


class NoRewind:
    """It takes nothing back."""

    def rewind(self, slot, n):
        pass


class Leftovers:
    """A slot that was used before keeps its state."""

    def begin(self, slot, view):
        used = vars(self).setdefault("used", set())
        if slot not in used:
            super().begin(slot, view)
        used.add(slot)


class Branches:
    """It does more work in every second step, which a captured graph would not."""

    steps = 0

    def commit(self, batch):
        super().commit(batch)
        self.steps += 1
        if self.steps % 2:
            batch.slot.mul(1)


class NewKey:
    """Its graphs are captured anew in each step."""

    steps = 0

    @property
    def graph_key(self):
        return self.steps

    def commit(self, batch):
        super().commit(batch)
        self.steps += 1


SHARED: tuple[tuple[type, str, str], ...] = (
    (ForksOneByOne, "test_forks_are_simultaneous", "after a fork"),
    (NoRewind, "test_rewinds", "after a rewind"),
    (Leftovers, "test_slots_are_used_again", "in a slot that was used before"),
    (Branches, "test_shapes_are_fixed", "two steps ran different operations"),
    (NewKey, "test_graph_key", "its graph_key changed"),
)
"""How it breaks, the check that finds it, and a part of what that says."""


def broken(how: type, sound: type[Any]) -> type[Any]:
    """A copy of ``sound`` that is broken like this."""
    return type(how.__name__, (how, sound), {})


def loose(sound: type[Any]) -> type[Any]:
    """The same with parameters that nothing looks at."""
    return _with_params("TakesAnything", sound, needed=False)


def needy(sound: type[Any]) -> type[Any]:
    """The same with parameters that have no defaults."""
    return _with_params("NeedsParams", sound, needed=True)


def _with_params(name: str, sound: type[Any], needed: bool) -> type[Any]:
    fields = sound.Params.model_fields.items()
    given: dict[str, Any] = {each: (one.annotation, ... if needed else one.default) for each, one in fields}
    return type(name, (sound,), {"Params": create_model("Params", __config__=ConfigDict(extra="forbid"), **given)})


def shared(sound: type[Any], wrong: dict[str, Any]) -> list[tuple[type, str, str]]:
    """Copies of ``sound`` that break what holds for every plugin with state by slot and parameters: the copy, the check
    that finds it, and a part of what that says. ``wrong`` are parameters that it refuses."""
    return [
        *((broken(how, sound), check, why) for how, check, why in SHARED),
        (loose(sound), "test_wrong_parameters_are_refused", f"it takes the parameters {wrong}"),
        (needy(sound), "test_it_can_be_asked_for", "give other `params` or `sampling`"),
    ]


def joins(hook: str, plugin: type, **how: Any) -> tuple[object, str, str]:
    """A module that registers a plugin so that it is in plans that did not ask for it. ``how`` is for the registrar."""

    def register(self: object, registrar: Any) -> None:
        registrar.add(how.get("replace", "joins"), plugin, **how)

    kinds = ("decoder>=1.0,<2", "logits_processor>=1.0,<2", "stopping_criterion>=1.0,<2")
    module = type("Joins", (), {"hook_api": kinds, f"trtllm_register_{hook}": hookimpl(register)})()
    return module, "test_who_does_not_ask_pays_nothing", "it joins requests that did not ask for it"
