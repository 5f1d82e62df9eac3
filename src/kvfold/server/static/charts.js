// A line chart of the last minutes, drawn as SVG by hand, with a legend of live values and a tooltip.

import { ticks } from "./axis.js";
import { html, setText, svg } from "./dom.js";

export const SPAN = 300; // seconds shown
const GAP = 4; // seconds without a reading after which a line is broken
const HEIGHT = 190;
const EDGE = { top: 12, right: 14, bottom: 26, left: 64 };

export class LineChart {
  #points = []; // [{ time (s), values: { key: number | null } }], oldest first
  #series = [];
  #hidden = new Set();
  #cursor = null; // time under the pointer or chosen by arrow keys
  #rows = new Map();

  /** `format` writes a value; `least` is the smallest top of the axis; `kind` as in `ticks`. */
  constructor({ title, note, format, least, kind }) {
    Object.assign(this, { title, format, least, kind });
    this.plot = svg("svg", { height: HEIGHT, role: "img", tabindex: "0" });
    this.legend = html("ul", { class: "legend" });
    this.tip = html("div", { class: "tip", hidden: true });
    const box = html("div", { class: "plot" }, this.plot, this.tip);
    this.root = html(
      "figure",
      { class: "card chart" },
      html("figcaption", {}, html("h2", {}, title), html("p", { class: "hint" }, note)),
      box,
      this.legend,
    );
    new ResizeObserver(() => this.draw()).observe(box);
    box.addEventListener("pointermove", (event) =>
      this.#point(this.#timeAt(event.clientX - this.plot.getBoundingClientRect().left)),
    );
    box.addEventListener("pointerleave", () => this.#point(null));
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    this.plot.addEventListener("blur", () => this.#point(null));
  }

  /** `series`: [{ key, label, color (1, 2, …), dash, off }]; what is `off` is shown only when asked for. */
  setSeries(series) {
    this.#series = series;
    this.#hidden = new Set(series.filter(({ off }) => off).map(({ key }) => key));
    this.#rows.clear();
    this.legend.replaceChildren(
      ...series.map(({ key, label, color, dash }) => {
        const value = html("span", { class: "value" }, "–");
        this.#rows.set(key, value);
        const swatch = svg(
          "svg",
          { class: `swatch line c${color}`, width: 22, height: 10, "aria-hidden": "true" },
          svg("path", { d: "M1 5H21", "stroke-dasharray": dash }),
        );
        const button = html(
          "button",
          { type: "button", "aria-pressed": String(!this.#hidden.has(key)), title: "Show or hide this line" },
          swatch,
          html("span", {}, label),
          value,
        );
        button.addEventListener("click", () => {
          if (!this.#hidden.delete(key)) this.#hidden.add(key);
          button.setAttribute("aria-pressed", String(!this.#hidden.has(key)));
          this.draw();
        });
        return html("li", {}, button);
      }),
    );
  }

  update(points) {
    this.#points = points;
    this.draw();
  }

  draw() {
    const width = this.plot.parentElement.clientWidth;
    if (!width) return;
    const shown = this.#series.filter(({ key }) => !this.#hidden.has(key));
    const now = this.#points.at(-1)?.time ?? 0;
    const top = Math.max(this.least, ...this.#points.flatMap(({ values }) => shown.map(({ key }) => values[key] ?? 0)));
    const marks = ticks(top, this.kind);
    this.scale = {
      now,
      width,
      x: (time) => EDGE.left + (1 - (now - time) / SPAN) * (width - EDGE.left - EDGE.right),
      y: (value) => HEIGHT - EDGE.bottom - (value / marks.at(-1)) * (HEIGHT - EDGE.top - EDGE.bottom),
    };
    this.plot.setAttribute("width", width);
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.plot.replaceChildren(
      ...this.#axes(marks),
      ...shown.map((series) => this.#line(series)),
      ...this.#crosshair(shown),
    );
    this.#describe();
  }

  #axes(marks) {
    const { x, y, now, width } = this.scale;
    const rows = marks.flatMap((value) => [
      svg("line", {
        class: value ? "grid" : "axis",
        x1: EDGE.left,
        x2: width - EDGE.right,
        y1: y(value),
        y2: y(value),
      }),
      svg(
        "text",
        { class: "tick", x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" },
        value ? this.format(value) : "0",
      ),
    ]);
    const columns = [5, 4, 3, 2, 1, 0].map((minutes) => {
      const anchor = minutes === 0 ? "end" : minutes === 5 ? "start" : "middle";
      const label = minutes === 0 ? "now" : minutes === 5 ? "5 min ago" : `−${minutes}`;
      return svg("text", { class: "tick", x: x(now - minutes * 60), y: HEIGHT - 8, "text-anchor": anchor }, label);
    });
    return [...rows, ...columns.filter((_, index) => width > 300 || index !== 1)];
  }

  #line({ key, color, dash }) {
    const { x, y } = this.scale;
    let path = "";
    let before = null;
    for (const { time, values } of this.#points) {
      const value = values[key];
      if (typeof value !== "number") {
        before = null;
        continue;
      }
      path += `${before !== null && time - before < GAP ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
      before = time;
    }
    return svg("path", { class: `line c${color}`, d: path || null, "stroke-dasharray": dash });
  }

  /** The crosshair at the cursor and the tooltip beside it. */
  #crosshair(shown) {
    const point = this.#cursor === null ? null : this.#nearest(this.#cursor);
    this.tip.hidden = point === null;
    if (!point) return [];
    const { x, y, now, width } = this.scale;
    const at = x(point.time);
    const rows = shown.map(({ key, label, color }) =>
      html("li", { class: `c${color}` }, html("span", {}, label), html("strong", {}, this.format(point.values[key]))),
    );
    const ago = Math.round(now - point.time);
    this.tip.replaceChildren(html("p", {}, ago ? `${ago} s ago` : "Now"), html("ul", {}, ...rows));
    const left = at + 12 + this.tip.offsetWidth > width ? at - 12 - this.tip.offsetWidth : at + 12;
    this.tip.style.transform = `translate(${Math.max(0, Math.round(left))}px, ${EDGE.top}px)`;
    const dots = shown.filter(({ key }) => typeof point.values[key] === "number");
    return [
      svg("line", { class: "cursor", x1: at, x2: at, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      ...dots.map(({ key, color }) =>
        svg("circle", { class: `dot c${color}`, cx: at, cy: y(point.values[key]), r: 3.5 }),
      ),
    ];
  }

  #describe() {
    const last = this.#points.at(-1)?.values ?? {};
    for (const [key, value] of this.#rows) setText(value, this.format(last[key]));
    const now = this.#series.map(({ key, label }) => `${label} ${this.format(last[key])}`).join(", ");
    this.plot.setAttribute(
      "aria-label",
      `${this.title}, line chart of the last 5 minutes. Now: ${now}. Arrow keys read earlier values.`,
    );
  }

  #timeAt(pixel) {
    const { now, width } = this.scale;
    return now - SPAN * (1 - (pixel - EDGE.left) / (width - EDGE.left - EDGE.right));
  }

  #nearest(time) {
    let best = null;
    for (const point of this.#points)
      if (!best || Math.abs(point.time - time) < Math.abs(best.time - time)) best = point;
    return best;
  }

  #point(time) {
    this.tip.removeAttribute("role"); // a tooltip that follows the pointer is not read out
    this.#cursor = time;
    this.draw();
  }

  #key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return this.#point(null);
    if (!(event.key in moves) || !this.#points.length) return;
    event.preventDefault();
    const from = this.#cursor === null ? this.#points.length - 1 : this.#points.indexOf(this.#nearest(this.#cursor));
    const step = this.#cursor === null ? 0 : moves[event.key];
    const index = Math.min(this.#points.length - 1, Math.max(0, from + step));
    this.tip.setAttribute("role", "status");
    this.#cursor = this.#points[index].time;
    this.draw();
  }
}
