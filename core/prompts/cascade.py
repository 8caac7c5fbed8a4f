"""When the cheap answer is not enough: a verifier's score, or agreement of cheap models.

The verifier cascade is the chapter's (section 4.3.3). Agreement needs no judge: several cheap
models answer, and what tells of a wrong answer is who agrees with whom, how much was written, and
how. Both end in "escalate or not" for a threshold, so that a replay of recorded answers and the
proxy decide alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import InputError

JUDGE_PROMPT: Final = (
    "You judge answers. Read the question and the answer, then rate the answer's correctness, "
    "completeness and usefulness from 1 (wrong or useless) to 10 (as good as can be). "
    "Answer with the number alone."
)
JUDGE_TOKENS: Final = 8
JUDGED_CHARS: Final = 12_000
_OF_TEN: Final = re.compile(r"(?:/|\bout of\b)\s*10\b")
_NUMBER: Final = re.compile(r"(?<![\d.-])(\d{1,2})(?:\.\d+)?(?!\d|[./-]\d)")
_FINAL: Final = re.compile(
    r"(?:####|\\boxed\{|(?:final )?answer(?: is)?\s*[:=\"]*)\s*([^\n\"}]+)", re.IGNORECASE
)
_NUMERAL: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HEDGES: Final = re.compile(
    r"\b(?:cannot|can't|unclear|not sure|assume[sd]?|assuming|however|wait|actually|approximately|"
    r"ambiguous|mistake|re-?check|unable|sorry)\b",
    re.IGNORECASE,
)


def judge_messages(prompt: str, answer: str) -> tuple[dict[str, str], ...]:
    """What the verifier is asked."""
    return (
        {"role": "system", "content": JUDGE_PROMPT},
        {
            "role": "user",
            "content": f"Question:\n{prompt[:JUDGED_CHARS]}\n\nAnswer:\n{answer[:JUDGED_CHARS]}",
        },
    )


def parse_score(text: str) -> int | None:
    """The verifier's 1 to 10, or None when the text names none or several different ones."""
    found = {int(match) for match in _NUMBER.findall(_OF_TEN.sub("", text))}
    if len(found) != 1:
        return None
    (score,) = found
    return score if 1 <= score <= 10 else None


def escalates(score: float | None, threshold: float) -> bool:
    """M2 is asked when the score lies below the threshold, and when there is no score."""
    return score is None or score < threshold


def check_threshold(threshold: object, field: str = "threshold") -> float:
    """A verifier threshold, 0 (never escalates) to 11 (always). Raises InputError."""
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, (int, float))
        or not 0 <= threshold <= 11
    ):
        raise InputError(field, threshold, "a number from 0 to 11")
    return float(threshold)


def final_answer(text: str) -> str:
    """What an answer comes to, for comparison: the marked final answer, else the last line.

    Numbers are spelled one way (1,000.0 is 1000); case, spaces and closing marks do not count.
    """
    marked: list[str] = _FINAL.findall(text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = marked[-1] if marked else (lines[-1] if lines else "")
    return normal_answer(last)


def normal_answer(answer: object) -> str:
    """One spelling of a short answer; "" for none."""
    if answer is None:
        return ""
    text = " ".join(str(answer).split()).strip(" .,:;!*`$\"'").casefold()
    numerals = _NUMERAL.findall(text)
    if len(numerals) == 1 and len(text) <= len(numerals[0]) + 12 and "[" not in text:
        plain: str = numerals[0].replace(",", "")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return text


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's answer as the cascade sees it: what it comes to, how long, its text."""

    answer: str
    out_tokens: int
    text: str = ""


FEATURES: Final = (
    "agree_share",
    "nobody_agrees",
    "others_agree_on_another",
    "distinct_share",
    "no_answer",
    "log_out_tokens",
    "log_longest_by_shortest",
    "log_first_by_mean",
    "hedges",
    "answer_chars",
)


def agreement_features(first: Answered, others: Sequence[Answered]) -> tuple[float, ...]:
    """FEATURES of a cheap answer beside those of other cheap models. Raises InputError for none."""
    if not others:
        raise InputError("others", (), "at least one answer to compare with")
    same = [one.answer == first.answer and first.answer != "" for one in others]
    against = [one.answer for one in others if one.answer != first.answer and one.answer]
    all_answers = [first.answer, *(one.answer for one in others)]
    lengths = [max(1, one.out_tokens) for one in (first, *others)]
    mean = sum(lengths) / len(lengths)
    return (
        sum(same) / len(same),
        float(not any(same)),
        float(len(against) > len(set(against))),
        (len(set(all_answers)) - 1) / len(others),
        float(first.answer == ""),
        math.log(lengths[0]),
        math.log(max(lengths) / min(lengths)),
        math.log(lengths[0] / mean),
        min(5, len(_HEDGES.findall(first.text))) / 5.0,
        min(200, len(first.answer)) / 100.0,
    )


@dataclass(frozen=True, slots=True)
class AgreementModel:
    """The chance that the cheap answer is wrong and the dear one right, from FEATURES.

    weights, centres, scales: one a feature. A logistic regression fitted by
    `controller.search.prompts_cascade`.
    """

    weights: tuple[float, ...]
    bias: float
    centres: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("weights", "centres", "scales"):
            if len(getattr(self, name)) != len(FEATURES):
                raise InputError(name, getattr(self, name), f"{len(FEATURES)} numbers")
        if not all(scale > 0 for scale in self.scales):
            raise InputError("scales", self.scales, "numbers > 0")

    def chance_wrong(self, features: Sequence[float]) -> float:
        total = self.bias
        for value, weight, centre, scale in zip(
            features, self.weights, self.centres, self.scales, strict=True
        ):
            total += weight * (value - centre) / scale
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, total))))


@dataclass(frozen=True, slots=True)
class TrainedCascade:
    """An agreement cascade fitted for its models: escalate where the chance reaches threshold."""

    agreement: AgreementModel
    threshold: float
    first: str = ""
    compared: tuple[str, ...] = ()
    second: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError("threshold", self.threshold, "a chance from 0 to 1")


# Before anything was learned: wrong unless most agree. Length and style do not count.
PRIOR_AGREEMENT: Final = AgreementModel(
    weights=(-2.0, 1.0, 1.0, 0.5, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    bias=0.0,
    centres=(0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    scales=(0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
)
