// What the page knows of the server: its readiness, its figures, its methods. Polls only while the page is visible.

import { getJson } from "./api.js";

const LIMIT = 5000; // ms after which a server that does not answer counts as unreachable

/** Call `task` every `period` ms while the document is visible and `wanted()`; never twice at once. */
export function poll(period, task, wanted = () => true) {
  let timer = null;
  let busy = false;
  async function tick() {
    clearTimeout(timer);
    if (busy || document.hidden || !wanted()) return;
    busy = true;
    const started = performance.now();
    await task(AbortSignal.timeout(LIMIT));
    busy = false;
    timer = setTimeout(tick, Math.max(0, period - (performance.now() - started)));
  }
  document.addEventListener("visibilitychange", tick);
  tick();
  return tick; // to be called when `wanted()` may have changed
}

/** Events: `ready` (readiness read), `stats` (figures read), `methods` (model or methods changed). */
export class Server extends EventTarget {
  ready = { status: "connecting", reason: null, restarts: 0 };
  stats = null;
  model = "";
  methods = [];

  start() {
    poll(2000, (signal) => this.#readReady(signal));
    poll(1000, (signal) => this.#readStats(signal));
  }

  async #readReady(signal) {
    try {
      this.ready = await getJson("ready", { signal, accept: [503] });
    } catch (error) {
      const refused = error.status === 401 || error.status === 403;
      this.ready = { status: refused ? "refused" : "unreachable", reason: refused ? error.message : null, restarts: 0 };
    }
    this.dispatchEvent(new Event("ready"));
  }

  async #readStats(signal) {
    try {
      this.stats = await getJson("stats", { signal });
    } catch {
      return; // The status pill tells; the charts show a gap.
    }
    const names = this.stats.methods.map((method) => method.kv);
    if (this.model !== this.stats.model || names.join("\n") !== this.methods.join("\n")) {
      this.model = this.stats.model;
      this.methods = names;
      this.dispatchEvent(new Event("methods"));
    }
    this.dispatchEvent(new Event("stats"));
  }
}
