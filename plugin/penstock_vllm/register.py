"""The `vllm.general_plugins` entry point. vLLM calls it in every one of its processes, perhaps more than once.

It installs the grammar stop where `VLLM_PLUGINS` names `penstock`, which is also what vLLM asks for to load the routes
(`vllm.endpoint_plugins`): a vLLM which has Penstock installed and not switched on runs its own code only. And it says
why something does not happen on a vLLM that is too old for it.
"""

import importlib.util
import logging
import multiprocessing
import os
from typing import Final

from penstock_vllm import grammar_stop

_log = logging.getLogger("vllm.penstock")

_said: set[str] = set()

NOT_NAMED: Final = "VLLM_PLUGINS does not name penstock"


def register() -> None:
    """Never raises, and says what it has to say once, in vLLM's first process."""
    if (problem := _no_routes()) is not None:
        _say(problem)
    problem = grammar_stop_problem()
    if problem is not None and problem != NOT_NAMED:
        _say(f"grammar_stop is off: {problem}")


def grammar_stop_problem() -> str | None:
    """Installs the grammar stop, if that has not been done. Returns why it is off."""
    names = os.environ.get("VLLM_PLUGINS")
    return grammar_stop.install() if names is not None and "penstock" in names.split(",") else NOT_NAMED


def _say(problem: str) -> None:
    if multiprocessing.parent_process() is None and problem not in _said:
        _said.add(problem)
        _log.warning("penstock: %s", problem)


def _no_routes() -> str | None:
    try:
        found = importlib.util.find_spec("vllm.plugins.endpoint_plugins")
    except (ImportError, ValueError):
        found = None
    if found is not None:
        return None
    return "this vLLM cannot load routes from plugins (0.26 is the first that can), so nothing of Penstock is active"
