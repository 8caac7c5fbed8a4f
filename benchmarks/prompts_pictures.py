"""Cost-quality curves of `benchmarks.prompts_decisions` as pictures, and its figures as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """PNG files of whatever studies the result holds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    made = []
    for name, painter in _PAINTERS.items():
        if name not in result:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        painter(axes, result[name])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        made.append(path)
    return made


def _routing(axes: Any, found: Mapping[str, Any]) -> None:
    for target, one in found.items():
        shares, recovered = zip(*one["curve"], strict=True)
        (line,) = axes.plot(shares, recovered, label=f"{target}: APGR {one['apgr']:.3f}")
        best = one["published_best"]
        axes.plot(
            [best["cpt50"], best["cpt80"]], [0.5, 0.8], "x", color=line.get_color(),
            label=f"{target}: RouteLLM's best",
        )  # fmt: skip
    axes.plot([0, 1], [0, 1], ":", color="grey", label="random")
    axes.set(xlabel="share of calls to the dear model", ylabel="gap recovered", title="Routing")


def _cascade(axes: Any, found: Mapping[str, Any]) -> None:
    for name, one in found.items():
        if "curve" in one:
            costs, losses = zip(*one["curve"], strict=True)
            (line,) = axes.plot(costs, losses, label=name)
            axes.plot([one["cost_share"]], [one["loss"]], "o", color=line.get_color())
    axes.axhline(0.01, ls=":", color="grey", label="one point")
    axes.set(xlabel="cost beside the dear model alone", ylabel="quality lost", xlim=(0, 1.05),
             title="Agreement cascades; dots: the threshold chosen on train rows")  # fmt: skip


def _cache(axes: Any, found: Mapping[str, Any]) -> None:
    for name, points in found["curves"].items():
        false, hits = zip(*points, strict=True)
        (line,) = axes.plot(false, hits, label=name)
        one = found["sets"][name]
        axes.plot([one["false_hit_rate"]], [one["hit_rate"]], "o", color=line.get_color())
    axes.axvline(0.03, ls=":", color="grey")
    axes.set(xlabel="wrong answers a query", ylabel="hits a query", xlim=(0, 0.12),
             title="Cache, half stored; dots: the one threshold")  # fmt: skip


def _context(axes: Any, found: Mapping[str, Any]) -> None:
    for name, one in found["strategies"].items():
        axes.plot([one["tokens_vs_none"]], [one["enough_context"]], "o", label=name)
    axes.set(xlabel="input tokens beside none", ylabel="turns with enough context",
             title="Context (analogue of figures 4.1 and 4.6)")  # fmt: skip


def _verification(axes: Any, found: Mapping[str, Any]) -> None:
    for name, one in found["strategies"].items():
        below = one["below_m2"]
        shares = [place / (len(below) - 1) for place in range(len(below))]
        axes.plot(below, shares, label=f"{name} (M2 asked {one['asks_m2']:.0%})")
    axes.set(xlabel="points below M2's answer", ylabel="share of answers",
             title="Verification (analogue of figure 4.4)")  # fmt: skip


def _traffic(axes: Any, found: Mapping[str, Any]) -> None:
    names = [row["traffic"] for row in found["phases"]]
    places = range(len(names))
    for kind, mark in (("fixed", "s--"), ("online", "o-")):
        axes.plot(places, [row[kind]["settled"] for row in found["phases"]], mark, label=kind)
    axes.axhline(found["target_of_hits"], ls=":", color="grey", label="asked for")
    axes.set_xticks(list(places), names, rotation=20, fontsize=7)
    axes.set(ylabel="served answers that are wrong", title="The gate while traffic changes")


_PAINTERS = {
    "routing": _routing,
    "cascade": _cascade,
    "cache": _cache,
    "context": _context,
    "verification": _verification,
    "traffic": _traffic,
}


def table(result: Mapping[str, Any]) -> str:
    """Ours beside the bars and what others published, as Markdown."""
    rows = [("figure", "ours", "bar", "published, or of the chapter")]
    rows += [row for name, lines in _ROWS.items() if name in result for row in lines(result[name])]
    rows.insert(1, ("---",) * 4)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


Row = tuple[str, str, str, str]


def _routing_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for target, one in found.items():
        best = one["published_best"]
        low, high = one["apgr_95"]
        floor = one["floor"]
        yield (f"routing {target}: APGR", f"{one['apgr']:.3f} ({low:.3f} to {high:.3f})",
               f">= {one['bar_apgr']}", f"{best['apgr']} (RouteLLM's best)")  # fmt: skip
        yield (f"routing {target}: CPT50, CPT80", f"{one['cpt50']:.1%}, {one['cpt80']:.1%}",
               f"CPT80 <= {one['bar_cpt80']:.0%}" if one["bar_cpt80"] else "",
               f"{best['cpt50']:.1%}, {best['cpt80']:.1%}")  # fmt: skip
        low, high = floor["difference_95"]
        yield (f"routing {target}: over the TF-IDF floor ({floor['apgr']:.3f})",
               f"{floor['difference']:+.3f} ({low:+.3f} to {high:+.3f})", "> 0", "")  # fmt: skip
        yield f"routing {target}: 200 labels", f"{one['few']['apgr']:.3f}", "> .5", ""
        if "unlabelled" in one:
            low, high = one["unlabelled"]["apgr_95"]
            yield (f"routing {target}: no labels of its kind",
                   f"{one['unlabelled']['apgr']:.3f} ({low:.3f} to {high:.3f})", ">= .5",
                   "")  # fmt: skip


def _cascade_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, one in found.items():
        if name == "pooled":
            low, high = one["mean_loss_95"]
            yield (f"cascades pooled: mean loss, {one['prompts']} prompts",
                   f"{one['mean_loss']:+.4f} ({low:+.4f} to {high:+.4f})", "<= .01",
                   "")  # fmt: skip
        else:
            yield (f"cascade {name}: cost, loss", f"{one['cost_share']:.1%}, {one['loss']:+.4f}",
                   f"<= {one['bar_cost_share']:.0%}", "60 % (chapter, figure 4.5)")  # fmt: skip


def _cache_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, one in found["sets"].items():
        yield (f"cache {name}: hits, false hits",
               f"{one['hit_rate']:.3f}, {one['false_hit_rate']:.3f} "
               f"(at most {one['false_hit_rate_95']:.3f})",
               f">= {one['bar']}, <= .03", "")  # fmt: skip
    yield ("cache: edited questions answered", f"{found['edited_answered']:.3f}", "<= .02", "")
    yield ("cache: rewordings recognised", f"{found['reworded_recognised']:.3f}", ">= .90", "")
    for kind, rate in found["edited_kinds_not_trained_on"].items():
        yield f"cache: edits of a kind not trained on, {kind}: answered", f"{rate:.3f}", "", ""


def _context_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, one in found["strategies"].items():
        bar = "<= .45, >= .95, <= .06" if name == "chosen k" else ""
        yield (f"context {name}: tokens of LastK(5), enough, needless (analogue)",
               f"{one['tokens_vs_last5']:.3f}, {one['enough_context']:.3f}, {one['needless']:.3f}",
               bar, "30 to 50 % saved (figure 4.6)" if "Smart" in name else "")  # fmt: skip


def _verification_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, one in found["strategies"].items():
        yield (f"{name}: M2 asked, mean quality, within 1 point of M2 (analogue)",
               f"{one['asks_m2']:.1%}, {one['mean_quality']:.2f}, {one['within_1_of_m2']:.1%}", "",
               "> 60 % and 25 % asked (figure 4.4)" if "t = 8" in name else "")  # fmt: skip


def _facts_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    yield ("facts: answer in the best chunk, top 3, top 5 (analogue)",
           f"{found['top1']:.3f}, {found['top3']:.3f}, {found['top5']:.3f}", "",
           "lowest score 4 for 1 of 10 (figure 4.7)")  # fmt: skip
    yield ("facts: own questions answered, foreign ones answered",
           f"{found['answered']:.3f}, {found['foreign_answered']:.3f}", "", "")  # fmt: skip


def _traffic_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    settled = found["settled"]
    yield ("cache while traffic changes: wrong of served, worst phase; fixed and online",
           f"{settled['fixed']['worst_phase']:.3f} and {settled['online']['worst_phase']:.3f}",
           f"{found['target_of_hits']:g} asked for", "")  # fmt: skip


_ROWS = {
    "routing": _routing_rows,
    "cascade": _cascade_rows,
    "cache": _cache_rows,
    "traffic": _traffic_rows,
    "context": _context_rows,
    "verification": _verification_rows,
    "facts": _facts_rows,
}
