"""The fuzzer that looks at which lines an input has reached: `atheris`, for a target.

    python -m tests.fuzz.drive decoder 60 FOLDER

tries inputs for so many seconds, beginning with the corpus. What is new goes to FOLDER,
and what a target does not take to a file `crash-...` in it; then the exit status is not
0. Whatever is found is put into the corpus, where every run of the tests tries it.
"""

import sys
from pathlib import Path

import atheris

RSS_MB_MAX = 2000
TIMEOUT_S = 30
INPUT_BYTES_MAX = 4096


def main() -> None:
    name, seconds, folder = sys.argv[1:]
    with atheris.instrument_imports(include=["zeolith", "zodbpickle"]):
        from .test_targets import CORPUS, TARGETS

        target = TARGETS[name]
    arguments = [
        sys.argv[0],
        folder,
        str(CORPUS / name),
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={RSS_MB_MAX}",
        f"-timeout={TIMEOUT_S}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-artifact_prefix={Path(folder) / ''}/",
        # Children that end with a signal are the target's business.
        "-handle_segv=0" if name == "cache_page" else "-handle_segv=1",
    ]
    atheris.Setup(arguments, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
