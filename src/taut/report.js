"use strict";
(() => {
const data = JSON.parse(document.getElementById("numbers-json").textContent);
const root = document.documentElement;
const tone = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const percent = data.score_is_fraction ? 100 : 1;
const clear = "rgba(0,0,0,0)";

function axis(text, more = {}) {
  return {
    title: {text, font: {size: 12}, standoff: 8}, gridcolor: tone("grid"), zeroline: false,
    linecolor: tone("line"), automargin: true, fixedrange: true, nticks: 6, ...more,
  };
}
function layout(more) {
  return {
    margin: {l: 4, r: 10, t: 8, b: 4}, paper_bgcolor: clear, plot_bgcolor: clear,
    font: {family: tone("sans"), size: 12, color: tone("soft")}, showlegend: false,
    dragmode: false, hovermode: "closest", barmode: "overlay", bargap: 0,
    hoverlabel: {bgcolor: tone("panel"), bordercolor: tone("line"), font: {color: tone("ink")}},
    ...more,
  };
}
const scoreAxis = (more = {}) => axis(data.better === "lower" ? "score (lower is better)" : "", {
  ticksuffix: percent > 1 ? " %" : "", autorange: data.better === "lower" ? "reversed" : true, ...more,
});

// FRONTIER

function shortened(name, element) {
  const most = element.clientWidth < 500 ? 16 : 40;
  return name.length > most ? `…${name.slice(1 - most)}` : name;
}

// The file: a bar for each tensor, cut into its parts; the 24 largest where there are more.
function parts(element) {
  const largest = [...data.tensors].sort((a, b) => b.after_bytes - a.after_bytes).slice(0, 24);
  const rows = data.tensors.filter((t) => largest.includes(t));
  const labels = [...rows.map((t) => shortened(t.names[0], element)), "header"];
  const places = labels.map((_, i) => i);
  const found = [...new Set(rows.flatMap((t) => t.parts.map((p) => p.name)))];
  const colour = (i) => `p${1 + i % 6}`;
  const bar = (name, x, color) => ({
    type: "bar", orientation: "h", name, y: places, x, marker: {color, line: {width: 1, color: tone("paper")}},
    hovertemplate: `${name}: %{x:,.0f} bytes<extra></extra>`,
  });
  const traces = found.map((name, i) => bar(name, [...rows.map((t) =>
    t.parts.filter((p) => p.name === name).reduce((sum, p) => sum + p.size_bytes, 0)), 0], tone(colour(i))));
  traces.push(bar("header", [...rows.map(() => 0), data.overhead_bytes], tone("p0")));
  traces.push({
    type: "scatter", mode: "markers", y: rows.map((_, i) => i), x: rows.map((t) => t.huffman_bytes),
    marker: {symbol: "line-ns", size: 20, line: {width: 2, color: tone("ink")}},
    hovertemplate: "plain Huffman: %{x:,.0f} bytes<extra></extra>",
  });
  const key = document.getElementById("parts-key");
  key.replaceChildren(...[...found.map((n, i) => [n, colour(i)]), ["container and header", "p0"], ["plain Huffman", ""]].map(([name, at]) => {
    const item = document.createElement("li"), dot = document.createElement("i");
    dot.className = at ? "bar" : "tick";
    if (at) dot.style.setProperty("--dot", `var(--${at})`);
    item.append(dot, name);
    return item;
  }));
  return [traces, layout({
    barmode: "stack", bargap: .38, height: 56 + 30 * labels.length,
    xaxis: axis("bytes", {tickformat: ",", rangemode: "tozero"}),
    yaxis: axis("", {tickvals: places, ticktext: labels, autorange: "reversed", showgrid: false, nticks: 0, ticklen: 4, tickcolor: clear}),
  })];
}

// One site: its weights before upwards, after downwards, and the values that they share.
function weights(w) {
  const middle = w.before.map((_, i) => (w.edges[i] + w.edges[i + 1]) / 2);
  const width = w.edges[1] - w.edges[0];
  const bars = (y, color, yaxis, name) => ({
    type: "bar", x: middle, y, width, yaxis, marker: {color, line: {width: 0}},
    hovertemplate: `${name}: %{y:,} around %{x:.3g}<extra></extra>`,
  });
  const traces = [bars(w.before, tone("before"), "y", "before"), bars(w.after, tone("after"), "y2", "after")];
  if (w.centroids.length) traces.push({
    type: "scatter", mode: "markers", yaxis: "y3", x: w.centroids, y: w.centroids.map(() => 0),
    customdata: w.centroid_counts, hovertemplate: "%{customdata:,} weights share %{x:.4g}<extra></extra>",
    marker: {symbol: "line-ns", size: 9, line: {width: 1, color: tone("ink")}}, cliponaxis: false,
  });
  const gap = w.centroids.length ? .035 : 0, most = Math.max(1, ...w.after);
  const step = [5, 2, 1].map((n) => n * 10 ** Math.floor(Math.log10(most))).find((n) => n <= most);
  const counts = {tickformat: "~s", rangemode: "tozero", nticks: 4};
  return [traces, layout({
    xaxis: axis("", {range: [w.edges[0], w.edges.at(-1)], showgrid: false, anchor: "y2", showline: false}),
    yaxis: axis("", {...counts, domain: [.5 + gap, 1]}),
    yaxis2: axis("", {...counts, domain: [0, .5 - gap], autorange: "reversed", tickvals: [step / 2, step]}),
    yaxis3: axis("", {domain: [.5 - gap, .5 + gap], visible: false, range: [-1, 1]}),
  })];
}

// How far the rows of each weight have turned; the 24 largest weights where there are more.
function turned(element) {
  const size = (a) => a.rows * a.dimensions;
  const largest = [...data.angles].sort((a, b) => size(b) - size(a)).slice(0, 24);
  const rows = data.angles.filter((a) => largest.includes(a));
  const places = rows.map((_, i) => i);
  const means = {
    type: "scatter", mode: "markers", y: places, x: rows.map((a) => a.angle),
    error_x: {symmetric: false, array: rows.map((a) => a.angle_spread), arrayminus: rows.map((a) => Math.min(a.angle_spread, a.angle)), color: tone("after"), thickness: 1.5, width: 4},
    marker: {size: 9, color: tone("after")}, customdata: rows.map((a) => [a.angle_spread, a.length]),
    hovertemplate: "%{x:.2f}° ± %{customdata[0]:.2f}°, %{customdata[1]:.3f}× as long<extra></extra>",
  };
  const signs = {
    type: "scatter", mode: "markers", y: places, x: rows.map((a) => a.sign_angle),
    marker: {symbol: "line-ns", size: 20, line: {width: 2, color: tone("ink")}},
    hovertemplate: "signs of a random vector: %{x:.2f}°<extra></extra>",
  };
  return [[signs, means], layout({
    height: 56 + 30 * rows.length,
    xaxis: axis("degrees", {rangemode: "tozero", ticksuffix: "°"}),
    yaxis: axis("", {tickvals: places, ticktext: rows.map((a) => shortened(a.name, element)), range: [rows.length - .5, -.5], showgrid: false, nticks: 0, ticklen: 4, tickcolor: clear}),
  })];
}

function curve(values, yaxis) {
  const x = data.epochs.map((_, i) => i + 1), soft = tone("soft");
  const marks = data.phases.map((p, i) => ({
    text: `${i + 1}`, x: (p.first + p.last) / 2, yref: "paper", y: 1.02, yanchor: "bottom", showarrow: false, font: {color: soft, size: 11},
  }));
  const shapes = data.phases.slice(1).map((p) => ({
    type: "line", x0: p.first - .5, x1: p.first - .5, yref: "paper", y0: 0, y1: 1.1, line: {color: soft, width: 1, dash: "dot"},
  }));
  const traces = data.phases.map((p) => ({
    type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", x: x.slice(p.first - 1, p.last), y: values.slice(p.first - 1, p.last),
    line: {color: tone("after"), width: 2}, marker: {size: 5}, hovertemplate: "epoch %{x}: %{y:.4~g}<extra></extra>",
  }));
  return [traces, layout({
    shapes, annotations: marks, yaxis, margin: {l: 4, r: 10, t: 22, b: 4},
    xaxis: axis("epoch", {range: [.5, x.length + .5], tickformat: "d", dtick: Math.max(1, Math.ceil(x.length / 6)), showgrid: false}),
  })];
}

// ANSWERS

const timed = data.rows.find((r) => r.unit === "ms");
const logarithmic = (values) => {
  const some = values.filter((v) => v > 0), wide = Math.max(...some) > 300 * Math.min(...some);
  return {type: "log", tickformat: "~s", dtick: wide ? 1 : "D2"};
};
const bytesAxis = {title: "bytes", unit: "bytes", axis: logarithmic([data.before_bytes, ...data.candidates.map((c) => c.size_bytes)])};
const macs = data.rows.find((r) => r.label === "Effective MACs");
const macsAxis = {title: "effective MACs", unit: "MACs", axis: logarithmic([macs ? macs.before : 1, ...data.candidates.map((c) => c.macs)])};
const timeAxis = {title: "latency, ms", unit: "ms", axis: {rangemode: "tozero"}};
const plots = {
  "size-score": () => candidates(data.before_bytes, (c) => c.size_bytes, null, "bytes", bytesAxis),
  "macs-score": () => candidates(macs ? macs.before : null, (c) => c.macs, null, "macs", macsAxis),
  "latency-score": () => candidates(timed ? timed.before : null, (c) => c.latency_ms, (c) => c.latency_iqr_ms, "latency", timeAxis),
  parts, turned, confusion, sensitivities, "engines-ms": engines,
  loss: () => curve(data.epochs.map((e) => e.loss), axis("", {rangemode: "tozero"})),
  score: () => curve(data.epochs.map((e) => e.score === null ? null : percent * e.score), scoreAxis()),
  rate: () => curve(data.epochs.map((e) => e.learning_rate), axis("", {rangemode: "tozero", tickformat: "~g"})),
};
data.weights.forEach((w, i) => { plots[`weights-${i}`] = () => weights(w); });

function draw() {
  for (const [id, make] of Object.entries(plots)) {
    const element = document.getElementById(id);
    if (!element || !element.clientWidth) continue;
    const [traces, look] = make(element);
    const size = {width: element.clientWidth, height: look.height ?? element.clientHeight};
    Plotly.react(element, traces, {...look, ...size}, {displayModeBar: false, doubleClick: false});
  }
}
function printing(on) {
  root.toggleAttribute("data-print", on);
  draw();
}
draw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => printing(true));
addEventListener("afterprint", () => printing(false));
for (const box of document.querySelectorAll("details")) box.addEventListener("toggle", draw);
})();
