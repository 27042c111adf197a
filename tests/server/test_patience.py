from zeolith.server.patience import Patience


def test_nobody_is_waited_for_at_first():
    assert not Patience().is_over(1e9, 1)


def test_it_is_over_when_the_time_is_up():
    patience = Patience()
    patience.begins(100)
    assert not patience.is_over(129.9, 30)
    assert patience.is_over(130, 30)


def test_time_does_not_count_while_the_server_works():
    patience = Patience()
    patience.begins(100)
    patience.pauses(110)
    assert not patience.is_over(1000, 30)
    patience.begins(1000)
    assert not patience.is_over(1019, 30)
    assert patience.is_over(1020, 30)


def test_pausing_twice_counts_once():
    patience = Patience()
    patience.begins(100)
    patience.pauses(110)
    patience.pauses(200)
    patience.begins(300)
    assert not patience.is_over(319, 30)


def test_nobody_is_waited_for_after_the_end():
    patience = Patience()
    patience.begins(100)
    patience.ends()
    assert not patience.is_over(1000, 30)
