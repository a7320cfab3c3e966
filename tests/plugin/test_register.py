"""Loading: harmless in any process, any number of times, on any vLLM."""

import logging
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

from penstock_vllm import register, tap
from penstock_vllm.endpoint import PenstockRoutes, api_server_processes, vllm_version


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    register._said.clear()


def test_a_vllm_without_endpoint_plugins_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.penstock"):
        register.register()
        register.register()
    [record] = caplog.records
    assert record.getMessage() == (
        "penstock: this vLLM cannot load routes from plugins (0.26 is the first that can), "
        "so nothing of Penstock is active"
    )


def test_a_vllm_with_endpoint_plugins_hears_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "vllm.plugins", "vllm.plugins.endpoint_plugins"):
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = type(sys.__spec__)(name, None) if sys.__spec__ else None
        monkeypatch.setitem(sys.modules, name, module)
    with caplog.at_level(logging.INFO, "vllm.penstock"):
        register.register()
    assert caplog.records == []


def test_only_the_first_process_speaks(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the one that started this")
    register.register()
    assert caplog.records == []


def test_the_entry_points_are_those_that_vllm_looks_for() -> None:
    [general] = entry_points(group="vllm.general_plugins", name="penstock")
    [routes] = entry_points(group="vllm.endpoint_plugins", name="penstock")
    assert general.load() is register.register
    assert routes.load() is PenstockRoutes
    # Its mere presence would drop vLLM 0.22 to 0.30 to the older model runner, and 0.31 would not start.
    assert not entry_points(group="vllm.logits_processors", name="penstock")


def test_what_vllm_asks_of_an_endpoint_plugin() -> None:
    routes = PenstockRoutes()
    assert routes.name == "penstock"
    assert routes.required_tasks == ("generate",)
    assert len(tap.OPEN_STREAMS) == 0


def test_without_vllm_there_is_no_version() -> None:
    assert vllm_version() == "unknown"


@pytest.mark.parametrize(("said", "processes"), [({"client_count": 4}, 4), ({}, 1), ({"client_count": None}, 1)])
def test_how_many_processes_serve_the_engine(said: dict[str, object], processes: int) -> None:
    assert api_server_processes(SimpleNamespace(engine_core=SimpleNamespace(**said))) == processes


def test_an_engine_client_of_another_kind_has_one_process() -> None:
    assert api_server_processes(object()) == 1
