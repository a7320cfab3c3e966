"""What every test can ask for: one real engine for the whole run, and a sidecar in the test's own loop."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings

from support.engine import Engine, running_engine

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("soak", settings.get_profile("ci"), derandomize=False, max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class EngineHolder:
    """Starts the engine when the first test asks for it, and again after a test that killed it."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._engine: Engine | None = None

    def running(self) -> Engine:
        if self._engine is None or not self._engine.is_alive():
            self.stop()
            # The plugin is loaded and, until a sidecar asks for it, unused.
            loaded = {"VLLM_PLUGINS": "penstock"}
            self._engine = self._running.enter_context(running_engine(environment=loaded))
        return self._engine

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="session")
def engine_holder() -> Iterator[EngineHolder]:
    holder = EngineHolder()
    yield holder
    holder.stop()


@pytest.fixture
def engine(engine_holder: EngineHolder) -> Engine:
    """The real vLLM engine, one for the whole run. A test may kill it: wait until it is dead, the next starts anew."""
    return engine_holder.running()


@pytest.fixture
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call in the event loop fails the test."""
    with blockbuster_ctx("penstock") as detector:
        yield detector
