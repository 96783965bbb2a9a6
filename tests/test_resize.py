"""The account that bench resize keeps: of a run that is told, without Ray."""

from massl_ray.benches.resize import Account


def progress(step: int, seen: float) -> dict:
    return {"kind": "progress", "life": 1, "step": step, "seen": seen}


def transition(to: int, seen: float) -> dict:
    return {"kind": "transition", "to": to, "seen": seen}


def test_times_count_from_the_first_step():
    account = Account()
    for event in (
        progress(1, 99.0),  # before the first transition nothing is known
        transition(1, 100.0),
        progress(1, 100.5),
        progress(1, 100.6),  # the same step, looked at again
        progress(2, 101.0),
        transition(2, 109.0),
        progress(1, 110.0),  # done again
        progress(0, 111.0),  # a life that has not done any
    ):
        account.follow(event)
    assert account.steps == [(0.5, 1), (1.0, 2), (10.0, 1)]
    assert account.sizes == [(0.0, 1), (9.0, 2)]


def test_figures_are_means_by_event():
    account = Account()
    for name, seconds, repeated in (("add", 10.0, 0), ("add", 14.0, 2), ("kill", 5.0, 3), ("notice", 6.0, 0)):
        account.measured[name].append({"seconds": seconds, "pause_s": seconds / 2, "repeated_steps": repeated})
    assert account.figures() == {
        "add": {"seconds": 12.0, "pause_s": 6.0, "repeated_steps": 1.0},
        "kill": {"seconds": 5.0, "pause_s": 2.5, "repeated_steps": 3.0},
        "notice": {"seconds": 6.0, "pause_s": 3.0, "repeated_steps": 0.0},
    }
