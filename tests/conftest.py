"""What every test can ask for: one real engine for the whole run, and a sidecar in the test's own loop."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings
from support.engine import Engine, running_engine

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("soak", settings.get_profile("ci"), derandomize=False, max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The real vLLM engine, started once. Tests that kill it start their own."""
    with running_engine() as running:
        yield running


@pytest.fixture
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call in the event loop fails the test."""
    with blockbuster_ctx("penstock") as detector:
        yield detector
