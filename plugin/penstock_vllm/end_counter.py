"""Why requests end, counted in vLLM's own registry: `penstock_request_ends_total{cause="…"}` on its `/metrics`.

All requests of the API server process are counted, those of vLLM's own routes too.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

_log = logging.getLogger("vllm.penstock")

NAME: Final = "penstock_request_ends"

Count = Callable[[str, int], None]


def nobody(_cause: str, _ends: int) -> None:
    """Counts nothing."""


@functools.cache
def counter() -> Count:
    """Registered once a process. Counts nothing where prometheus_client is not what it should be."""
    try:
        from prometheus_client import Counter

        ends = Counter(NAME, "Choices that ended, by what ended them.", ["cause"])
    except Exception as error:
        _log.warning("penstock: ends are not counted: %s: %s", type(error).__name__, error)
        return nobody
    return lambda cause, number: ends.labels(cause).inc(number)


def count_step(count: Count, causes: Iterable[str], result: Any) -> None:
    """One engine step: the causes of what the engine ended, and vLLM's result, which has what a stop string ended."""
    for cause in causes:
        count(cause, 1)
    if stopped := getattr(result, "reqs_to_abort", None):
        count("stop_string", len(stopped))
