// How the confusion matrix changed: green where it is for the better, on and off the diagonal.
function confusion() {
  const {classes, before, after} = data.answers;
  const change = after.map((row, t) => row.map((n, a) => (n - before[t][a]) * (t === a ? 1 : -1)));
  const most = Math.max(1, ...change.flat().map(Math.abs)), few = classes.length <= 24;
  const ticks = few ? {tickvals: classes.map((_, i) => i), ticktext: classes.map((c) => c.length > 12 ? `${c.slice(0, 11)}…` : c)} : {};
  const place = {showgrid: false, showline: false, nticks: few ? 0 : 8, ticks: "", ...ticks};
  const drawn = {
    type: "heatmap", z: change, zmin: -most, zmax: most, showscale: false, xgap: few ? 2 : 0, ygap: few ? 2 : 0,
    colorscale: [[0, tone("bad")], [.5, tone("panel")], [1, tone("good")]],
    text: after.map((row, t) => row.map((n, a) => n === before[t][a] ? "" : `${n > before[t][a] ? "+" : "−"}${Math.abs(n - before[t][a])}`)),
    texttemplate: classes.length <= 16 ? "%{text}" : "", textfont: {size: 11, color: tone("ink")},
    customdata: after.map((row, t) => row.map((n, a) => [classes[t], classes[a], before[t][a], n])),
    hovertemplate: "%{customdata[0]} answered %{customdata[1]}: %{customdata[2]:,} → %{customdata[3]:,}<extra></extra>",
  };
  const strong = change.flatMap((row, t) => row.flatMap((n, a) => Math.abs(n) > .6 * most && classes.length <= 16 ? [{
    x: a, y: t, text: drawn.text[t][a], showarrow: false, font: {size: 11, color: tone("paper")},
  }] : []));
  strong.forEach((mark) => { drawn.text[mark.y][mark.x] = ""; });
  return [[drawn], layout({
    annotations: strong, xaxis: axis("answer", place), yaxis: axis("class", {...place, autorange: "reversed"}),
  })];
}

// The loss as each weight alone is pruned: the 12 that suffer most where there are more.
function sensitivities() {
  const worst = (s) => Math.max(...s.losses.filter((v) => v !== null));
  const rows = [...data.sensitivities].sort((a, b) => worst(b) - worst(a)).slice(0, 12);
  const base = rows[0].baseline;
  const traces = rows.map((s, i) => ({
    type: "scatter", mode: "lines+markers", name: s.name, x: [0, ...s.sparsities].map((v) => 100 * v), y: [s.baseline, ...s.losses],
    line: {width: 1.8, color: tone(`p${1 + i % 6}`), dash: i < 6 ? "solid" : "dot"}, marker: {size: 4},
    hovertemplate: "%{x:.4~g} % of %{fullData.name} gone: %{y:.4~g}<extra></extra>",
  }));
  return [traces, layout({
    showlegend: true, legend: {orientation: "h", y: -.22, x: 0, font: {size: 11}},
    xaxis: axis("of the weight pruned", {ticksuffix: " %", range: [0, 101], showgrid: false}), yaxis: axis("loss", {rangemode: "tozero"}),
    shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: base, y1: base, line: {color: tone("soft"), width: 1, dash: "dot"}}],
  })];
}

// One forward by engine and batch.
function engines() {
  const rows = data.engines, places = rows.map((_, i) => i);
  const bar = (name, of, spread, color) => ({
    type: "bar", orientation: "h", name, y: places, x: rows.map(of), marker: {color},
    error_x: {array: rows.map(spread), color: tone("ink"), thickness: 1, width: 3},
    hovertemplate: `${name}: %{x:.4~g} ms<extra></extra>`,
  });
  const traces = [
    bar("original", (e) => e.before_ms, (e) => e.before_iqr_ms, tone("before")),
    bar("compressed", (e) => e.after_ms, (e) => e.after_iqr_ms, tone("after")),
  ];
  return [traces, layout({
    barmode: "group", bargap: .3, height: 60 + 44 * rows.length,
    xaxis: axis("ms", {rangemode: "tozero"}),
    yaxis: axis("", {tickvals: places, ticktext: rows.map((e) => `${e.engine}, ${e.batch}`), autorange: "reversed", showgrid: false, nticks: 0, ticklen: 4, tickcolor: clear}),
  })];
}
