"""The HParams tab, as TensorBoard itself serves it."""

import json
import math
import urllib.request

import pytest
from tensorboard import program

from massl_ray.sweeping.board import write_board
from massl_ray.sweeping.trials import Row, Trial


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_trials_in_the_tab(tmp_path):
    rows = [
        Row(Trial("0", {"memory.size": 512, "model.backbone": "a"}, 3), "finished", "", 1.0, None, 64, 0.5, 10, 10, 7.0, 2.0),
        Row(Trial("1", {"memory.size": 64, "model.backbone": "b"}, 4), "failed", "why", 1.0, None, 64, math.nan, 0, 10, 3.0, 1.0),
        Row(
            Trial("2", {"memory.size": 64, "model.backbone": "b"}, 4),
            "waiting",
            "",
            1.0,
            None,
            0,
            math.nan,
            0,
            0,
            math.nan,
            math.nan,
        ),
    ]
    for _ in range(2):  # anew each time, nothing doubled
        write_board(tmp_path, rows)
    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"])
    url = server.launch()
    wanted = {"experimentName": "", "sliceSize": 100, "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]}
    experiment = ask(url + "data/plugin/hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"memory.size", "model.backbone", "run.seed"}
    names = [metric["name"] for metric in experiment["metricInfos"]]
    assert {name["tag"] for name in names} == {"knn", "effective_rank", "loss"}
    wanted["colParams"] = [{"metric": name} for name in names]
    groups = ask(url + "data/plugin/hparams/session_groups", wanted)["sessionGroups"]
    shown = {}
    for group in groups:
        figures = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        shown[group["hparams"]["memory.size"], group["hparams"]["model.backbone"], group["hparams"]["run.seed"]] = figures
    assert shown == {
        (512.0, "a", 3.0): {"knn": 0.5, "effective_rank": 7.0, "loss": 2.0},
        (64.0, "b", 4.0): {"effective_rank": 3.0, "loss": 1.0},
    }


def ask(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
