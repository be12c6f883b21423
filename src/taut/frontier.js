// Candidates: score against a cost. `of` reads the cost, `spread` its error bar. What is beaten is
// dim; each family of techniques has its own line; what keeps the goal lies in the shaded region.
function candidates(original, of, spread, bound, x) {
  const all = data.candidates.filter((c) => of(c) !== null && c.score !== null);
  const many = all.length > 40, type = all.length > 400 ? "scattergl" : "scatter";
  const y = (c) => percent * c.score;
  const points = {
    type, mode: many ? "markers" : "markers+text", x: all.map(of), y: all.map(y),
    error_x: spread && !many ? {symmetric: false, array: all.map(spread), arrayminus: all.map((c) => Math.min(spread(c), of(c))), color: tone("before"), thickness: 1, width: 3} : undefined,
    text: all.map((c) => all.length < 17 || c.on_frontier ? `   ${c.number}` : ""), textposition: "middle right",
    textfont: {color: all.map((c) => tone(c.on_frontier ? "ink" : "before"))},
    hovertext: all.map((c) => c.recipe.replaceAll("<", "&lt;").replaceAll(" > ", " ><br>")),
    hovertemplate: `%{x:,} ${x.unit}, %{y:.4~f}<br>%{hovertext}<extra></extra>`,
    marker: {size: many ? 7 : 10, opacity: all.map((c) => c.on_frontier || c.chosen ? 1 : .35),
      color: all.map((c) => c.on_frontier ? tone("after") : tone("paper")),
      line: {width: many ? 1.2 : 2, color: tone("after")}},
  };
  const ring = {
    type: "scatter", mode: "markers", hoverinfo: "skip", x: all.filter((c) => c.chosen).map(of),
    y: all.filter((c) => c.chosen).map(y),
    marker: {size: 19, color: clear, line: {width: 1.5, color: tone("ink")}},
  };
  const before = {
    type: "scatter", mode: "markers", x: [original], y: [percent * data.score_before],
    marker: {size: 11, symbol: "diamond", color: tone("before")},
    hovertemplate: `original: %{x:,} ${x.unit}, %{y:.4~f}<extra></extra>`,
  };
  const numbered = new Map(all.map((c) => [c.number, c]));
  const lines = data.curves.filter((c) => c.axis === bound).slice(0, 24).map((curve, i) => {
    const on = curve.numbers.map((n) => numbered.get(n)).filter(Boolean).sort((a, b) => of(a) - of(b));
    return {
      type: "scatter", mode: "lines", x: on.map(of), y: on.map(y), opacity: .55, name: curve.family,
      line: {width: 1.2, color: tone(`p${1 + i % 6}`)}, hoverinfo: "name",
    };
  });
  const traces = [...lines, ...(original === null ? [] : [before]), points, ring];
  return [traces, layout({shapes: region(all, of, original, bound), xaxis: axis(x.title, x.axis), yaxis: scoreAxis()})];
}

// The bounds of the goal on these two axes: what keeps them is shaded.
function region(all, of, original, bound) {
  const cost = data.bounds.find((b) => b.axis === bound), score = data.bounds.find((b) => b.axis === "score");
  if (!cost && !score) return [];
  const costs = [...all.map(of), ...(original === null ? [] : [original]), ...(cost ? [cost.limit] : [])];
  const scores = [...all.map((c) => c.score), data.score_before].filter((s) => s !== null);
  const best = data.better === "lower" ? Math.min(...scores) : Math.max(...scores);
  const across = cost ? {x0: .9 * Math.min(...costs), x1: cost.limit} : {xref: "paper", x0: 0, x1: 1};
  const up = score ? {y0: percent * score.limit, y1: percent * (data.better === "lower" ? Math.min(best, score.limit) : Math.max(best, score.limit))} : {yref: "paper", y0: 0, y1: 1};
  return [{
    type: "rect", layer: "below", ...across, ...up, fillcolor: tone("good-wash"),
    line: {color: tone("good"), width: 1, dash: "dash"},
  }];
}
