"""Notes every pickle that is loaded in a process, and what for; used as sitecustomize.

A test puts a copy of this file where a server and the processes that it starts find it
before anything else. Every load, by any of the unpicklers that are installed, becomes a
line of the file ``AUDIT_LOG``: what was done, and in which files, the innermost first.
It imports nothing of the project, so that nothing is there before it.
"""

import json
import os
import pickle
import sys
from typing import Any

LOG = os.environ.get("AUDIT_LOG")
_PICKLES = ("pickle.py", "pickle_3.py", "auditing.py", "sitecustomize.py", "_compat.py")


def note(what: str, detail: str = "") -> None:
    """Append a line to the log."""
    frame: Any = sys._getframe(1)
    where = []
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.endswith(_PICKLES):
            where.append(name)
        frame = frame.f_back
    line = json.dumps({"what": what, "detail": detail, "where": where}) + "\n"
    assert LOG is not None
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        note("find_class", f"{args[0]}.{args[1]}")
    elif event == "os.system":
        note(event)
    elif event == "import" and args[0] == "this":
        note("import", "this")


def _noted(module: Any, name: str) -> None:
    """Let loads by a class in C be noted."""

    class Noted(getattr(module, name)):  # type: ignore[misc]
        def load(self) -> Any:
            note("load")
            return super().load()

        def find_class(self, *names: str) -> Any:
            note("find_class", ".".join(names))
            return super().find_class(*names)

    setattr(module, name, Noted)


def _noted_function(module: Any, name: str) -> None:
    function = getattr(module, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note("load")
        return function(*args, **kwargs)

    setattr(module, name, noted)


def _noted_method(of_class: Any) -> None:
    """Of a class in Python everybody has the same: its methods are replaced."""
    load, find_class = of_class.load, of_class.find_class

    def noted_load(self: Any) -> Any:
        note("load")
        return load(self)

    def noted_find_class(self: Any, *names: str) -> Any:
        note("find_class", ".".join(names))
        return find_class(self, *names)

    of_class.load, of_class.find_class = noted_load, noted_find_class


def install() -> None:
    """From now on loads are noted."""
    import zodbpickle.fastpickle
    import zodbpickle.pickle
    import zodbpickle.pickle_3

    sys.addaudithook(_heard)
    _noted_method(pickle._Unpickler)
    _noted_method(zodbpickle.pickle_3._Unpickler)
    for module in (pickle, zodbpickle.pickle, zodbpickle.fastpickle):
        _noted(module, "Unpickler")
        _noted_function(module, "load")
        _noted_function(module, "loads")


if LOG is not None:
    install()
