"""What the plugin's hook adds to an engine step in which no sidecar has a stream: microseconds, on vLLM's own classes.

    .venv-vllm/bin/python bench/idle_hook.py

Run by the engine's interpreter, without an engine. `front_end.py --rounds 0` measures the same from outside, where two
engines differ by far more.
"""

import json
import sys
from pathlib import Path
from timeit import repeat
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "plugin")]

from vllm.v1.engine import EngineCoreOutput, FinishReason  # noqa: E402
from vllm.v1.engine.output_processor import RequestState  # noqa: E402

from penstock_vllm import tap  # noqa: E402
from penstock_vllm.end_counter import counter  # noqa: E402
from penstock_vllm.streams import OpenStreams  # noqa: E402

STEPS, TRIES = 2000, 15
RESULT = SimpleNamespace(reqs_to_abort=[])


def processor() -> Any:
    """vLLM's method does nothing here, so that the hook's own time is seen."""

    class OutputProcessor:
        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}

        def process_outputs(self, engine_core_outputs: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG002  # its name counts
            return RESULT

    return OutputProcessor


def microseconds(kind: Any, outputs: list[Any]) -> float:
    made = kind()
    made.request_states = {output.request_id: None for output in outputs}
    return min(repeat(lambda: made.process_outputs(outputs, 1.0, None), number=STEPS, repeat=TRIES)) / STEPS * 1e6


def main() -> None:
    bare, hooked = processor(), processor()
    problem = tap.install_on(hooked, EngineCoreOutput, RequestState, OpenStreams(), counter())
    if problem is not None:
        raise SystemExit(problem)
    for streams in (1, 16, 64, 256):
        outputs = [EngineCoreOutput(f"chatcmpl-{number:032x}", [number]) for number in range(streams)]
        for ends in (False, True):
            if ends:
                outputs[0] = EngineCoreOutput(outputs[0].request_id, [1], finish_reason=FinishReason.STOP)
            added = microseconds(hooked, outputs) - microseconds(bare, outputs)
            line = {"streams": streams, "one_ends": ends, "added_to_a_step": round(added, 2)}
            print(json.dumps({**line, "added_to_a_token": round(added / streams, 3)}))


if __name__ == "__main__":
    main()
