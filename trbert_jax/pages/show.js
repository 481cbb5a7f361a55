"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = { input: 0, setting: data.start, unit: "tokens", token: null };
const byId = (id) => document.getElementById(id);
const format = (x, digits = 2) => x.toFixed(digits);
const percent = (x) => `${(100 * x).toFixed(1)} %`;

// Returns an element with properties, and children: elements or text, which is never read as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

function table(heads, rows) {
  const cell = (tag, [text, kind], scope) => {
    const element = make(tag, { className: kind ?? "" });
    element.append(text instanceof Node ? text : String(text));
    if (scope) element.setAttribute("scope", "col");
    return element;
  };
  const line = (tag, cells, scope) => make("tr", {}, ...cells.map((x) => cell(tag, Array.isArray(x) ? x : [x], scope)));
  return make("table", {}, make("thead", {}, line("th", heads, true)), make("tbody", {}, ...rows.map((row) => line("td", row))));
}

// Where a token is after all points of reduction: the class of its color, and words for it.
function fate(left) {
  const last = data.points.length;
  if (left === last) return ["kept", "kept to the end"];
  return [left === 0 ? "early" : "late", `dropped before layer ${data.points[left] + 1}`];
}

const answerText = (outcome) => (outcome.answer === "" ? "no answer" : outcome.answer);

function verdict(outcome, right) {
  if (right === null) return "";
  const ok = right.includes(outcome.answer);
  return make("span", { className: ok ? "good" : "bad" }, ok ? "right" : "wrong");
}

// Units of a segment: [start, end, tokens]. Tokens are those of the model; words end where a blank is;
// sentences end behind . ! or ?
function units(row, segment) {
  const tokens = row.at.map((place, i) => [...place, i]).filter(([s, a, b]) => s === segment && b > a);
  if (state.unit === "tokens") return tokens.map(([, a, b, i]) => [a, b, [i]]);
  const text = row.texts[segment], found = [];
  for (const [, a, b, i] of tokens) {
    const last = found.at(-1);
    const between = last ? text.slice(last[1], a) : "";
    const joins = last && (state.unit === "words" ? between === "" && /[\p{L}\p{N}]$/u.test(text.slice(0, last[1]))
      && /^[\p{L}\p{N}]/u.test(text.slice(a)) : !(/[.!?]$/.test(text.slice(last[0], last[1])) && /\s/.test(between)));
    if (joins) { last[1] = b; last[2].push(i); } else found.push([a, b, [i]]);
  }
  return found;
}

function drawSegment(row, segment, setting, input) {
  const box = make("div", { className: "text", tabIndex: 0, role: "group" });
  const name = row.texts.length === 1 ? "Text" : data.kind === "questions" ? ["Question", "Context"][segment] : ["Text", "Second text"][segment];
  box.setAttribute("aria-label", `${name}; arrow keys step through ${state.unit}`);
  if (row.texts.length > 1) box.append(make("h3", {}, name));
  const text = row.texts[segment];
  let place = 0;
  const marked = data.kind === "questions" && segment === 1 ? input.reduced[state.setting] : {};
  for (const [a, b, tokens] of units(row, segment)) {
    if (a > place) box.append(text.slice(place, a));
    const left = tokens.map((i) => Number(setting.left[i]));
    const most = Math.max(...left);
    const unit = make("span", { className: `t ${fate(most)[0]}` }, text.slice(a, b));
    if (state.unit === "sentences") {
      const share = left.filter((x) => x === data.points.length).length / left.length;
      unit.className = "t";
      unit.style.background = `color-mix(in srgb, var(--kept-back) ${Math.round(100 * share)}%, transparent)`;
    }
    if (a + row.begin < marked.end && b + row.begin > marked.start) unit.classList.add("answer");
    unit.unit = { row, tokens, left };
    unit.addEventListener("pointerenter", () => point(unit));
    box.append(unit);
    place = Math.max(place, b);
  }
  const rest = text.slice(place);
  if (rest.trim()) box.append(make("span", { className: "quiet", title: "the model does not read this" }, rest));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...box.querySelectorAll(".t")];
    const next = all[Math.min(all.length - 1, Math.max(0, all.indexOf(state.token) + step))];
    if (next) { point(next); next.scrollIntoView({ block: "nearest" }); }
  });
  return box;
}

// Describes a token, a word or a sentence below the controls.
function point(unit) {
  state.token?.classList.remove("now");
  state.token = unit;
  unit.classList.add("now");
  const { row, tokens, left } = unit.unit, setting = row.settings[state.setting];
  const thresholds = data.settings[state.setting].thresholds;
  if (tokens.length > 1) {
    const kept = left.filter((x) => x === data.points.length).length;
    byId("token").textContent = `${tokens.length} tokens, ${kept} kept to the end: ${tokens.map((i) => row.tokens[i]).slice(0, 12).join(" ")}`;
    return;
  }
  const [i] = tokens;
  const at = [row.p, ...setting.p].map((p, stage) => {
    if (p[i] === null) return null;
    const rank = p.filter((x) => x !== null && x > p[i]).length + 1;
    return `before layer ${data.points[stage] + 1}: keep probability ${p[i]} %, threshold ${Math.round(100 * thresholds[stage])} %, rank ${rank} of ${p.filter((x) => x !== null).length}`;
  });
  byId("token").textContent = [`${row.tokens[i]}: ${fate(left[0])[1]}`, ...at.filter(Boolean)].join("; ");
}

function counts(input) {
  const found = Array(data.points.length + 1).fill(0);
  for (const row of input.rows) for (const x of row.settings[state.setting].left) found[Number(x)] += 1;
  return found;
}

function facts(entries) {
  byId("facts").replaceChildren(...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function drawControls() {
  const setting = data.settings[state.setting], input = data.inputs[state.input];
  const names = setting.thresholds.map((x) => format(x)).join(" and ");
  byId("threshold").value = state.setting;
  byId("threshold").setAttribute("aria-valuetext", `thresholds ${names}${setting.name ? `, operating point ${setting.name}` : ""}`);
  for (const button of byId("points").children) button.setAttribute("aria-pressed", String(Number(button.value) === state.setting));
  const found = counts(input), total = found.reduce((a, b) => a + b);
  facts([
    ["thresholds", names],
    ["tokens kept to the end", `${found.at(-1)} of ${total}`],
    ["fewer FLOPs", `${format(input.speedup[state.setting])}×`],
    ...(input.ms ? [["alone, dense " + format(input.ms.dense, 1) + " ms", `${format(input.ms.reduced[state.setting], 1)} ms`]] : []),
    ["answer", `${answerText(input.reduced[state.setting])} (${format(100 * input.reduced[state.setting].score, 1)} %)`],
  ]);
}

function drawText() {
  const input = data.inputs[state.input];
  state.token = null;
  byId("token").textContent = "Point at a token, or use the arrow keys in the text, for its keep probabilities.";
  const found = counts(input);
  const sentences = state.unit === "sentences";
  byId("legend").replaceChildren(...(sentences ? [make("li", {}, "the darker, the larger the share of a sentence's tokens that is kept to the end")]
    : found.map((number, left) => [number, ...fate(left)]).reverse().map(([number, kind, words]) =>
      make("li", {}, make("span", { className: `key ${kind}` }, words), ` ${number}`))));
  if (!sentences && data.kind === "questions") byId("legend").append(make("li", {}, make("span", { className: "key answer" }, "answer"), ` ${survived(input)}`));
  byId("rows").replaceChildren(...input.rows.flatMap((row, i) => [
    ...(input.rows.length > 1 ? [make("p", { className: "small quiet" }, `window ${i + 1} of ${input.rows.length}`)] : []),
    ...row.texts.map((_, segment) => drawSegment(row, segment, row.settings[state.setting], input)),
  ]));
  drawAnswers(input);
  drawFunnel(input);
}

// How many tokens of the answer survive, in the windows that hold it.
function survived(input) {
  const { start, end } = input.reduced[state.setting];
  if (start === undefined) return "none";
  let kept = 0, all = 0;
  for (const row of input.rows) {
    row.at.forEach(([segment, a, b], i) => {
      if (segment === 1 && a + row.begin < end && b + row.begin > start) {
        all += 1;
        kept += Number(row.settings[state.setting].left[i]) === data.points.length;
      }
    });
  }
  return `${kept} of its ${all} tokens kept to the end`;
}

function drawAnswers(input) {
  const names = { dense: "dense", reduced: "reduced", random: "random tokens, as many", first_k: "first tokens, as many" };
  const rows = Object.entries(names).filter(([key]) => key in input).map(([key, name]) => {
    const outcome = key === "dense" ? input.dense : input[key][state.setting];
    const same = outcome.answer === input.dense.answer ? "same" : "changed";
    return [name, answerText(outcome), [percent(outcome.score), "number"], key === "dense" ? "" : same, verdict(outcome, input.right)];
  });
  const right = input.right === null ? null : make("p", { className: "small" }, `Right: ${input.right.map((x) => x || "no answer").slice(0, 3).join(" / ")}`);
  byId("answers").replaceChildren(table(["model", "answer", ["score", "number"], "as dense", "truth"], rows), ...(right ? [right] : []));
}

function drawFunnel(input) {
  const found = counts(input), total = found.reduce((a, b) => a + b), height = 22, width = 420, from = 74;
  const chart = draw("svg", { viewBox: `0 0 ${width} ${height * data.layers}`, width, role: "img" });
  const into = [];
  for (let layer = 0; layer < data.layers; layer += 1) {
    const passed = data.points.filter((p) => p <= layer).length;
    into.push(found.slice(passed).reduce((a, b) => a + b, 0));
  }
  chart.setAttribute("aria-label", into.map((n, i) => `layer ${i + 1}: ${n} tokens`).join(", "));
  into.forEach((n, i) => {
    const y = i * height, scale = (width - from - 100) / total;
    chart.append(draw("text", { x: 0, y: y + 15 }, `layer ${i + 1}`));
    chart.append(draw("rect", { x: from, y: y + 3, width: total * scale, height: height - 6, class: "bar-quiet" }));
    chart.append(draw("rect", { x: from, y: y + 3, width: n * scale, height: height - 6, class: "bar" }));
    chart.append(draw("text", { x: from + total * scale + 8, y: y + 15 }, `${n} (${Math.round((100 * n) / total)} %)`));
  });
  byId("funnel").replaceChildren(chart);
}

function link(entry) {
  if (entry.shown === null) return document.createTextNode(entry.title);
  const button = make("a", { href: "#panel-text" }, entry.title);
  button.addEventListener("click", (event) => { event.preventDefault(); state.input = entry.shown; select("text"); redraw(); byId("tab-text").focus(); });
  return button;
}

function drawCorpus() {
  const { inputs, kept, dropped, least } = data.corpus, changed = inputs.filter((x) => x.dense !== x.reduced);
  const width = 560, height = 240, left = 44, bottom = 34, longest = Math.max(...inputs.map((x) => x.tokens));
  const chart = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": "share of tokens kept to the end, by the number of tokens" });
  const x = (tokens) => left + ((width - left - 12) * tokens) / longest, y = (share) => 10 + (height - bottom - 10) * (1 - share);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(draw("line", { x1: left, x2: width - 12, y1: y(share), y2: y(share), class: "axis" }));
    chart.append(draw("text", { x: 0, y: y(share) + 4 }, `${100 * share} %`));
  }
  chart.append(draw("text", { x: left, y: height - 12 }, "0"), draw("text", { x: width - 130, y: height - 12 }, `${longest} tokens`));
  for (const entry of inputs) chart.append(draw("circle", { cx: x(entry.tokens), cy: y(entry.kept / entry.tokens), r: 3.5, class: "bar", "fill-opacity": 0.6 }));
  const deletion = data.corpus.deletion;
  const words = (title, list) => make("div", {}, make("h2", {}, title), table(["word", ["kept", "number"], ["occurrences", "number"]],
    list.map((w) => [w.word, [percent(w.share), "number"], [w.count, "number"]])));
  const start = data.settings[data.start];
  byId("panel-corpus").replaceChildren(
    make("p", {}, `${inputs.length} ${data.kind} at thresholds ${start.thresholds.map((t) => format(t)).join(" and ")}; ${changed.length} answers differ from the dense model's.`),
    make("h2", {}, "Share kept to the end"), chart,
    ...(deletion ? [make("h2", {}, "Tokens deleted"), make("p", {}, `Probability of the dense model's answer after deleting tokens from the text, a mean over ${deletion.texts} texts. If kept tokens carry the answer, deleting them first costs most.`),
      drawDeletion(deletion)] : []),
    make("div", { className: "columns" }, words("Kept most often", kept), words("Dropped most often", dropped)),
    make("p", { className: "small quiet" }, `Words that occur at least ${least} times; a word counts as kept if a piece of it is.`),
    make("h2", {}, "Changed answers"), changed.length ? listed(changed) : make("p", {}, "none"));
}

// Lines over the share of tokens deleted, with their names at the end.
function drawDeletion({ shares, kept, dropped, random }) {
  const width = 560, height = 240, left = 44, bottom = 34, right = 110;
  const lines = { "dropped first": [dropped, "4 3"], "random": [random, "1 4"], "kept first": [kept, ""] };
  const low = Math.floor(10 * Math.min(...kept, ...dropped, ...random)) / 10;
  const x = (share) => left + ((width - left - right) * share) / shares.at(-1), y = (p) => 10 + (height - bottom - 10) * (1 - (p - low) / (1 - low));
  const label = Object.entries(lines).map(([name, [curve]]) => `${name}: ${curve.map((p) => format(p)).join(", ")}`).join("; ");
  const chart = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": `Probability by share deleted. ${label}` });
  for (const p of [low, (1 + low) / 2, 1]) {
    chart.append(draw("line", { x1: left, x2: width - right, y1: y(p), y2: y(p), class: "axis" }), draw("text", { x: 0, y: y(p) + 4 }, format(p)));
  }
  for (const share of shares) chart.append(draw("text", { x: x(share) - 12, y: height - 12 }, `${Math.round(100 * share)} %`));
  const ends = [];
  for (const [name, [curve, dash]] of Object.entries(lines)) {
    chart.append(draw("polyline", { points: curve.map((p, i) => `${x(shares[i])},${y(p)}`).join(" "), class: "curve", "stroke-dasharray": dash }));
    let place = y(curve.at(-1)) + 4;
    while (ends.some((other) => Math.abs(other - place) < 15)) place += 15;
    ends.push(place);
    chart.append(draw("text", { x: width - right + 6, y: place }, name));
  }
  return chart;
}

function listed(entries) {
  const rows = entries.map((x) => [link(x), answerText({ answer: x.dense }), answerText({ answer: x.reduced }),
    x.right === null ? "" : x.right.map((a) => a || "no answer")[0] ?? "", [format(100 * x.lost, 1), "number"]]);
  const box = make("div", { className: "scroll", tabIndex: 0, role: "region" }, table([data.kind === "questions" ? "question" : "text", "dense", "reduced", "right", ["points of its score lost", "number"]], rows));
  box.setAttribute("aria-label", "Inputs");
  return box;
}

function drawErrors() {
  const known = data.corpus.inputs.some((x) => x.right !== null);
  const lost = data.corpus.inputs.filter((x) => (known ? x.right?.includes(x.dense) && !x.right.includes(x.reduced) : x.dense !== x.reduced));
  const won = known ? data.corpus.inputs.filter((x) => x.right && !x.right.includes(x.dense) && x.right.includes(x.reduced)) : [];
  const sorted = (list) => [...list].sort((a, b) => b.lost - a.lost);
  byId("panel-errors").replaceChildren(
    make("h2", {}, known ? `Dense right, reduced wrong: ${lost.length}` : `Other answer than the dense model: ${lost.length}`),
    lost.length ? listed(sorted(lost)) : make("p", {}, "none"),
    ...(known ? [make("h2", {}, `Dense wrong, reduced right: ${won.length}`), won.length ? listed(sorted(won)) : make("p", {}, "none")] : []));
}

function redraw() { drawControls(); drawText(); byId("input").value = state.input; }

function select(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const on = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !on;
  }
}

function save(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// Draws the text as it stands on the screen: a box and a line of text for each token.
function textAsSvg() {
  const area = byId("rows").getBoundingClientRect();
  const picture = draw("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${area.width} ${area.height}`, width: area.width, height: area.height });
  const look = getComputedStyle(document.body);
  picture.append(draw("rect", { width: area.width, height: area.height, fill: look.backgroundColor }));
  for (const unit of byId("rows").querySelectorAll(".t")) {
    const style = getComputedStyle(unit);
    const [box] = unit.getClientRects();
    if (!box) continue;
    const x = box.left - area.left, y = box.top - area.top;
    picture.append(draw("rect", { x, y, width: box.width, height: box.height, rx: 3, fill: style.backgroundColor }));
    picture.append(draw("text", { x, y: y + 0.78 * box.height, fill: style.color, "font-family": style.fontFamily, "font-size": style.fontSize,
      "text-decoration": style.textDecorationLine }, unit.textContent));
  }
  return new XMLSerializer().serializeToString(picture);
}

function start() {
  byId("about").textContent = `${data.inputs.length} of ${data.corpus.inputs.length} ${data.kind}, ${data.layers} layers; tokens are dropped before layer ${data.points.map((p) => p + 1).join(" and ")}. Dense is this model without dropping.`;
  const slider = byId("threshold");
  slider.max = data.settings.length - 1;
  slider.setAttribute("aria-label", "Thresholds, from more tokens to faster");
  slider.addEventListener("input", () => { state.setting = Number(slider.value); redraw(); });
  data.settings.forEach((setting, i) => {
    if (!setting.name) return;
    const button = make("button", { value: String(i) }, setting.name);
    button.addEventListener("click", () => { state.setting = i; redraw(); });
    byId("points").append(button);
  });
  data.inputs.forEach((input, i) => byId("input").append(make("option", { value: String(i) }, `${i + 1}. ${input.title}`)));
  byId("input").addEventListener("change", (event) => { state.input = Number(event.target.value); redraw(); });
  const step = (by) => { state.input = (state.input + by + data.inputs.length) % data.inputs.length; redraw(); };
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  for (const unit of ["tokens", "words", "sentences"]) {
    const button = make("button", { value: unit }, unit);
    button.setAttribute("aria-pressed", String(unit === state.unit));
    button.addEventListener("click", () => {
      state.unit = unit;
      for (const other of byId("units").children) other.setAttribute("aria-pressed", String(other.value === unit));
      redraw();
    });
    byId("units").append(button);
  }
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => select(tab.id.slice(4)));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      select(next.id.slice(4));
      next.focus();
    });
  });
  byId("save-svg").addEventListener("click", () => save("tokens.svg", "image/svg+xml", textAsSvg()));
  byId("save-json").addEventListener("click", () => save("tokens.json", "application/json", byId("data").textContent));
  const { source } = data;
  const lines = [`Model ${source.folder}; trbert_jax ${source.version}, ${source.date}.`];
  if (source.data) lines.push(`Data ${source.data}, SHA-256 ${source.data_sha256}.`);
  if (source.command) lines.push(source.command);
  byId("source").replaceChildren(...lines.map((line) => make("p", {}, line)));
  drawCorpus();
  drawErrors();
  select("text");
  redraw();
}

start();
