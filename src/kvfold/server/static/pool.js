// The map of the page pool: one cell stands for a few neighbouring pages and has the colour of who holds most of them.

import { getJson } from "./api.js";
import { html, setText } from "./dom.js";
import { bytes, count, percent, plural, sentence } from "./format.js";
import { poll } from "./server.js";

const GAP = 2; // pixels between cells

export class PoolMap {
  #pool = null;
  #columns = 1;
  #size = 10; // pixels from one cell to the next

  constructor(root, server, visible) {
    this.server = server;
    this.canvas = html("canvas", { role: "img", "aria-label": "Map of the page pool, not read yet" });
    this.summary = html("p", { class: "hint" }, "Reading the pool.");
    this.legend = html("ul", { class: "legend" });
    this.tip = html("div", { class: "tip", hidden: true });
    this.box = html("div", { class: "plot" }, this.canvas, this.tip);
    root.append(html("figcaption", {}, html("h2", {}, "Page pool"), this.summary), this.box, this.legend);
    new ResizeObserver(() => this.draw()).observe(this.box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    this.wake = poll(2000, (signal) => this.#read(signal), visible);
  }

  async #read(signal) {
    try {
      this.#pool = await getJson("pool", { signal });
    } catch (error) {
      setText(this.summary, `The map is not up to date. ${sentence(error.message)}`);
      return;
    }
    this.draw();
    this.#describe();
  }

  /** The name and the colour class of an owner. */
  #owner(index) {
    const { methods } = this.#pool;
    if (index < 0) return { name: "free", color: "free" };
    if (index >= methods.length) return { name: "prefix snapshots only", color: "kept" };
    return { name: methods[index], color: `c${(index % 6) + 1}` };
  }

  #describe() {
    const { pages, pages_per_cell: step, methods, owner } = this.#pool;
    const used = this.server.stats?.pool;
    const held = used
      ? `${count(used.used)} of ${plural(pages, "page")} used (${percent(used.used / pages)}), ${count(used.cached)} of them by prefix snapshots alone. `
      : "";
    const size = used ? `A page is ${bytes(used.page_bytes)}; ` : "";
    const scale =
      step === 1
        ? "a cell stands for one page"
        : `a cell stands for ${plural(step, "page")}, coloured by who holds most of it`;
    setText(this.summary, sentence(`${held}${size}${scale}; the fuller, the stronger the colour`));
    const owners = [...methods.keys(), methods.length, -1];
    const shares = owners.map((index) => ({
      ...this.#owner(index),
      share: owner.filter((one) => one === index).length / (owner.length || 1),
    }));
    this.legend.replaceChildren(
      ...shares.map(({ name, color, share }) =>
        html(
          "li",
          {},
          html("span", { class: `swatch cell ${color}` }),
          html("span", {}, name),
          html("span", { class: "value" }, percent(share)),
        ),
      ),
    );
    this.canvas.setAttribute(
      "aria-label",
      `Map of the page pool. Share of cells: ${shares.map(({ name, share }) => `${name} ${percent(share)}`).join(", ")}.`,
    );
  }

  draw() {
    const width = this.box.clientWidth;
    if (!this.#pool || !width) return;
    const { owner, filled } = this.#pool;
    this.#size = width < 560 ? 11 : 16;
    this.#columns = Math.max(1, Math.floor((width + GAP) / this.#size));
    const height = Math.max(1, Math.ceil(owner.length / this.#columns)) * this.#size;
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const side = this.#size - GAP;
    owner.forEach((one, index) => {
      const [x, y] = [(index % this.#columns) * this.#size, Math.floor(index / this.#columns) * this.#size];
      context.globalAlpha = one < 0 ? 1 : 0.35 + 0.65 * Math.min(1, Math.max(0, filled[index]));
      context.fillStyle = style.getPropertyValue(`--${this.#owner(one).color}`);
      context.beginPath();
      context.roundRect(x, y, side, side, 2);
      context.fill();
    });
  }

  #point(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - left, event.clientY - top];
    const column = Math.floor(x / this.#size);
    const index = Math.floor(y / this.#size) * this.#columns + column;
    const inside = this.#pool && column < this.#columns && index >= 0 && index < this.#pool.owner.length;
    this.tip.hidden = !inside;
    if (!inside) return;
    const { owner, filled, pages, pages_per_cell: step } = this.#pool;
    const [first, last] = [index * step, Math.min(pages, (index + 1) * step) - 1];
    const range = first === last ? `Page ${count(first)}` : `Pages ${count(first)} to ${count(last)}`;
    this.tip.replaceChildren(
      html("p", {}, range),
      html("p", {}, `${this.#owner(owner[index]).name}, ${percent(filled[index])} filled`),
    );
    const beside = x + 14 + this.tip.offsetWidth > this.box.clientWidth ? x - 14 - this.tip.offsetWidth : x + 14;
    this.tip.style.transform = `translate(${Math.max(0, Math.round(beside))}px, ${Math.round(y + 14)}px)`;
  }
}
