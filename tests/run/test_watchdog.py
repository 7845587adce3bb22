"""A hang is told once; slow steps are none."""

import time

from stablelm_jax.run.watchdog import Watchdog


class Result:
    """A step's array, ready or not."""

    def __init__(self):
        self.ready = False

    def is_ready(self):
        return self.ready


def test_the_watchdog_tells_of_a_hang_and_not_of_slow_steps():
    told = []
    watchdog = Watchdog(0.5, lambda step, why: told.append((step, why)))
    watchdog.start(0)
    for _ in range(10):
        result = Result()
        watchdog.step(1, result)
        time.sleep(0.1)
        result.ready = True
    time.sleep(0.2)
    assert not told and watchdog.limit() >= 0.5
    watchdog.step(1, Result())
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(told) == 1 and told[0][0] == 1 and "nothing moved for" in told[0][1]


def test_the_limit_of_a_hang_grows_with_the_median_step():
    watchdog = Watchdog(0.01, lambda step, why: None)
    watchdog._seconds.extend([1.0, 2.0, 90.0])
    assert watchdog.limit() == 20.0
