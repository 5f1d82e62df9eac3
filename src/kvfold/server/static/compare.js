// The compare view: one prompt under two methods at once, and where their texts part.

import { byId, fillMethods, hideAlert, html, sendOnEnter, setText, showAlert } from "./dom.js";
import { Completion } from "./completion.js";
import { cut, parting } from "./diff.js";
import { bytes, plural, sentence, times } from "./format.js";
import { longPrompt } from "./sample.js";

const SEED = 0; // the same on both sides, so that sampling alone does not make the texts differ

class Side {
  done = false;

  constructor(name, completion) {
    this.completion = completion;
    this.body = html("p", { class: "body", dir: "auto" });
    this.root = html(
      "article",
      { class: "card side writing", "aria-label": name },
      html("h2", {}, completion.request.kv ?? "default"),
      this.body,
    );
  }

  async run(signal, onChange) {
    await this.completion.run(signal, onChange);
    this.done = true;
    this.root.classList.remove("writing");
    if (!this.completion.text) this.root.insertBefore(html("p", { class: "hint" }, "No text."), this.body.nextSibling);
    this.root.append(this.completion.figures());
  }

  /** Show the text with the word at `start` marked, or plain where `start` is null. */
  show(start) {
    if (start === null) return setText(this.body, this.completion.text);
    const [common, word, rest] = cut(this.completion.text, start);
    // A text that ends where the other goes on has no word to mark: its end is the difference.
    const mark = html("mark", word ? {} : { class: "end" }, word || "ends here");
    this.body.replaceChildren(html("span", { class: "common" }, common), mark, html("span", {}, rest));
  }
}

function verdict(left, right, place) {
  const text = left.completion.text;
  if (place) {
    const words = text.slice(0, place.start).split(/\s+/).filter(Boolean).length;
    return place.at === 0
      ? "The texts differ from the first character."
      : `The texts part after ${plural(place.at, "character")} (${plural(words, "word")}).`;
  }
  if (!left.done || !right.done)
    return text || right.completion.text ? "The same so far." : "Waiting for the first tokens.";
  if ([left, right].some((side) => side.completion.finish === "failed")) return "No comparison: an answer failed.";
  if (!text) return "No comparison: there is no text.";
  return [left, right].some((side) => side.completion.finish === "stopped")
    ? "The same up to where you stopped."
    : `The texts are identical (${plural(text.length, "character")}).`;
}

/** What the smaller cache saves; empty where the two are not both known or not different. */
function saving(sides) {
  if (!sides.every((side) => side.completion.usage?.kv?.bytes)) return "";
  const [small, large] = sides.map((side) => side.completion.usage.kv).sort((one, other) => one.bytes - other.bytes);
  if (large.bytes < 1.005 * small.bytes) return "";
  const ratio = times(large.bytes / small.bytes);
  return ` The KV cache takes ${bytes(small.bytes)} under ${small.method}, ${bytes(large.bytes)} (${ratio}) under ${large.method}.`;
}

export function mountCompare(server) {
  const form = byId("compare-form");
  const [run, stop] = [byId("compare-run"), byId("compare-stop")];
  const pickers = [byId("compare-left"), byId("compare-right")];
  let running = null;

  server.addEventListener("methods", () => {
    pickers.forEach((picker, index) => fillMethods(picker, server.methods, index));
    byId("compare-hint").hidden = server.methods.length > 1;
  });

  function setRunning(controller) {
    running = controller;
    const focused = document.activeElement;
    stop.hidden = controller === null;
    run.hidden = controller !== null;
    if (controller && focused === run) stop.focus();
    if (!controller && focused === stop) run.focus();
  }

  async function submit() {
    if (running || !byId("compare-text").value.trim() || !form.reportValidity()) return;
    hideAlert();
    const sides = pickers.map((picker, index) => {
      const request = {
        model: server.model || undefined,
        kv: picker.value || undefined,
        messages: [{ role: "user", content: byId("compare-text").value }],
        max_completion_tokens: byId("compare-max").valueAsNumber,
        temperature: byId("compare-temperature").valueAsNumber,
        seed: SEED,
      };
      return new Side(index ? "Right" : "Left", new Completion(request));
    });
    byId("sides").replaceChildren(...sides.map((side) => side.root));
    const [left, right] = sides;
    const refresh = () => {
      // A side that was stopped or broke off only seems to end: there is nothing to conclude from its end.
      const ended = sides.map((side) => side.done && ["stop", "length"].includes(side.completion.finish));
      const place = parting(left.completion.text, right.completion.text, ...ended);
      for (const side of sides) side.show(place ? place.start : null);
      setText(byId("verdict"), verdict(left, right, place) + saving(sides));
    };
    const controller = new AbortController();
    setRunning(controller);
    refresh();
    await Promise.all(sides.map((side) => side.run(controller.signal, refresh)));
    setRunning(null);
    refresh();
    const errors = sides
      .filter((side) => side.completion.error)
      .map((side) => `${side.completion.request.kv ?? "default"}: ${sentence(side.completion.error.message)}`);
    if (errors.length) showAlert(errors.join(" "));
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  sendOnEnter(byId("compare-text"), submit);
  byId("compare-sample").addEventListener("click", () => {
    byId("compare-text").value = longPrompt();
  });
  stop.addEventListener("click", () => running?.abort());
}
