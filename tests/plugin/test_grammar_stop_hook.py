"""Where the grammar stop steps aside, told without vLLM: on another version, where it is off, where it is not named."""

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from penstock_vllm import grammar_stop, register
from penstock_vllm.endpoint import PenstockRoutes
from penstock_vllm.language import MOST_CHARACTERS, Machine, Reading
from penstock_vllm.notations import regular_expression


class Scheduler:
    def add_request(self, request: Any) -> None:
        raise NotImplementedError

    def _update_request_with_output(self, request: Any, new_token_ids: list[int]) -> tuple[list[int], bool]:
        raise NotImplementedError


class Manager:
    def accept_tokens(self, request: Any, new_token_ids: list[int]) -> bool:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    register._said.clear()


def test_a_second_time_changes_nothing() -> None:
    scheduler = type("Scheduler", (), dict(Scheduler.__dict__))
    manager = type("Manager", (), dict(Manager.__dict__))
    assert grammar_stop.install_on(scheduler, manager) is None
    hooked = (vars(scheduler)["add_request"], vars(manager)["__init__"])
    assert hooked[0] is not Scheduler.add_request
    assert grammar_stop.install_on(scheduler, manager) is None
    assert (vars(scheduler)["add_request"], vars(manager)["__init__"]) == hooked


def test_a_vllm_before_0_30_has_no_accept_tokens() -> None:
    class Older:
        pass

    before = Scheduler.add_request
    problem = grammar_stop.install_on(Scheduler, Older)
    assert problem == "StructuredOutputManager has no accept_tokens (vLLM 0.30 is the first that has)"
    assert Scheduler.add_request is before


def test_another_signature_is_not_hooked() -> None:
    class Other(Scheduler):
        def _update_request_with_output(self, outputs: Any) -> None:  # type: ignore[override]  # on purpose
            raise NotImplementedError

    class Another(Scheduler):
        def add_request(self, requests: list[Any]) -> None:  # on purpose
            raise NotImplementedError

    class OtherManager:
        def accept_tokens(self, tokens: list[int], request: Any) -> bool:
            raise NotImplementedError

    assert grammar_stop.install_on(Other, Manager) == (
        "Scheduler._update_request_with_output takes ['self', 'outputs'] and is not what this plugin knows"
    )
    assert grammar_stop.install_on(Another, Manager) == (
        "Scheduler.add_request takes ['self', 'requests'] and is not what this plugin knows"
    )
    assert grammar_stop.install_on(Scheduler, OtherManager) == (
        "StructuredOutputManager.accept_tokens takes ['self', 'tokens', 'request'] and is not what this plugin knows"
    )


def test_it_is_part_of_what_vllm_plugins_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (None, "", "other,penstocks"):
        if names is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", names)
        assert register.grammar_stop_problem() == "VLLM_PLUGINS does not name penstock"
    monkeypatch.setenv("VLLM_PLUGINS", "other,penstock")
    problem = register.grammar_stop_problem()
    assert problem is not None
    assert problem.startswith("this vLLM's scheduler is not what this plugin knows: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("off", "PENSTOCK_GRAMMAR_STOP is off"),
        ("no", "PENSTOCK_GRAMMAR_STOP is 'no'; it must be on or off"),
    ],
)
def test_it_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str, problem: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "penstock")
    monkeypatch.setenv("PENSTOCK_GRAMMAR_STOP", setting)
    with caplog.at_level(logging.INFO, "vllm.penstock"):
        register.register()
        register.register()
    assert [record.getMessage() for record in caplog.records][1:] == [f"penstock: grammar_stop is off: {problem}"]
    assert PenstockRoutes().name == "penstock"


class Request:
    def __init__(self, structured: object) -> None:
        self.structured_output_request = structured


def watched() -> tuple[Any, Any, grammar_stop.Watch]:
    scheduler = Scheduler()
    manager = Manager()
    vars(scheduler)["structured_output_manager"] = manager
    return scheduler, manager, grammar_stop.Watch(scheduler)


def comes_and_goes(watch: grammar_stop.Watch) -> None:
    """A structured request, and one of free text when that has gone."""
    structured = Request(object())
    watch.sees(structured)
    assert watch.is_on
    del structured
    gc.collect()
    watch.sees(Request(None))


def test_what_stood_on_the_objects_before_stands_there_again() -> None:
    def another(*_: Any) -> bool:
        return True

    scheduler, manager, watch = watched()
    manager.accept_tokens = another
    comes_and_goes(watch)
    assert not watch.is_on
    assert vars(manager) == {"accept_tokens": another}
    assert vars(scheduler) == {"structured_output_manager": manager}


def test_who_has_hooked_the_same_since_is_left_in_place() -> None:
    scheduler, manager, watch = watched()
    structured = Request(object())
    watch.sees(structured)
    ours = manager.accept_tokens

    def around(*taken: Any) -> Any:
        return ours(*taken)

    manager.accept_tokens = around
    del structured
    comes_and_goes(watch)
    # Both of ours stay: one without the other would advance a grammar twice.
    assert vars(manager) == {"accept_tokens": around}
    assert "_update_request_with_output" in vars(scheduler)
    assert watch.is_on
    manager.accept_tokens = ours
    comes_and_goes(watch)
    assert (vars(manager), watch.is_on) == ({}, False)


def test_a_value_that_is_not_read_on_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: weakref.WeakSet[Reading] = weakref.WeakSet()

    class Noted(Reading):
        def __init__(self, machine: Machine) -> None:
            super().__init__(machine)
            made.add(self)

    monkeypatch.setattr(grammar_stop, "Reading", Noted)
    machine = Machine(regular_expression(r"a*\s*"))
    ends: Any = SimpleNamespace(machine=lambda *_: machine, text=lambda ids: "a" * len(ids))
    manager = SimpleNamespace(reasoner_cls=None)
    key = (SimpleNamespace(name="REGEX"), "")
    parameters = SimpleNamespace(extra_args=None, eos_token_id=0)
    request = SimpleNamespace(
        structured_output_request=SimpleNamespace(structured_output_key=key),
        sampling_params=parameters,
        output_token_ids=[1],
    )
    value = grammar_stop._Value(ends, manager, request)
    assert not value._ends_in_white_space(request)
    assert len(made) == 1
    request.output_token_ids = [1] * (MOST_CHARACTERS + 1)
    assert not value._ends_in_white_space(request)
    gc.collect()
    assert len(made) == 0
