"""What the real engine generates arrives whole, in the stable events: nothing lost, nothing added, all of it counted."""

import pytest
from support.engine import Engine
from support.http_client import FOLDED, NDJSON, SSE, Answer, Caller
from support.record import CLOCK, EMOJI, PARIS, THINKING, THINKING_TOOL, TOKYO, WEATHER

from .conftest import Json, Script
