"""The `vllm.general_plugins` entry point. vLLM calls it in every one of its processes, perhaps more than once.

It hooks nothing: the routes (`vllm.endpoint_plugins`) do that where they are loaded, so that a vLLM which has
Penstock installed and not switched on runs its own code only. What it does is to say why nothing happens on a
vLLM that is too old to load routes.
"""

import importlib.util
import logging
import multiprocessing

_log = logging.getLogger("vllm.penstock")

_said: set[str] = set()


def register() -> None:
    """Never raises, and says what it has to say once, in vLLM's first process."""
    if multiprocessing.parent_process() is not None:
        return
    problem = _problem()
    if problem is not None and problem not in _said:
        _said.add(problem)
        _log.warning("penstock: %s", problem)


def _problem() -> str | None:
    try:
        found = importlib.util.find_spec("vllm.plugins.endpoint_plugins")
    except (ImportError, ValueError):
        found = None
    if found is not None:
        return None
    return "this vLLM cannot load routes from plugins (0.26 is the first that can), so nothing of Penstock is active"
