from intentd.testbed.lab import processor_times, steal_share


def test_steal_is_the_share_of_ticks_given_to_others() -> None:
    assert steal_share((1000, 10), (1200, 14)) == 0.02
    assert steal_share((1000, 10), (1000, 10)) == 0.0


def test_processor_times_grow() -> None:
    total, stolen = processor_times()
    assert 0 <= stolen <= total
    assert processor_times() >= (total, stolen)
