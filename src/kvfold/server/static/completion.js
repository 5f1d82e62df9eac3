// One answer of the model: its text as it arrives, and what it cost.

import { streamChat } from "./api.js";
import * as format from "./format.js";
import { html } from "./dom.js";

export class Completion {
  text = "";
  usage = null;
  finish = null; // "stop" or "length" from the server; "stopped" by the user; "failed"
  error = null;
  #started = 0;
  #first = null;
  #last = null;

  /** `request` is the body of a chat completion. */
  constructor(request) {
    this.request = request;
  }

  /** Stream the answer, calling `onText(delta)` for each piece. Never throws: `finish` and `error` tell how it ended. */
  async run(signal, onText) {
    this.#started = performance.now();
    try {
      for await (const chunk of streamChat(this.request, signal)) {
        this.usage = chunk.usage ?? this.usage;
        const choice = chunk.choices?.[0];
        this.finish = choice?.finish_reason ?? this.finish;
        const delta = choice?.delta?.content;
        if (!delta) continue;
        this.#last = performance.now();
        this.#first ??= this.#last;
        this.text += delta;
        onText(delta);
      }
    } catch (error) {
      this.finish = signal.aborted ? "stopped" : "failed";
      this.error = signal.aborted ? null : error;
    }
    return this;
  }

  get method() {
    return this.usage?.kv?.method ?? this.request.kv;
  }

  /** Time to first token in seconds, as this browser saw it; null before it. */
  get ttft() {
    return this.#first === null ? null : (this.#first - this.#started) / 1000;
  }

  /** Tokens per second after the first one; null where there are too few to say. */
  get rate() {
    const tokens = (this.usage?.completion_tokens ?? 0) - 1;
    const time = (this.#last - this.#first) / 1000;
    return tokens > 0 && time > 0 ? tokens / time : null;
  }

  /** A `dl` with what the answer cost. */
  figures() {
    const kv = this.usage?.kv;
    const facts = [["Method", this.method]];
    if (kv) facts.push(["KV cache", format.bytes(kv.bytes)], ["Compression", format.times(kv.compression)]);
    if (this.ttft !== null) facts.push(["TTFT", format.seconds(this.ttft)]);
    if (this.rate !== null) facts.push(["Speed", format.rate(this.rate)]);
    if (this.usage)
      facts.push([
        "Tokens",
        `${format.count(this.usage.prompt_tokens)} in, ${format.count(this.usage.completion_tokens)} out`,
      ]);
    const ends = { length: "at max tokens", stopped: "stopped by you", failed: "interrupted" };
    if (this.finish in ends) facts.push(["Ended", ends[this.finish]]);
    const list = html("dl", { class: "figures" });
    for (const [name, value] of facts) list.append(html("div", {}, html("dt", {}, name), html("dd", {}, value)));
    return list;
  }
}
