// Puts the page together: tabs, the server's status, and the three views.

import { mountChat } from "./chat.js";
import { mountCompare } from "./compare.js";
import { byId, hideAlert, setText } from "./dom.js";
import { sentence } from "./format.js";
import { mountMonitor } from "./monitor.js";
import { Server } from "./server.js";

const LABELS = {
  connecting: "Connecting",
  starting: "Starting",
  ready: "Ready",
  restarting: "Restarting",
  draining: "Draining",
  failed: "Failed",
  stopped: "Stopped",
  refused: "Key refused",
  unreachable: "Server unreachable",
};

const NOTICES = {
  starting: "The engine is starting.",
  restarting: "The engine died and is being started again.",
  draining: "The server is shutting down: it finishes running requests and takes no new ones.",
  failed: "The engine is down.",
  refused: "The server refuses the key that this browser sends.",
  unreachable: "The server cannot be reached. This page keeps trying.",
};

function mountTabs() {
  const tabs = Array.from(document.querySelectorAll("[role=tab]"));
  const panel = (tab) => byId(tab.getAttribute("aria-controls"));
  // No element has this as its id: the browser would start the Tab order there, past the skip link.
  const hash = (tab) => `#/${panel(tab).id}`;
  function select(chosen) {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      panel(tab).hidden = !on;
    }
    history.replaceState(null, "", hash(chosen));
    document.dispatchEvent(new Event("viewchange"));
  }
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const at = tabs.indexOf(tab);
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const target = tabs[(next + tabs.length) % tabs.length];
      select(target);
      target.focus();
    });
  }
  const named = () => tabs.find((tab) => hash(tab) === location.hash);
  window.addEventListener("hashchange", () => named() && select(named()));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // it leads to whichever view is open
    panel(tabs.find((tab) => tab.tabIndex === 0)).focus();
  });
  select(named() ?? tabs[0]);
}

function mountStatus(server) {
  const pill = byId("status");
  const notice = byId("notice");
  server.addEventListener("ready", () => {
    const { status, reason } = server.ready;
    pill.dataset.status = status;
    setText(pill, LABELS[status] ?? status);
    const why = reason ? sentence(reason) : (NOTICES[status] ?? "");
    notice.hidden = status === "ready" || why === "";
    setText(notice, notice.hidden ? "" : why);
  });
  server.addEventListener("methods", () => {
    setText(byId("model"), server.model);
    byId("model").title = server.model;
    document.title = server.model ? `${server.model} · kvfold` : "kvfold";
  });
}

const server = new Server();
mountStatus(server);
mountChat(server);
mountCompare(server);
mountMonitor(server);
mountTabs();
byId("alert-close").addEventListener("click", hideAlert);
server.start();
