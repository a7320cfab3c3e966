"""No value is cut and none is missed, in grammars that nobody thought of and in those that people write.

See `support/grammar_oracle.py` and `support/wild_grammars.py`: some hundreds in every run, ten thousand in a soak.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from support.engine import ROOT, interpreter

pytestmark = pytest.mark.engine

SOAK = settings.get_current_profile_name() == "soak"


def walked(script: str, walks: int) -> dict[str, Any]:
    """The counts of what it met; nothing was wrong."""
    command = [str(interpreter()), str(Path(ROOT, "tests", "support", script)), "1", str(walks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    counts: dict[str, Any] = told["counts"]
    return counts


def test_no_value_is_cut() -> None:
    cases = 10_000 if SOAK else 250
    counts = walked("grammar_oracle.py", cases)
    assert counts["walks"] > 0.9 * cases
    assert counts["ended"] > 0.5 * cases
    assert counts["ended by tensors"] > 0.2 * cases
    assert counts["nested"] > 0.02 * cases


def test_nor_in_grammars_as_people_write_them() -> None:
    walks = 40 if SOAK else 1
    counts = walked("wild_grammars.py", walks)
    assert counts["cases"] > 250
    assert counts["ended"] > 0.5 * walks * counts["cases"]
