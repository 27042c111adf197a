"""Where the time goes: what strace counted, and a profile of a row."""

import pytest

from . import compare, profiling, rows
from .test_rows import SMALLEST

STRACE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.54    0.000016           4         4           read
 38.46    0.000010           1        10         2 epoll_wait
  0.00    0.000000           0         1           write
------ ----------- ----------- --------- --------- ----------------
100.00    0.000026           1        15         2 total
"""


def test_system_calls_are_read_with_and_without_errors():
    assert profiling.parsed_calls(STRACE) == {"read": 4, "epoll_wait": 10, "write": 1}


def test_no_system_calls_are_read_from_what_strace_says_instead():
    assert profiling.parsed_calls("strace: attach: Operation not permitted\n") == {}


@pytest.mark.slow
def test_a_profile_names_what_an_operation_costs_and_the_functions_of_the_loop():
    (trial,) = [
        each for each in rows.trials(SMALLEST) if each.rows[0].key == "loads-16p"
    ]

    with compare.standing(None) as stand:
        found = profiling.markdown(
            trial, ["zeolith"], SMALLEST, stand.fresh, stand.folder
        )

    assert "CPU of the server, us" in found
    assert "voluntary switches of the clients" in found
    assert "server/peer.py" in found
