"""Decisions of the prompts application on recorded data, beside published figures.

    python -m benchmarks.prompts_decisions --data data/llm [--only routing,cache] [--out DIR] --json

--out: pictures of the cost-quality curves, and the figures as a Markdown table.

Everything is learned from the train rows of the files, and every setting and threshold is chosen on
them too, by folds; the dev rows are reported, nothing else. The data are those of the README in
that directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import prompts_analogues, prompts_pictures
from intentd.controller.search import (
    prompts_cache,
    prompts_cascade,
    prompts_data,
    prompts_routing,
    prompts_traffic,
    prompts_training,
)
from intentd.controller.search.prompts_data import CachedEmbedder, default_cache, read_rows

WEAK: Final = "Mixtral-8x7B-Instruct-v0.1"
STRONG: Final = "gpt-4-1106-preview"
SMALL: Final = "gpt-4o-mini-2024-07-18"
HAIKU: Final = "claude-3-haiku-20240307"
LLAMA: Final = "Meta-Llama-3.1-8B-Instruct"
GEMMA: Final = "gemma-2-2b-it"
PHI: Final = "Phi-3.5-mini-instruct"
SONNET: Final = "claude-3-5-sonnet-20241022"
GPT4O: Final = "gpt-4o-2024-08-06"
OPUS: Final = "claude-3-opus-20240229"
CHEAP: Final = (LLAMA, GEMMA, PHI, HAIKU)
# (name, file, dear model, bar: share of its cost); which cheap models to compare with is chosen
CASCADES: Final = (
    ("GSM8K, Sonnet", "zeroeval_gsm", SONNET, 0.22),
    ("GSM8K, GPT-4o", "zeroeval_gsm", GPT4O, 0.26),
    ("GSM8K, Opus", "zeroeval_gsm", OPUS, 0.12),
    ("CRUX, Sonnet", "zeroeval_crux", SONNET, 0.58),
)
MAX_LOSS: Final = 0.01
# a share of the bar is asked for on train rows, so that other rows, which differ, keep the bar
COST_MARGIN: Final = 0.95
# of served answers that may be wrong online, and the share of them that somebody checks
WRONG_OF_HITS: Final = 0.05
CHECKED: Final = 0.25
CACHE_FILES: Final = ("clinc150", "banking77", "alexa_cqr_clusters", "gptcache_mock")
CACHE_BARS: Final = (0.44, 0.45, 0.64, 0.43)
# arXiv:2406.18665, tables 1 to 3: best router, (CPT50, CPT80, APGR)
PUBLISHED_ROUTING: Final = {"mmlu": (0.354, 0.716, 0.603), "gsm8k": (0.336, 0.633, 0.622)}
ROUTING_BARS: Final = {"mmlu": 0.66, "gsm8k": 0.68}
ROUTING_CPT80: Final = {"mmlu": 0.57}


def rows_of(data: Path, part: str, name: str, split: str) -> list[dict[str, Any]]:
    return read_rows(data / part / f"{name}.jsonl.gz", split=split)


def routing(data: Path, embed: Any) -> dict[str, Any]:
    result = {}
    for target, bar in ROUTING_BARS.items():
        files = {name: data / "routing" / f"routellm_{name}.jsonl.gz" for name in ROUTING_BARS}
        own, other = files[target], [path for name, path in files.items() if name != target]
        rows = prompts_data.reported_rows(own)
        model, _ = prompts_training.train_routing([own], embed, weak=WEAK, strong=STRONG)
        test = prompts_routing.outcomes_of(rows, WEAK, STRONG)
        found = prompts_routing.evaluate_routing(model, test, embed)
        found |= prompts_training.routing_extras(
            model, [own], other, rows, embed, weak=WEAK, strong=STRONG
        )
        cpt50, cpt80, apgr = PUBLISHED_ROUTING[target]
        found["published_best"] = {"cpt50": cpt50, "cpt80": cpt80, "apgr": apgr}
        found["bar_apgr"], found["bar_cpt80"] = bar, ROUTING_CPT80.get(target)
        found["met"] = found["apgr"] >= bar and found["cpt80"] <= ROUTING_CPT80.get(target, 1.0)
        result[target] = found
        print(f"routing {target}: APGR {found['apgr']}", file=sys.stderr)
    return result


def cascade(data: Path, embed: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    lost, prompts = {}, {}
    for name, file, dear, bar in CASCADES:
        train = rows_of(data, "routing", file, "train")
        compared, model, chosen = prompts_cascade.choose_within(
            train, SMALL, CHEAP, dear, max_loss=MAX_LOSS, max_cost_share=bar * COST_MARGIN
        )
        reported = rows_of(data, "routing", file, "dev")
        test = prompts_cascade.replay_of(reported, SMALL, compared, dear)
        escalated = prompts_cascade.doubts(model.agreement, test) >= model.threshold
        found = prompts_cascade.score_cascade(np.asarray(escalated), test)
        found |= {"m1": SMALL, "compared": list(compared), "m2": dear, "bar_cost_share": bar}
        found["chosen_on"] = chosen
        found["met"] = found["cost_share"] <= bar
        result[name] = found
        found["by_loss"] = by_loss(train, reported, dear)
        found["by_cost"] = by_cost(train, reported, dear, bar)
        found["curve"] = prompts_cascade.curve(prompts_cascade.doubts(model.agreement, test), test)
        gain = test.quality_second - test.quality_first
        lost[name], prompts[name] = np.where(escalated, 0.0, gain), test.prompts
        print(f"cascade {name}: {found['cost_share']} of the cost", file=sys.stderr)
    result["pooled"] = prompts_cascade.pooled_loss(lost, prompts, seed=0)
    result["pooled"] |= {"bar": MAX_LOSS, "met": result["pooled"]["mean_loss"] <= MAX_LOSS}
    return result


def by_loss(train: Any, reported: Any, dear: str) -> dict[str, Any]:
    """The same cascade bound by loss alone: the least cost within it."""
    return shortly(
        prompts_cascade.choose_compared(train, SMALL, CHEAP, dear, max_loss=MAX_LOSS),
        reported,
        dear,
    )


def by_cost(train: Any, reported: Any, dear: str, bar: float) -> dict[str, Any]:
    """The same cascade bound by cost alone: the least loss within it."""
    return shortly(
        prompts_cascade.choose_within_cost(
            train, SMALL, CHEAP, dear, max_cost_share=bar * COST_MARGIN
        ),
        reported,
        dear,
    )


def shortly(made: Any, reported: Any, dear: str) -> dict[str, Any]:
    compared, model, chosen = made
    test = prompts_cascade.replay_of(reported, SMALL, compared, dear)
    escalated = prompts_cascade.doubts(model.agreement, test) >= model.threshold
    found = prompts_cascade.score_cascade(np.asarray(escalated), test)
    kept = {key: found[key] for key in ("cost_share", "loss", "loss_95")}
    return {"compared": list(compared), "chosen_on": chosen, **kept}


def cache(data: Path, embed: Any) -> dict[str, Any]:
    train = {name: rows_of(data, "cache", name, "train") for name in CACHE_FILES}
    test = {name: rows_of(data, "cache", name, "dev") for name in CACHE_FILES}
    model, chosen = prompts_cache.fit_gate(train, embed, max_false_hit=0.03)
    measured = prompts_cache.measure(model, test, embed, 0)
    found = prompts_cache.report(measured, model.threshold)
    for name, bar in zip(CACHE_FILES, CACHE_BARS, strict=True):
        found["sets"][name] |= {"bar": bar, "met": found["sets"][name]["hit_rate"] >= bar}
    found["chosen_on"] = chosen
    found["oracle_hits_by_false_hit_rate"] = prompts_traffic.oracle(measured)
    found["curves"] = prompts_traffic.curve(measured)
    found["traffic"] = prompts_traffic.simulate(
        measured, model.threshold, target=WRONG_OF_HITS, checked=CHECKED
    )
    print(f"cache: {found['hit_rate']} hits", file=sys.stderr)
    return found


def context(data: Path, embed: Any) -> dict[str, Any]:
    return prompts_analogues.context(data)


def verification(data: Path, embed: Any) -> dict[str, Any]:
    return prompts_analogues.verification(data)


def facts(data: Path, embed: Any) -> dict[str, Any]:
    return prompts_analogues.facts(data, embed)


STUDIES: Final[dict[str, Callable[[Path, Any], dict[str, Any]]]] = {
    "routing": routing,
    "cascade": cascade,
    "cache": cache,
    "context": context,
    "verification": verification,
    "facts": facts,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="directory of recorded data (data/llm)")
    parser.add_argument("--only", default=",".join(STUDIES), help="studies, comma-separated")
    parser.add_argument("--out", type=Path, help="directory for pictures and the table")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = set(names) - set(STUDIES)
    if unknown:
        text = f"--only: got {', '.join(sorted(unknown))}, expected {', '.join(STUDIES)}"
        print(text, file=sys.stderr)
        return 2
    data = options.data or Path("data/llm")
    if not data.is_dir():
        # the data are not part of the repository: without --data there is nothing to measure
        print(f"--data: got {data}, expected a directory", file=sys.stderr)
        print(json.dumps({"skipped": f"no directory {data}"}))
        return 2 if options.data else 0

    lazy: list[Any] = []

    def embed(texts: Any) -> Any:
        from intentd.proxy.minilm import MiniLM

        print(f"embedding {len(texts)} texts", file=sys.stderr)
        if not lazy:
            lazy.append(MiniLM())
        return lazy[0].embed(texts)

    cached = CachedEmbedder(embed, default_cache())
    result = {name: STUDIES[name](data, cached) for name in names}
    if options.out is not None:
        shown = result | ({"traffic": result["cache"]["traffic"]} if "cache" in result else {})
        for path in prompts_pictures.draw(shown, options.out):
            print(path, file=sys.stderr)
        (options.out / "figures.md").write_text(prompts_pictures.table(shown), encoding="utf-8")
    print(json.dumps(result, indent=None if options.json else 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
