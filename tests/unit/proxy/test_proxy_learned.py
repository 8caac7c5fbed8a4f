"""Trained cascades and context choosers named in the configuration, or refused by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intentd.core.errors import ConfigError
from intentd.core.prompts import chooser
from intentd.core.prompts.cascade import PRIOR_AGREEMENT, AgreementModel, TrainedCascade
from intentd.core.prompts.modelfile import encode_model
from intentd.core.prompts.router import Trees
from intentd.proxy.config import LearnedSection
from intentd.proxy.learned import load_learned

TYPE = {
    "name": "frugal",
    "stages": [{"context": ["chooser"]}, {"model": "one", "models": ["m"]}],
}


def never(levels: int) -> chooser.ChooserModel:
    """Sure that no message is needed."""
    one = Trees(
        np.array([[-1]]), np.zeros((1, 1)), np.zeros((1, 1), int), np.zeros((1, 1), int),
        np.array([[-9.0]]),
    )  # fmt: skip
    return chooser.ChooserModel((one,) * levels, 0.5, 0.5)


async def kept(site: Any) -> list[int]:
    counts = []
    for prompt in ("a", "b", "c"):
        _, answer, _ = await site.post(
            "/v1/request", {"prompt": prompt, "service_type": "frugal", "conversation": "c"}
        )
        counts.append(answer["metadata"]["context"]["messages"])
    return counts


async def test_a_trained_chooser_decides_how_much_context_goes_along(
    site: Any, tmp_path: Path
) -> None:
    path = tmp_path / "context.model"
    path.write_bytes(encode_model(never(len(chooser.LEVELS) - 1), {}))
    await site.start(service_types=[TYPE])
    assert await kept(site) == [0, 1, 2]
    learned = {"context_file": str(path)}
    await site.proxy.reload(site.config(service_types=[TYPE], learned=learned))
    assert await kept(site) == [0, 0, 0]


async def test_agreement_is_the_trained_one(site: Any, tmp_path: Path) -> None:
    path = tmp_path / "cascade.model"
    model = AgreementModel((1.0,) * 10, 3.0, (0.0,) * 10, (1.0,) * 10)
    path.write_bytes(encode_model(TrainedCascade(model, 0.4), {}))
    await site.start(learned={"cascade_file": str(path)})
    assert site.proxy.api.driver.agreement == model
    await site.proxy.reload(site.config())
    assert site.proxy.api.driver.agreement == PRIOR_AGREEMENT


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cascade_file"):
        load_learned(LearnedSection(cascade_file=str(tmp_path / "none")))
    path = tmp_path / "x"
    path.write_bytes(encode_model(TrainedCascade(PRIOR_AGREEMENT, 0.4), {}))
    with pytest.raises(ConfigError, match="context_file"):
        load_learned(LearnedSection(context_file=str(path)))
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cascade_file"):
        load_learned(LearnedSection(cascade_file=str(path)))
