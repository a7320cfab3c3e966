"""The logits processor: its contract with both runners, checked by the engine's own interpreter."""

import json
import subprocess
from pathlib import Path

import pytest

from support.engine import ROOT, interpreter

pytestmark = pytest.mark.engine

CONTRACT = Path(ROOT, "tests", "support", "processor_contract.py")


def test_the_contract_with_both_runners() -> None:
    done = subprocess.run([str(interpreter()), str(CONTRACT)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) >= 14
