"""No value is cut and none is missed, in grammars that nobody thought of: see `support/grammar_oracle.py`.

Some hundreds in every run, ten thousand in a soak.
"""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from support.engine import ROOT, interpreter

pytestmark = pytest.mark.engine

ORACLE = Path(ROOT, "tests", "support", "grammar_oracle.py")


def test_no_value_is_cut() -> None:
    cases = 10_000 if settings.get_current_profile_name() == "soak" else 250
    command = [str(interpreter()), str(ORACLE), "1", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    counts = told["counts"]
    assert counts["walks"] > 0.9 * cases
    assert counts["ended"] > 0.5 * cases
    assert counts["ended by tensors"] > 0.2 * cases
    assert counts["nested"] > 0.02 * cases
