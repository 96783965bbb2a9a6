"""How Ray is set, in one place. Each value can be overridden by the environment variable of its name.

Ray Train's own values make a run wait about 75 s after a machine came or went (docs/elasticity.md); most of that is spent waiting
for a worker group that can no longer be placed.
"""

import os
import sys

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

FAST = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # between looks at the workers (2)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2",  # for a placement on machines that are no longer there (60)
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it waits until the deadline; on_ray.supervisor saves and leaves
}

WATCHED = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page of runs
}
"""On a cluster that others look at."""

ALONE = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # polls for that page
}
"""On one of our own, which has no dashboard."""

MEETINGS = "MASSL_RAY_MEETINGS"  # the folder in which workers meet, on a cluster of our own

PRIVATE = {
    "AUTOSCALER_METRIC_PORT": "-1",  # no port: Ray writes that down in its log, and goes on
    "DASHBOARD_METRIC_PORT": "-1",
    "RAY_enable_metrics_collection": "0",
    "GLOO_SOCKET_IFNAME": LOOPBACK,  # collectives go over connections that ask for no token
    "NCCL_SOCKET_IFNAME": LOOPBACK,
}
"""Of a cluster of our own, which is one machine: without the three servers of metrics that answer whoever asks."""

HEAD = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
    "idle_worker_killing_time_threshold_ms": 600_000,
}
"""Of the cluster's head: as `_system_config`, or as RAY_<name> in the environment of `ray start --head`. A machine that vanishes
without closing its connections is given up after about 3 s. Processes that wait for the next task that makes views are kept for
10 minutes: Ray would end those beyond one a CPU after a second, and starting one takes two."""

RESIZE_TIMER_S = 1e9  # Ray Train would kill workers in the middle of a step to resize; ours leave between two


def set_knobs(*, watched: bool = False) -> None:
    """Call before ray.init."""
    for name, value in (QUIET | FAST | (WATCHED if watched else ALONE)).items():
        os.environ.setdefault(name, value)
