"""Storages that change records on their way: compressed, encrypted, in hexadecimal.

ZODB calls them wrappers (IStorageWrapper). There are two kinds, and a stack may have
both. One *converts*: what is stored through it is changed, and what is loaded is
changed back. The other *passes* records as they are, because clients have changed them
already, and only knows how to look into them; its ``loadBefore`` is that of what it
stands on.

Pure but for the wrappers' own functions; any thread.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ZODB.interfaces import IStorageWrapper

Conversion = Callable[[bytes], bytes]


def _as_it_is(record: bytes) -> bytes:
    return record


class Form(NamedTuple):
    """How a storage takes and gives records, against the pickles that they are."""

    decode: Conversion = _as_it_is
    encode: Conversion = _as_it_is


PLAIN = Form()


def wrappers(storage: Any) -> Iterator[Any]:
    """The wrappers that ``storage`` is made of, the outermost first."""
    while IStorageWrapper.providedBy(storage) and hasattr(storage, "base"):
        yield storage
        storage = storage.base


def passes(wrapper: Any) -> bool:
    """Whether records go through ``wrapper`` as they are."""
    # It has the methods of its base as its own attributes, or hands on to them.
    return "loadBefore" in vars(wrapper) or not hasattr(type(wrapper), "loadBefore")


def form_of(storage: Any) -> Form:
    """The form of the records that go into and come out of ``storage``."""
    form = PLAIN
    for wrapper in wrappers(storage):
        if not passes(wrapper):
            break
        form = Form(wrapper.untransform_record_data, wrapper.transform_record_data)
    return form


def bottom(storage: Any) -> Any:
    """What the wrappers of ``storage`` stand on; itself if it is none."""
    for wrapper in wrappers(storage):
        storage = wrapper.base
    return storage


def outside(storage: Any) -> Form | None:
    """The form of the records at the bottom, against what comes out of ``storage``.

    None if only the wrappers can tell, because they are of both kinds.
    """
    stack = list(wrappers(storage))
    passing = [passes(wrapper) for wrapper in stack]
    if all(passing):
        return PLAIN
    if any(passing):
        return None
    return Form(stack[-1].untransform_record_data, stack[-1].transform_record_data)
