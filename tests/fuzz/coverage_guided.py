"""One border under Atheris, which keeps what reaches new code.

    cd tests && python -m fuzz.coverage_guided BORDER SECONDS

It starts from the corpus and writes what breaks the border into it, as `found-…`. `make soak` runs every border.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["penstock"]):
    from fuzz.borders import BORDERS
    from fuzz.mutations import CORPUS


def main() -> None:
    border, seconds = sys.argv[1], int(sys.argv[2])
    hold = BORDERS[border]

    def attempt(data: bytes) -> None:
        try:
            hold(data)
        except Exception:
            (CORPUS / border / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise

    # libFuzzer writes what it learns into the first folder; the corpus is only read.
    with tempfile.TemporaryDirectory() as learnt:
        limits = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=20", "-verbosity=0"]
        atheris.Setup(
            [sys.argv[0], learnt, str(CORPUS / border), f"-artifact_prefix={Path(learnt)}/", *limits], attempt
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
