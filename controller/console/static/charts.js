// Charts beside the tables that say the same: each reads the rows of its table.
"use strict";

window.intentdCharts = (() => {
  const open = new Map(); // figure -> chart
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rows = (figure) => [...document.querySelectorAll(`#${CSS.escape(figure.dataset.table)} tbody tr`)];
  const value = (row, name) => (row.dataset[name] === "" || row.dataset[name] === undefined ? null : Number(row.dataset[name]));
  const axis = (label, more) => ({
    label, stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 },
    ticks: { stroke: css("--line") }, labelFont: "13px system-ui", font: "12px system-ui", ...more,
  });
  const units = (steps) => (v) => {
    if (v === null || v === undefined) return "";
    for (const [unit, name] of steps) if (Math.abs(v) >= unit) return `${+(v / unit).toPrecision(3)}${name}`;
    return `${+v.toPrecision(3)}`;
  };
  const bytes = units([[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [1024, " KiB"], [1, " B"]]);
  const seconds = units([[3600, " h"], [60, " min"], [1, " s"], [1e-3, " ms"], [1e-6, " µs"]]);
  const width = (figure) => Math.max(260, figure.clientWidth - 22);
  const frame = (figure, height) => ({ width: width(figure), height, legend: { live: false }, cursor: { drag: { x: false, y: false } } });

  function sizes(figure) {
    const list = rows(figure);
    const cuts = figure.dataset.cuts.trim().split(/\s+/).filter(Boolean).map(Number);
    const mark = (u) => {
      const c = u.ctx;
      c.save();
      c.strokeStyle = css("--two");
      c.setLineDash([5, 4]);
      for (const cut of cuts) {
        const x = u.valToPos(cut, "x", true);
        if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        c.beginPath(); c.moveTo(x, u.bbox.top); c.lineTo(x, u.bbox.top + u.bbox.height); c.stroke();
      }
      c.restore();
    };
    return [{
      ...frame(figure, 260),
      scales: { x: { time: false, distr: 3, log: 2 }, y: { range: [0, 1] } },
      axes: [axis("size of a flow", { values: (u, all) => all.map((v, i) => (i % 4 ? "" : bytes(v))) }),
        axis("share", { values: (u, all) => all.map((v) => `${Math.round(100 * v)} %`) })],
      series: [{}, { label: "flows", stroke: css("--one"), width: 2 }, { label: "bytes", stroke: css("--three"), width: 2, dash: [8, 3] }],
      hooks: { draw: [mark] },
    }, [list.map((r) => value(r, "x")), list.map((r) => value(r, "flows")), list.map((r) => value(r, "bytes"))]];
  }

  function time(figure) {
    const list = rows(figure);
    const x = list.map((r) => value(r, "x"));
    const wait = list.map((r) => value(r, "wait"));
    const both = list.map((r) => value(r, "wait") + value(r, "transfer"));
    const bars = uPlot.paths.bars({ size: [0.6, 80] });
    const positive = Math.min(...both.filter((v) => v > 0));
    const log = Math.max(...both) > 100 * positive;
    return [{
      ...frame(figure, 260),
      scales: { x: { time: false, range: [-0.6, x.length - 0.4] }, y: log ? { distr: 3 } : { range: (u, low, high) => [0, 1.05 * high || 1] } },
      axes: [axis("class", { splits: () => x, values: (u, all) => all.map((v) => `${v}`) }),
        axis("mean time of a flow", { size: 70, values: (u, all) => all.map((v) => (v === null ? "" : seconds(v))) })],
      series: [{}, { label: "transfer", stroke: css("--one"), fill: css("--one"), paths: bars, points: { show: false } },
        { label: "wait", stroke: css("--two"), fill: css("--two"), paths: bars, points: { show: false } }],
    }, [x, both, log ? wait.map((v) => v || null) : wait]];
  }

  function spend(figure) {
    const list = rows(figure);
    const x = list.map((r, i) => i);
    return [{
      ...frame(figure, 220),
      scales: { x: { time: false, range: [-0.6, x.length - 0.4] }, y: { range: (u, low, high) => [0, 1.1 * high || 1] } },
      axes: [axis("day", { splits: () => x, values: (u, all) => all.map((v) => (list[v] ? list[v].dataset.name : "")) }), axis("dollars", { size: 70 })],
      series: [{}, { label: "spent", stroke: css("--one"), fill: css("--one"), paths: uPlot.paths.bars({ size: [0.6, 80] }), points: { show: false } }],
    }, [x, list.map((r) => value(r, "cost"))]];
  }

  function front(figure) {
    const list = rows(figure).filter((r) => value(r, "x") !== null && value(r, "y") !== null)
      .sort((a, b) => value(a, "x") - value(b, "x"));
    const x = list.map((r) => value(r, "x"));
    const y = list.map((r) => value(r, "y"));
    const here = { x: Number(figure.dataset.presentX), y: Number(figure.dataset.presentY) };
    const known = figure.dataset.presentX !== undefined && Number.isFinite(here.x) && Number.isFinite(here.y);
    const spread = (all) => {
      const low = Math.min(...all), high = Math.max(...all), room = 0.08 * (high - low) || 0.1 * Math.abs(high) || 1;
      return [low - room, high + room];
    };
    const mark = (u) => {
      const c = u.ctx, size = 6 * devicePixelRatio;
      c.save();
      if (known) {
        const at = [u.valToPos(here.x, "x", true), u.valToPos(here.y, "y", true)];
        c.fillStyle = css("--two");
        c.beginPath(); c.moveTo(at[0], at[1] - size); c.lineTo(at[0] + size, at[1]); c.lineTo(at[0], at[1] + size); c.lineTo(at[0] - size, at[1]); c.fill();
      }
      c.restore();
    };
    const nearest = (u) => {
      let best = null, least = 30;
      x.forEach((value, i) => {
        const far = Math.hypot(u.valToPos(value, "x") - u.cursor.left, u.valToPos(y[i], "y") - u.cursor.top);
        if (far < least) [best, least] = [i, far];
      });
      return best;
    };
    const ready = (u) => {
      u.over.addEventListener("click", () => {
        const at = nearest(u);
        if (at !== null) location.assign(list[at].dataset.href);
      });
      u.over.addEventListener("mousemove", () => { u.over.style.cursor = nearest(u) === null ? "default" : "pointer"; });
      figure.dataset.points = JSON.stringify(x.map((value, i) => [u.valToPos(value, "x"), u.valToPos(y[i], "y"), list[i].dataset.href]));
    };
    return [{
      ...frame(figure, 300),
      scales: { x: { time: false, range: spread(known ? [...x, here.x] : x) }, y: { range: spread(known ? [...y, here.y] : y) } },
      axes: [axis(figure.dataset.xName), axis(figure.dataset.yName, { size: 70 })],
      series: [{ label: "click a point" }, {
        label: known ? "front (the diamond is in force)" : "front", stroke: css("--one"), width: 1, dash: [3, 4],
        points: { show: true, size: 11, fill: css("--one") },
      }],
      hooks: { draw: [mark], ready: [ready] },
    }, [x, y]];
  }

  function timeline(figure) {
    const list = rows(figure).slice(0, 40);
    const now = Number(figure.dataset.now);
    const begins = list.map((r) => value(r, "submitted") ?? now);
    const ends = list.map((r) => Math.max(value(r, "ended") ?? now, value(r, "p90") ?? 0));
    const low = Math.min(...begins);
    const high = Math.max(...ends, low + 1);
    const mark = (u) => {
      const c = u.ctx, thick = 0.55 * (u.valToPos(0, "y", true) - u.valToPos(1, "y", true));
      const at = (t) => u.valToPos(t, "x", true);
      c.save();
      c.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
      c.clip();
      list.forEach((row, i) => {
        const y = u.valToPos(list.length - 1 - i, "y", true);
        const submitted = value(row, "submitted"), started = value(row, "started"), ended = value(row, "ended") ?? now;
        const bar = (from, to, colour) => { c.fillStyle = colour; c.fillRect(at(from), y - thick / 2, Math.max(1, at(to) - at(from)), thick); };
        bar(submitted, started ?? ended, css("--line"));
        if (started !== null) bar(started, ended, row.dataset.state === "failed" ? css("--bad") : css("--one"));
        const p50 = value(row, "p50"), p90 = value(row, "p90");
        if (p50 !== null) {
          c.strokeStyle = css("--two"); c.lineWidth = 2 * devicePixelRatio;
          c.beginPath(); c.moveTo(at(p50), y); c.lineTo(at(p90), y);
          for (const t of [p50, p90]) { c.moveTo(at(t), y - thick / 2); c.lineTo(at(t), y + thick / 2); }
          c.stroke();
        }
      });
      c.strokeStyle = css("--quiet"); c.setLineDash([4, 4]);
      c.beginPath(); c.moveTo(at(now), u.bbox.top); c.lineTo(at(now), u.bbox.top + u.bbox.height); c.stroke();
      c.restore();
    };
    return [{
      ...frame(figure, Math.max(180, 90 + 16 * list.length)),
      scales: { x: { time: true, range: [low, high + 0.02 * (high - low)] }, y: { range: [-0.7, list.length - 0.3] } },
      axes: [axis("time"), axis("job", { splits: () => list.map((r, i) => i), values: (u, all) => all.map((v) => (list[list.length - 1 - v] ? list[list.length - 1 - v].dataset.job : "")) })],
      series: [{}, { label: "grey: waits; blue: runs; orange: foretold P50 to P90", stroke: css("--one"), paths: () => null, points: { show: false } }],
      hooks: { draw: [mark] },
    }, [list.map((r, i) => low + (i * (high - low)) / list.length), list.map(() => null)]];
  }

  const kinds = { sizes, time, spend, front, timeline };

  function drop(within) {
    for (const [figure, chart] of open) {
      if (within.contains(figure) || !figure.isConnected) { chart.destroy(); open.delete(figure); }
    }
  }

  function draw(within) {
    if (!window.uPlot) return;
    drop(within);
    for (const figure of within.querySelectorAll("[data-chart]")) {
      if (!rows(figure).length) continue;
      figure.classList.add("drawn"); // only now it has a width
      const [options, data] = kinds[figure.dataset.chart](figure);
      figure.setAttribute("aria-hidden", "true"); // the table says the same
      open.set(figure, new uPlot(options, data, figure));
    }
  }

  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => draw(document), 150); });
  return { draw, drop };
})();
