"""Scripts of what happens to a run, played against events that are invented."""

from massl_ray.on_ray.practice import Scenario


def progress(step: int, life: int = 1) -> dict:
    return {"kind": "progress", "life": life, "step": step}


def test_a_script_waits_for_steps_and_transitions():
    happened = []

    def script(scenario):
        event = yield from scenario.transition(1)
        happened.append(("begun", event["step"]))
        yield from scenario.steps(3)
        happened.append(("three more", scenario.step))
        yield from scenario.transition(2)
        happened.append(("grown", scenario.life))

    scenario = Scenario(script)
    for event in [progress(0, 0), {"kind": "metrics"}, {"kind": "transition", "to": 1, "step": 5}, progress(6), progress(7)]:
        scenario.meet(event)
    assert happened == [("begun", 5)] and scenario.step == 7
    scenario.meet(progress(8))
    assert happened[1:] == [("three more", 8)]
    scenario.meet({"kind": "transition", "to": 1, "step": 8})  # not the one that is waited for
    assert not scenario.over
    scenario.meet(progress(8, life=2))
    scenario.meet({"kind": "transition", "to": 2, "step": 8})
    assert scenario.over and happened[2:] == [("grown", 2)]
    scenario.meet(progress(9))  # nothing is left to happen
    assert scenario.step == 8
