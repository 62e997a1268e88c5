// Curves of runs as SVG: loss or reward with its running mean, held-out marks, the learning rate below.

import { byId, make } from "./text.js";
import { word } from "./words.js";

const NS = "http://www.w3.org/2000/svg";
const [LEFT, RIGHT, TOP, BOTTOM] = [48, 18, 24, 24]; // pixels around a chart
const HEIGHTS = { loss: 250, reward: 250, lr: 100 };
const FEWEST = 5; // steps that a zoom leaves

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  const isShort = value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5);
  return isShort ? String(+value.toPrecision(digits)) : value.toExponential(2);
}

function ticks(low, high, log) {
  if (log) {
    const [first, last] = [low, high].map((value) => Math.floor(Math.log10(value)));
    const powers = Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
    const all = powers.flatMap((power) => [1, 2, 5].map((one) => one * power));
    const inside = all.filter((value) => value >= low && value <= high);
    if (inside.length > 1) return inside;
  }
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
  return Array.from({ length: count }, (_, i) => (Math.ceil(low / step) + i) * step);
}

/** Index of the step that is nearest to `wanted`. */
function nearest(steps, wanted) {
  let best = 0;
  steps.forEach((step, i) => {
    if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = i;
  });
  return best;
}

/** A run's value at a step, or at the nearest one that is shown; undefined beyond its ends. */
function valueAt({ step: steps, ...columns }, name, step) {
  return step >= steps[0] && step <= steps.at(-1) ? columns[name]?.[nearest(steps, step)] : undefined;
}

/** What a run's curve is about. */
const scoreOf = (curves) => (curves.reward ? "reward" : "loss");

export class Curves {
  /** `zoomed` is called when `range` changes, so that more points of its steps can be asked for. */
  constructor(place, zoomed) {
    Object.assign(this, { place, zoomed, runs: [], range: null, log: false, at: null });
    this.charts = make("div", { className: "charts", tabIndex: 0, role: "slider" });
    this.readout = make("p", { className: "readout" });
    this.legend = make("ul", { className: "legend" });
    this.buttons = { in: 0.5, out: 2, all: Infinity };
    const row = make("div", { className: "row" });
    for (const [name, factor] of Object.entries(this.buttons)) {
      const button = make("button", { type: "button", className: "quiet" });
      button.addEventListener("click", () => this.zoom(factor));
      this.buttons[name] = button;
      row.append(button);
    }
    const log = make("input", { type: "checkbox" });
    log.addEventListener("change", () => this.draw({ log: log.checked }));
    this.logWord = make("span");
    row.append(make("label", { className: "check" }, log, this.logWord));
    place.append(row, this.legend, this.charts, this.readout);
    new ResizeObserver(() => this.draw()).observe(this.charts);
    this.listen();
  }

  /** Show runs: {name, curves, evaluations}; the first is the one that the page is about. */
  show(runs) {
    this.draw({ runs: runs.filter(({ curves }, i) => i === 0 || curves.step.length) });
  }

  /** The steps that there are: [first, last]. */
  get all() {
    return [1, Math.max(2, ...this.runs.map(({ step }) => step))];
  }

  /** The steps of the first run, which are shown without a zoom. */
  get own() {
    return [1, Math.max(2, this.runs[0].step)];
  }

  /** The steps that have points: those of the first run, if it has any. */
  get steps() {
    return this.runs.map(({ curves }) => curves.step).find((steps) => steps.length) ?? [];
  }

  zoom(factor) {
    const [first, last] = this.all;
    const [from, to] = this.range ?? this.own;
    const centre = this.at ?? (from + to) / 2;
    const width = Math.min(last - first, Math.max(FEWEST, (to - from) * factor));
    const begin = Math.max(first, Math.min(centre - width / 2, last - width));
    this.limit([begin, begin + width]);
  }

  limit(range) {
    this.draw({ range: String(range) === String(this.own) ? null : range });
    this.zoomed();
  }

  draw(changes = {}) {
    Object.assign(this, changes);
    for (const name of ["in", "out", "all"]) this.buttons[name].textContent = word(`zoom_${name}`);
    this.logWord.textContent = word("logarithmic");
    this.charts.ariaLabel = word("curves");
    this.place.hidden = !this.range && !this.steps.length;
    const width = this.charts.clientWidth;
    if (this.place.hidden || !width) return;
    const [from, to] = this.range ?? this.own;
    this.buttons.out.disabled = this.buttons.all.disabled = to - from >= this.all[1] - 1;
    this.x = (step) => LEFT + ((step - from) / (to - from || 1)) * (width - LEFT - RIGHT);
    const share = (x) => Math.max(0, Math.min(1, (x - LEFT) / (width - LEFT - RIGHT)));
    this.step = (x) => from + share(x) * (to - from);
    const [{ curves }] = this.runs;
    this.score = scoreOf(curves);
    const scores = curves[this.score] ?? [];
    this.isSmooth = scores.some((value, i) => value !== curves.mean[i]); // not in a short run
    const isIn = (step) => step >= from && step <= to;
    this.charts.replaceChildren(...[this.score, "lr"].map((name) => this.chart(name, width, from, to, isIn)));
    this.charts.ariaValueMin = from;
    this.charts.ariaValueMax = to;
    this.showLegend();
    this.read(this.at);
  }

  chart(name, width, from, to, isIn) {
    const height = HEIGHTS[name];
    const log = name !== "lr" && this.log;
    const lines = this.runs.slice(0, name === "lr" ? 1 : undefined).map((run) => this.lines(run, name, isIn));
    const usable = lines.flatMap(({ all }) => all).filter((value) => !log || value > 0);
    let [low, high] = [Math.min(...usable), Math.max(...usable)];
    if (!usable.length || !Number.isFinite(low)) [low, high] = [0.1, 1];
    if (!log) [low, high] = [low - (high - low || 1) / 20, high + (high - low || 1) / 20];
    if (low === high) high = low * 1.1;
    const scale = log ? Math.log : (value) => value;
    const y = (value) => {
      const share = (scale(value) - scale(low)) / (scale(high) - scale(low));
      return height - BOTTOM - share * (height - TOP - BOTTOM);
    };
    const picture = svg("svg", { width, height, "aria-hidden": "true" });
    const edges = usable.length ? [Math.min(...usable), Math.max(...usable)] : [];
    const [values, digits] = name === "lr" ? [new Set(edges), 3] : [ticks(low, high, log), 6];
    for (const value of values) {
      const at = y(value);
      picture.append(svg("path", { class: "grid", d: `M${LEFT} ${at}H${width - RIGHT}` }));
      picture.append(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, number(value, digits)));
    }
    for (const step of ticks(from, to, false).filter(Number.isInteger)) {
      picture.append(svg("text", { x: this.x(step), y: height - 6, "text-anchor": "middle" }, String(step)));
    }
    picture.append(svg("text", { x: LEFT, y: 14 }, word(name === "lr" ? "rate" : name)));
    const path = (points) => {
      const known = points.filter(([, value]) => Number.isFinite(value) && (!log || value > 0));
      const places = known.map(([step, value]) => `${this.x(step).toFixed(1)} ${y(value).toFixed(1)}`);
      return places.length ? `M${places.join("L")}` : "";
    };
    lines.map((line, i) => ({ ...line, i })).reverse().forEach(({ drawn, marks, i }) => {
      for (const [kind, points] of Object.entries(drawn)) {
        picture.append(svg("path", { class: `line ${kind} run-${i % 5}`, d: path(points) }));
      }
      for (const [step, value] of marks.filter((mark) => !log || mark[1] > 0)) {
        const circle = { class: `mark run-${i % 5}`, cx: this.x(step), cy: y(value), r: 4 };
        picture.append(svg("circle", circle));
      }
    });
    picture.append(svg("path", { class: "cursor", d: "" }));
    return picture;
  }

  /** What is drawn of a run: {drawn: kind -> points, marks, all: the values}. */
  lines({ curves, evaluations = [] }, name, isIn) {
    const visible = (values) =>
      curves.step.map((step, i) => [step, values?.[i]]).filter(([step]) => isIn(step));
    const hasRaw = this.isSmooth && this.runs[0].curves === curves;
    const drawn = { mean: visible(name === "lr" ? curves.lr : scoreOf(curves) === name && curves.mean) };
    if (name !== "lr" && hasRaw) drawn.raw = visible(curves[name]);
    const held = name === "lr" ? [] : evaluations.map((line) => [Math.max(line.step, 1), line[name]]);
    const marks = held.filter(([step, value]) => isIn(step) && Number.isFinite(value));
    if (marks.length > 1) drawn.held = marks;
    const values = [...Object.values(drawn).flat(), ...marks].map(([, value]) => value);
    return { drawn, marks, all: values.filter(Number.isFinite) };
  }

  showLegend() {
    const entries = [["mean run-0", word(this.isSmooth ? "mean" : this.score)]];
    if (this.isSmooth) entries.push(["raw run-0", word(this.score)]);
    if (this.runs[0].evaluations?.length) entries.push(["held run-0", word("held_out")]);
    this.runs.slice(1).forEach(({ name }, i) => entries.push([`mean run-${(i + 1) % 5}`, name]));
    this.legend.replaceChildren(...entries.map(([kind, text]) => {
      const line = svg("path", { class: `line ${kind}`, d: "M1 5H21" });
      const sign = svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
      return make("li", {}, sign, text);
    }));
  }

  /** Read the values at the step that is nearest to `wanted`; null reads the last one. */
  read(wanted) {
    const [{ curves, evaluations = [] }, ...others] = this.runs;
    const { steps, score } = this;
    this.readout.textContent = "";
    if (!steps.length) return null;
    const step = wanted === null ? steps.at(-1) : steps[nearest(steps, wanted)];
    const at = (name) => number(valueAt(curves, name, step));
    const parts = [`${word("step")} ${step}`, `${word(score)} ${at(score)}`];
    if (this.isSmooth) parts.push(`${word("mean")} ${at("mean")}`);
    const before = evaluations.findLast((one) => one.step <= step && Number.isFinite(one[score]));
    if (before) parts.push(`${word("held_out")} ${number(before[score])} (${word("step")} ${before.step})`);
    parts.push(`${word("rate")} ${at("lr")}`);
    for (const { name, curves: other } of others) {
      parts.push(`${name} ${number(valueAt(other, scoreOf(other) === score ? "mean" : "", step))}`);
    }
    this.readout.textContent = parts.join(" · ");
    this.charts.ariaValueNow = step;
    this.charts.ariaValueText = this.readout.textContent;
    for (const cursor of this.charts.querySelectorAll(".cursor")) {
      const height = cursor.parentElement.getAttribute("height");
      const shown = wanted !== null && this.x(step) >= LEFT - 1;
      cursor.setAttribute("d", shown ? `M${this.x(step)} ${TOP}V${height - BOTTOM}` : "");
    }
    return step;
  }

  listen() {
    const { charts } = this;
    const stepOf = (event) => this.step(event.clientX - charts.getBoundingClientRect().left);
    let from = null;
    charts.addEventListener("pointerdown", (event) => {
      from = event.pointerType === "mouse" ? stepOf(event) : null;
      this.at = this.read(stepOf(event));
    });
    charts.addEventListener("pointermove", (event) => (this.at = this.read(stepOf(event))));
    charts.addEventListener("pointerleave", () => (from = null));
    charts.addEventListener("pointerup", (event) => {
      const range = [from, stepOf(event)].sort((one, other) => one - other);
      if (from !== null && Math.abs(this.x(range[1]) - this.x(range[0])) > 12) this.limit(range);
      from = null;
    });
    charts.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const { steps } = this;
      const last = steps.length - 1;
      const i = this.at === null ? last : nearest(steps, this.at);
      const ways = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -i, End: last };
      const way = ways[event.key];
      if (way !== undefined) this.at = this.read(steps[Math.max(0, Math.min(last, i + way))]);
      else if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 0.5 : 2);
      else if (event.key === "0") this.zoom(Infinity);
      else return;
      event.preventDefault();
    });
  }
}

export const curvesAt = (zoomed) => new Curves(byId("curves"), zoomed);
