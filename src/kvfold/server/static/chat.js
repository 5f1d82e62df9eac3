// The chat view: a conversation with one method, streamed.

import { announce, byId, fillMethods, hideAlert, html, sendOnEnter, setText, showAlert } from "./dom.js";
import { Completion } from "./completion.js";
import { sentence } from "./format.js";

export function mountChat(server) {
  const log = byId("log");
  const welcome = byId("welcome");
  const form = byId("chat-form");
  const text = byId("chat-text");
  const send = byId("chat-send");
  const stop = byId("chat-stop");
  let turns = []; // [{ user, answer }] that the model will see again
  let running = null; // AbortController of the answer that is being written

  // What a closed settings panel (on a phone) would hide.
  const showChosen = () => setText(byId("chat-chosen"), byId("chat-settings").open ? "" : byId("chat-kv").value);
  server.addEventListener("methods", () => {
    fillMethods(byId("chat-kv"), server.methods);
    showChosen();
  });
  byId("chat-settings").addEventListener("toggle", showChosen);
  byId("chat-settings").open = matchMedia("(min-width: 860px)").matches;

  function messages(latest) {
    const system = byId("chat-system").value.trim();
    const past = turns.flatMap((turn) => [
      { role: "user", content: turn.user },
      { role: "assistant", content: turn.answer },
    ]);
    return [...(system ? [{ role: "system", content: system }] : []), ...past, { role: "user", content: latest }];
  }

  function setRunning(controller) {
    running = controller;
    const focused = document.activeElement;
    stop.hidden = controller === null;
    send.hidden = controller !== null;
    // The button that had the focus is gone: hand it to the one in its place.
    if (controller && focused === send) stop.focus();
    if (!controller && focused === stop) text.focus();
  }

  // Follow the text unless the reader has scrolled up; once per frame, because each time costs a layout.
  let following = true;
  let scheduled = false;
  let before = 0;
  log.addEventListener("scroll", () => {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    following = atEnd || (following && log.scrollTop >= before); // text that came meanwhile is no scrolling up
    before = log.scrollTop;
  });
  function followEnd() {
    if (scheduled || !following) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      log.scrollTop = log.scrollHeight;
    });
  }

  async function submit() {
    const prompt = text.value;
    if (running || !prompt.trim()) return;
    if (!form.checkValidity()) {
      byId("chat-settings").open = true; // a complaint about a field that is hidden would be lost
      form.reportValidity();
      return;
    }
    hideAlert();
    welcome.hidden = true;
    const body = html("p", { class: "body", dir: "auto" });
    const answer = html("article", { class: "message assistant writing", "aria-label": "Answer" }, body);
    const question = html(
      "article",
      { class: "message user", "aria-label": "You" },
      html("p", { class: "body", dir: "auto" }, prompt),
    );
    log.append(question, answer);
    following = true;
    followEnd();
    const completion = new Completion({
      model: server.model || undefined,
      kv: byId("chat-kv").value || undefined,
      messages: messages(prompt),
      max_completion_tokens: byId("chat-max").valueAsNumber,
      temperature: byId("chat-temperature").valueAsNumber,
    });
    text.value = "";
    const controller = new AbortController();
    setRunning(controller);
    announce("Answering");
    await completion.run(controller.signal, (delta) => {
      body.append(delta);
      followEnd();
    });
    answer.classList.remove("writing");
    body.normalize();
    if (!log.contains(answer)) return; // "New chat" took the conversation away meanwhile
    setRunning(null);
    finish(completion, prompt, question, answer, body);
    followEnd();
  }

  function finish(completion, prompt, question, answer, body) {
    const broken = completion.finish === "failed";
    const empty = completion.text === "";
    if (broken || (empty && completion.finish === "stopped")) {
      // The model never saw this turn through: it is not part of the conversation, and its text can be sent again.
      text.value = text.value ? `${prompt}\n${text.value}` : prompt;
    } else {
      turns.push({ user: prompt, answer: completion.text });
    }
    if (broken) showAlert(`${sentence(completion.error.message)} Your text is kept below: you can send it again.`);
    if (empty && ["failed", "stopped"].includes(completion.finish)) {
      question.remove();
      answer.remove();
      welcome.hidden = log.querySelector(".message") !== null;
      return;
    }
    if (empty) body.append(html("em", {}, "The answer is empty."));
    if (broken) for (const part of [question, answer]) part.classList.add("broken");
    answer.append(completion.figures());
    if (!broken) announce(empty ? "The answer is empty." : completion.text);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  sendOnEnter(text, submit);
  stop.addEventListener("click", () => running?.abort());

  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    setRunning(null);
    turns = [];
    for (const message of log.querySelectorAll(".message")) message.remove();
    welcome.hidden = false;
    hideAlert();
    text.focus();
  });

  byId("samples").addEventListener("click", (event) => {
    const sample = event.target.closest("button");
    if (!sample) return;
    text.value = sample.textContent;
    text.focus();
  });
}
