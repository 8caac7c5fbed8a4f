"""intentctl prompts train and evaluate: files in, a model's file out, the same figures from it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.core.prompts.cascade import TrainedCascade
from intentd.core.prompts.modelfile import decode_model
from intentd.daemons.ctl import policy, prompts_evaluate, prompts_train


def rows(count: int, split: str, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        right = rng.random() < 0.7
        answers = {"cheap": "7" if right else "8", "dear": "7"}
        answers["other"] = answers["cheap"] if rng.random() < (0.9 if right else 0.1) else "9"
        models = {
            name: {
                "score": int(answer == "7"),
                "parsed_answer": answer,
                "out_tokens": 50,
                "cost_usd": 20.0 if name == "dear" else 0.5,
            }
            for name, answer in answers.items()
        }
        made.append({"split": split, "prompt_id": f"{split}{number}", "models": models})
    return made


@pytest.fixture
def outcomes(tmp_path: Path) -> Path:
    path = tmp_path / "outcomes.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for row in (*rows(300, "train", 1), *rows(200, "dev", 2)):
            file.write(json.dumps(row) + "\n")
    return path


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_cascade_is_trained_and_evaluated_from_its_file(
    outcomes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cascade.model"
    prompts_train.cascade([outcomes], "cheap", ["other"], "dear", out, 0.02, 0, json=True)
    made = printed(capsys)
    assert (made["kind"], made["made"]["files"][0]["file"]) == ("cascade", "outcomes.jsonl.gz")
    assert made["made"]["chosen_on"]["n"] == 300
    trained = decode_model(out.read_bytes())
    assert trained.digest == made["sha256"]
    assert isinstance(trained.model, TrainedCascade)
    assert trained.model.compared == ("other",)
    settings: dict[str, Any] = {"m1": "cheap", "verifier": ["other"], "m2": "dear", "json": True}
    common = {**settings, "threshold": None, "max_loss": 0.02, "seed": 0}
    prompts_evaluate.cascade(outcomes, **common, train=None, model=out)
    from_file = printed(capsys)
    prompts_evaluate.cascade(outcomes, **common, train=[outcomes], model=None)
    assert printed(capsys) == from_file
    assert from_file["n"] == 200  # dev rows alone
    assert from_file["cost_share"] < 1
    with pytest.raises(InputError, match="--train, --model"):
        prompts_evaluate.cascade(outcomes, **common, train=[outcomes], model=out)


def test_what_was_learned_from_is_not_reported_on(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5, "train", 1)))
    with pytest.raises(InputError, match="--test"):
        prompts_evaluate._reported(path)
    path.write_text(json.dumps({"split": "test"}) + "\n" + json.dumps({"split": "dev"}) + "\n")
    assert prompts_evaluate._reported(path) == [{"split": "test"}]
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    assert prompts_evaluate._reported(path) == [{"prompt": "x"}]
    with pytest.raises(InputError, match="--model"):
        prompts_evaluate.load_model(tmp_path / "nothing", "router")
    with pytest.raises(InputError, match=r"train\.jsonl"):
        prompts_evaluate.load_model(path, "router")


def test_a_policy_of_prompts_is_shown_with_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = {
        "threshold": 7.0, "quality": 9.1, "quality_low": 9.0, "escalated": 0.25,
        "cost_nano": 40_000,
    }  # fmt: skip
    unknown = {**option, "threshold": 8.0, "cost_nano": None}
    why = {
        "because": "quality 9.1 for at least 9, at least cost", "outcomes": 512.0,
        "expected": option, "options": [option, unknown],
    }  # fmt: skip
    policy.show_prompts(
        {
            "body": {
                "service_types": [
                    {"name": "t", "strategy": "verify", "threshold": 7.0},
                    {"name": "rolled back", "strategy": "route", "threshold": 0.05},
                ],
                "models": [{"name": "m", "cooldown_s": 20.0}],
                "budgets": [{"scope": "global", "unit": "requests", "limit": 9, "period": "day"}],
            },
            "inputs": {"service_types": {"t": why}},
        }
    )
    text = capsys.readouterr().out
    for part in (
        "verify threshold 7",
        "512 outcomes",
        "7 *",
        "25.0%",
        "0.000040 $",
        "20 s",
        "9 req",
    ):
        assert part in text
