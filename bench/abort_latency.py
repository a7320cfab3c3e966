"""How long after an abort the engine still begins steps for the request, in milliseconds.

Another stream of the same batch is the clock: `tests/support/abort_clock.py` says how. 0 is an abort that took effect
with the step that was running. Aborted are a stream on the plugin's own connection, and one whose client leaves
Penstock.
"""

import argparse
import asyncio
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.cpu_per_token import print_line  # noqa: E402

from support.abort_clock import Begin, client_leaves, late_ms, plugin_aborts  # noqa: E402
from support.engine import Engine, running_engine  # noqa: E402
from support.http_client import calling  # noqa: E402
from support.plugin_client import connected  # noqa: E402
from support.scripts import Script  # noqa: E402
from support.sidecar import sidecar  # noqa: E402


async def measure(engine: Engine, tries: int) -> None:
    script = Script(engine)
    async with (
        connected(engine.url) as clock,
        connected(engine.url) as other,
        sidecar(engine.url, {"plugin": "auto"}) as running,
        calling(running.url) as caller,
    ):
        ways: dict[str, Begin] = {
            "abort on the plugin's connection": plugin_aborts(other, script),
            "client leaves Penstock": client_leaves(caller, script),
        }
        for name, begin in ways.items():
            late = [await late_ms(clock, script, begin) for _ in range(tries)]
            print_line(
                way=name,
                tries=tries,
                within_the_running_step=sum(not value for value in late),
                median_ms=round(statistics.median(late), 1),
                worst_ms=round(max(late), 1),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=30, help="aborts of each way (default %(default)s)")
    arguments = parser.parse_args()
    with running_engine(environment={"VLLM_PLUGINS": "penstock"}) as engine:
        asyncio.run(measure(engine, arguments.tries))


if __name__ == "__main__":
    main()
