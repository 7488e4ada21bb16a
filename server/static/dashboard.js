// Swaps in the panels that the server's stream brings, and hands its samples to the charts.
import { Charts } from "./charts.js";
import { setUpBenchmark, setUpChat } from "./actions.js";

const RETRY_MS = 3000;
const THEMES = ["auto", "light", "dark"];
const status = document.getElementById("status");
const charts = new Charts();
let stream = null;

function show(kind, text) {
  status.className = "status " + kind;
  status.textContent = text;
}

// Keeps what the reader did to a panel: opened details, a scrolled table.
function swap(name, html) {
  const panel = document.querySelector('[data-live="' + name + '"]');
  const open = [...panel.querySelectorAll("details")].map((d) => d.open);
  const left = [...panel.querySelectorAll(".scroll")].map((s) => s.scrollLeft);
  const fresh = new DOMParser().parseFromString(html, "text/html");
  panel.replaceChildren(...fresh.body.childNodes);
  panel.querySelectorAll("details").forEach((d, i) => { d.open = Boolean(open[i]); });
  panel.querySelectorAll(".scroll").forEach((s, i) => { s.scrollLeft = left[i] || 0; });
}

function listen() {
  stream = new EventSource("/dashboard/stream");
  stream.addEventListener("history", (event) => charts.start(JSON.parse(event.data)));
  stream.addEventListener("sample", (event) => charts.add(JSON.parse(event.data)));
  stream.addEventListener("panels", (event) => {
    for (const [name, html] of Object.entries(JSON.parse(event.data))) swap(name, html);
    charts.setDense(Number(document.querySelector(".versus").dataset.dense) || null);
    show("live", "live");
  });
  stream.onerror = (event) => {
    show("lost", "no answer from the server");
    if (event.target.readyState === EventSource.CLOSED) setTimeout(tryAgain, RETRY_MS);
  };
}

// A stream that was refused does not try again by itself.
async function tryAgain() {
  if (stream.readyState !== EventSource.CLOSED || document.hidden) return;
  const reply = await fetch("/dashboard/report.json").catch(() => null);
  if (reply?.status === 401) location.reload(); // signed out: the page asks for a key
  else if (reply?.ok) listen();
  else setTimeout(tryAgain, RETRY_MS);
}

// Nobody looks at a hidden page: the server need not render for it.
function setUpPause() {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stream.close();
    else if (stream.readyState === EventSource.CLOSED) listen();
  });
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const label = () => { button.textContent = "Theme: " + (root.dataset.theme || "auto"); };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme || "auto") + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    document.cookie = "hotneuron-theme=" + next + ";path=/dashboard;max-age=31536000;samesite=strict";
    label();
    charts.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.redraw());
  label();
  button.hidden = false;
}

// Says in words what the cell under the pointer holds.
function setUpHeat() {
  const rest = new WeakMap(); // of panels that may be swapped any time
  document.addEventListener("pointermove", (event) => {
    const svg = event.target.closest?.(".heat svg");
    const readout = document.getElementById("heat-readout");
    if (!readout) return;
    if (!svg) {
      if (rest.has(readout)) readout.textContent = rest.get(readout);
      return;
    }
    if (!rest.has(readout)) rest.set(readout, readout.textContent);
    const box = svg.getBoundingClientRect();
    const { width, height } = svg.viewBox.baseVal;
    const cell = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at / size) * count)));
    const layer = cell(event.clientY - box.top, box.height, height);
    const group = cell(event.clientX - box.left, box.width, width);
    const { group: size, top } = svg.parentElement.dataset;
    const level = Number((/heat-(\d)/.exec(event.target.getAttribute("class") || "") || [0, 0])[1]);
    const share = (n) => (100 * n * top / 9).toFixed(0);
    const low = Math.max(0, level - 0.5), high = level + 0.5;
    readout.textContent = "Layer " + layer + ", neurons " + group * size + " to " + (group * size + Number(size) - 1)
      + ": fire for " + share(low) + " to " + share(high) + " % of the audited tokens.";
  });
}

setUpTheme();
setUpHeat();
setUpBenchmark();
setUpChat();
setUpPause();
listen();
