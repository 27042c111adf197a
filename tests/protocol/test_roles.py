"""What roles include, and the table of the reference, which is made from the code."""

from pathlib import Path

import pytest

from zeolith.protocol.methods import METHODS, OPERATION_ROLES, OPERATIONS, TID_ROLE
from zeolith.protocol.roles import (
    CHANGING,
    EVERY_ROLE,
    NO_ROLE,
    AccessRole,
    Roles,
    with_included,
)

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


@pytest.mark.parametrize(
    ("role", "included"),
    [
        ("read", {"read"}),
        ("write", {"read", "write"}),
        ("undo", {"read", "write", "undo"}),
        ("pack", {"read", "pack"}),
        ("admin", {"read", "write", "undo", "pack", "admin"}),
    ],
)
def test_a_role_includes_others(role, included):
    assert with_included([AccessRole(role)]) == included


def test_roles_add_up():
    both = with_included([AccessRole.PACK, AccessRole.UNDO])
    assert both == EVERY_ROLE - {AccessRole.ADMIN}
    assert with_included([]) == NO_ROLE
    assert with_included(AccessRole) == EVERY_ROLE


def test_every_role_but_that_of_nobody_reads():
    """Whoever has a session may load: the short way of a load asks nobody."""
    for role in AccessRole:
        assert AccessRole.READ in with_included([role])
    assert AccessRole.READ not in CHANGING


def needed_by_all() -> dict[str, AccessRole | None]:
    """What each method, each operation and the tid of a transaction need."""
    needed: dict[str, AccessRole | None] = {
        f"`{method.name}`": method.role
        for method in METHODS.values()
        if method.sender == "client"
    }
    for name in OPERATIONS:
        role = OPERATION_ROLES.get(name, AccessRole.WRITE)
        needed[f"operation `{name}`"] = role
    needed["a tid of the client's"] = TID_ROLE
    return needed


def table() -> str:
    """The table of every method by role, as it stands in the reference."""
    columns: list[tuple[str, Roles]] = [("nothing", NO_ROLE)]
    columns += [(f"`{role}`", with_included([role])) for role in AccessRole]
    lines = [
        f"| | {' | '.join(name for name, _roles in columns)} |",
        f"| --- {'| --- ' * len(columns)}|",
    ]
    for what, role in needed_by_all().items():
        cells = ["yes" if role is None or role in had else "" for _n, had in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_the_reference_is_what_the_server_checks():
    assert table() in REFERENCE.read_text(), f"put this into {REFERENCE}:\n{table()}"


def test_sessions_with_the_same_roles_share_one_set():
    """Of hundreds of bytes, for each of thousands of sessions."""
    for role in AccessRole:
        assert with_included([role]) is with_included([role, AccessRole.READ])
