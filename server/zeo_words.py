"""What the file of a ZEO server says and ours does not, and what to write instead.

Whoever comes from ZEO changes his file until ``zeolith check-config`` has nothing to
say. ``advice`` is what it says beside ZConfig's own complaint. Pure.

Their section ``<ssl>`` is not made a section of ours, with which it shares its name:
ZConfig would refuse every file that also imports ZEO, to serve a ZEO server's storage.
"""

import re

_LEFT_OUT = "leave it out"
# Section types and keys of zeo.conf.
_ADVICE = {
    "zeo": "write <zeolith>",
    "ssl": (
        "in <zeolith> write <tls>: certificate and key stay, authenticate FILE is"
        " client-ca FILE and require-client-certificate on, password-function is"
        " key-password-command or key-password-file; in <upstream> write tls-ca,"
        " tls-certificate and tls-key"
    ),
    "runner": f"{_LEFT_OUT}, whatever starts the server has its process id",
    "eventlog": f"{_LEFT_OUT}, the log goes to standard error",
    "invalidation-queue-size": f"{_LEFT_OUT}, the log of the database is read",
    "invalidation-age": f"{_LEFT_OUT}, the log of the database is read",
    "client-conflict-resolution": f"{_LEFT_OUT}, it is always so",
    "msgpack": f"{_LEFT_OUT}, it is always so",
    "pid-filename": f"{_LEFT_OUT}, whatever starts the server has its process id",
    # In <ssl>, where somebody has already written <tls>.
    "authenticate": "write client-ca, and require-client-certificate on",
    "password-function": "write key-password-command or key-password-file",
}
# How ZConfig spells that it does not know a section or a key.
_UNKNOWN = re.compile(
    r"unknown type name: '(?P<type>.+)'"
    r"|no matching section defined for type='(?P<section>.+)', name="
    r"|'(?P<key>.+)' is not a known key name"
)


def advice(complaint: str) -> str | None:
    """What to do about ``complaint`` of ZConfig's, if it is about a word of ZEO's."""
    found = _UNKNOWN.match(complaint)
    if found is None:
        return None
    return _ADVICE.get(found[found.lastgroup or 0])
