// The monitor view: figures, charts, the methods and the map of the page pool.

import { LineChart, SPAN } from "./charts.js";
import { byId, html, setText } from "./dom.js";
import * as format from "./format.js";
import { History } from "./history.js";
import { PoolMap } from "./pool.js";

const DASHES = [null, "7 4", "2 3", "9 3 2 3"];

const TILES = {
  "KV held": ({ stats }) => format.bytes(total(stats, "bytes")),
  Compression: ({ stats }) => format.times(total(stats, "dense_bytes") / total(stats, "bytes")),
  "Pool used": ({ stats: { pool } }) => format.percent(pool.used / pool.pages),
  Running: ({ stats }) => format.count(stats.running),
  Waiting: ({ stats }) => format.count(stats.waiting),
  Throughput: ({ rates }) => format.rate(rates.generated),
  "TTFT, median": ({ stats }) => format.seconds(stats.ttft.p50),
  "Prefix hits": ({ stats: { prefix } }) => format.percent(prefix.hit_tokens / prefix.queried_tokens),
};

const total = (stats, field) => stats.methods.reduce((sum, method) => sum + method[field], 0);

function charts() {
  const memory = new LineChart({
    title: "KV memory",
    note: "Bytes held by running requests, by method",
    format: format.bytes,
    least: 4096,
    kind: { binary: true },
  });
  const requests = new LineChart({
    title: "Requests",
    note: "Running, and waiting for memory",
    format: format.count,
    least: 4,
    kind: { integer: true },
  });
  const throughput = new LineChart({
    title: "Throughput",
    note: "Tokens per second; a click on a name shows or hides its line",
    format: format.plain,
    least: 10,
    kind: {},
  });
  const ttft = new LineChart({
    title: "Time to first token",
    note: "Of the requests of the last minute",
    format: format.seconds,
    least: 0.1,
    kind: {},
  });
  requests.setSeries([
    { key: "running", label: "running", color: 1 },
    { key: "waiting", label: "waiting", color: 2, dash: DASHES[1] },
  ]);
  throughput.setSeries([
    { key: "generated", label: "generated", color: 1 },
    { key: "prompt", label: "prompt", color: 2, dash: DASHES[1], off: true },
  ]);
  ttft.setSeries([
    { key: "p50", label: "p50", color: 1 },
    { key: "p99", label: "p99", color: 2, dash: DASHES[1] },
  ]);
  return { memory, requests, throughput, ttft };
}

export function mountMonitor(server) {
  const view = byId("monitor");
  const history = new History(SPAN);
  const { memory, requests, throughput, ttft } = charts();
  byId("charts").append(memory.root, requests.root, throughput.root, ttft.root);
  const tiles = Object.entries(TILES).map(([name, value]) => {
    const cell = html("dd", {}, "–");
    byId("tiles").append(html("div", {}, html("dt", {}, name), cell));
    return (reading) => setText(cell, value(reading));
  });
  const pool = new PoolMap(byId("pool"), server, () => !view.hidden);

  function rows({ methods, uptime, preemptions, restarts }) {
    const events = `${format.plural(preemptions, "preemption")}, ${format.plural(restarts, "restart")} of the engine.`;
    setText(byId("methods-note"), `Up for ${format.duration(uptime)}, ${events}`);
    byId("method-rows").replaceChildren(
      ...methods.map((method) => {
        const cells = [method.running, method.waiting].map(format.count);
        cells.push(
          format.bytes(method.bytes),
          format.bytes(method.dense_bytes),
          method.bytes ? format.times(method.compression) : "–",
        );
        return html("tr", {}, html("th", { scope: "row" }, method.kv), ...cells.map((cell) => html("td", {}, cell)));
      }),
    );
  }

  function show() {
    const latest = history.readings.at(-1);
    if (view.hidden || !latest) return;
    for (const tile of tiles) tile(latest);
    rows(latest.stats);
    memory.update(
      history.points(({ stats }) => Object.fromEntries(stats.methods.map((method) => [method.kv, method.bytes]))),
    );
    requests.update(history.points(({ stats: { running, waiting } }) => ({ running, waiting })));
    throughput.update(history.points(({ rates }) => rates));
    ttft.update(history.points(({ stats }) => stats.ttft));
  }

  server.addEventListener("methods", () =>
    memory.setSeries(
      server.methods.map((kv, index) => ({
        key: kv,
        label: kv,
        color: (index % 6) + 1,
        dash: DASHES[index % DASHES.length],
      })),
    ),
  );
  server.addEventListener("stats", () => {
    history.add(performance.now() / 1000, server.stats);
    show();
  });
  document.addEventListener("viewchange", () => {
    show();
    pool.wake();
  });
}
