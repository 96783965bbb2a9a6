"""What comes next in a sweep: a pure function of what came out so far, so that it is the same however often the sweep was ended."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from massl_ray.config import Config, resolve
from massl_ray.config.space import TRIES, Point, Sweep, Values, why_not
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator, seed_for
from massl_ray.sweeping.trials import HIGHER, Row, Trial, scores, trials_of

LAST = 4  # one in so many members of a population goes on from another one's checkpoint
STEP = 1.25  # factor that a number changes by then, up or down


def next_trials(sweep: Sweep, base: Config, dataset_size: int, past: Sequence[Row]) -> list[Trial]:
    """The trials of the next round, given those of all rounds before, which are over. None: the sweep is."""
    if sweep.sweep.scheduler == "population":
        return _next_generation(sweep, base, dataset_size, past)
    if sweep.sweep.search == "optuna":
        return _by_optuna(sweep, base, dataset_size, past)
    return []


def check_search(sweep: Sweep) -> None:
    """Raises UserError where Optuna is wanted and not there."""
    if sweep.sweep.search == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError("sweep.search optuna needs Optuna: pip install 'massl-ray[optuna]'.") from None


def stop_of(sweep: Sweep, base: Config, dataset_size: int, generation: int) -> int | None:
    """Step at which a generation ends; None where there are none."""
    if sweep.sweep.scheduler != "population":
        return None
    return max(1, round(resolve(base, dataset_size).steps * (generation + 1) / sweep.sweep.generations))


def _next_generation(sweep: Sweep, base: Config, dataset_size: int, past: Sequence[Row]) -> list[Trial]:
    """Source: population based training with truncation selection and perturbation (Jaderberg et al. 2017)."""
    generation = 1 + max(row.trial.generation for row in past)
    if generation == sweep.sweep.generations:
        return []
    stop_at = stop_of(sweep, base, dataset_size, generation)
    rows = [row for row in past if row.trial.generation == generation - 1]
    sign = 1 if HIGHER[sweep.sweep.metric] else -1
    values = [row.metric(sweep.sweep.metric) if row.status == "finished" else math.nan for row in rows]
    ranks = sorted(range(len(rows)), key=lambda member: (math.isnan(values[member]), -sign * values[member]))
    alive = [member for member in ranks if not math.isnan(values[member])]
    if not alive:
        return []
    few = max(1, len(rows) // LAST)
    best = alive[:few]
    replaced = set(ranks[len(rows) - few :]) | {member for member in ranks if member not in alive}
    trials = []
    for member, row in enumerate(rows):
        point, parent = row.trial.point, row.trial.name
        if member in replaced and member not in best:
            draws = generator(Stream.SWEEP, row.trial.seed, generation, member)
            chosen = rows[best[int(draws.integers(len(best)))]].trial
            point, parent = _a_step_away(sweep, base, dataset_size, chosen.point, draws), chosen.name
        name = f"{row.trial.name.removesuffix(f'-gen-{generation - 1}')}-gen-{generation}"
        trials.append(replace(row.trial, name=name, point=point, parent=parent, generation=generation, stop_at=stop_at))
    return trials


def _a_step_away(sweep: Sweep, base: Config, dataset_size: int, point: Point, draws: Any) -> Point:
    """Every setting one step up or down, at an edge of the space inwards; the point itself if none of the draws can be run."""
    for _ in range(TRIES):
        moved = {key: _moved(values, point[key], bool(draws.integers(2))) for key, values in sweep.space.items()}
        if why_not(sweep, base, moved, dataset_size) is None:
            return moved
    return point


def _moved(values: Values, value: Any, up: bool) -> Any:
    if values.listed:
        place, last = values.listed.index(value), len(values.listed) - 1
        up = place == 0 or (up and place < last)
        return values.listed[min(place + 1, last) if up else place - 1]
    low, high = values.bounds
    up = value / STEP < low or (up and value * STEP <= high)
    return min(value * STEP, high) if up else value / STEP


def _by_optuna(sweep: Sweep, base: Config, dataset_size: int, past: Sequence[Row]) -> list[Trial]:
    """By a tree-structured Parzen estimator of all points there are, seeded by how many that is."""
    known = {str(row.trial.point) for row in past}
    left = min(sweep.sweep.round, sweep.sweep.points - len(known))
    if left <= 0:
        return []
    points = []
    for point in _suggestions(sweep, past, len(known)):
        if str(point) not in known and why_not(sweep, base, point, dataset_size) is None:
            known.add(str(point))
            points.append(point)
        if len(points) == left:
            break
    return trials_of(points, sweep.sweep.seeds, first=len(known) - len(points), of=sweep.sweep.points)


def _suggestions(sweep: Sweep, past: Sequence[Row], number: int) -> Iterator[Point]:
    import optuna  # an extra

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: _distribution(values) for key, values in sweep.space.items()}
    seed = seed_for(Stream.SWEEP, sweep.sweep.seeds[0], number) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
    study = optuna.create_study(direction="maximize" if HIGHER[sweep.sweep.metric] else "minimize", sampler=sampler)
    for score in scores(past, sweep.sweep.metric, of=("finished", "stopped early")):
        parameters = {key: _coded(values, score.point[key]) for key, values in sweep.space.items()}
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=space, value=score.mean))
    for _ in range(TRIES):
        asked = study.ask(space)
        yield {key: _decoded(values, asked.params[key]) for key, values in sweep.space.items()}


def _distribution(values: Values) -> Any:
    """Listed numbers by their place, so that neighbours count as near; choices are in no order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choice:
        return CategoricalDistribution(range(len(values.listed)))
    if values.listed:
        return IntDistribution(0, len(values.listed) - 1)
    return FloatDistribution(*values.bounds, log=values.log_uniform is not None)


def _coded(values: Values, value: Any) -> Any:
    return values.listed.index(value) if values.listed else value


def _decoded(values: Values, code: Any) -> Any:
    return values.listed[code] if values.listed else code
