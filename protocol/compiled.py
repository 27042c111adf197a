"""The small compiled modules that have a twin in Python: which of both is used.

A module that has one asks at its import, in any thread. They are optional: without a C
compiler at the installation they are not there, and everything works as well.
"""

import importlib
import os
from types import ModuleType

# "0" in the environment, for a diagnosis: use the twins.
SWITCH = "ZEOLITH_COMPILED"


def compiled_module(name: str) -> ModuleType | None:
    """The module; None if it is switched off or was not built."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
