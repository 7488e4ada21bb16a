// Fetches the rendered panels each second and swaps in those that changed. Draws the live chart
// from the token counter, which only a page that stays open can do. No other state, no libraries.
"use strict";

const POLL_MS = 1000;
const HISTORY = 120;
const KEY_NAME = "hotneuron-api-key";

const panels = document.getElementById("panels");
const status = document.getElementById("status");
const form = document.getElementById("key-form");
const speeds = [];
let last = null;

function apiKey() {
  return sessionStorage.getItem(KEY_NAME);
}

function get(path) {
  const key = apiKey();
  return fetch(path, { headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store" });
}

function show(kind, text) {
  status.className = "status " + kind;
  status.textContent = text;
}

function swap(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  if (panels.childElementCount === 0) {
    panels.replaceChildren(...fresh.body.children);
    return;
  }
  for (const panel of fresh.querySelectorAll("[data-panel]")) {
    const old = panels.querySelector('[data-panel="' + panel.dataset.panel + '"]');
    const left = old.querySelector(".scroll")?.scrollLeft ?? 0;
    if (old.innerHTML !== panel.innerHTML) {
      old.replaceWith(panel);
      if (left) panel.querySelector(".scroll").scrollLeft = left;
    }
  }
}

function remember() {
  const data = panels.querySelector("[data-generated]").dataset;
  const now = { tokens: Number(data.generated), at: Number(data.uptime) };
  if (last && now.at > last.at) {
    speeds.push((now.tokens - last.tokens) / (now.at - last.at));
    if (speeds.length > HISTORY) speeds.shift();
  }
  last = now;
}

function draw() {
  const chart = document.getElementById("live-chart");
  const most = Math.max(...speeds);
  const top = Math.max(1, most);
  const x = (i) => 240 - (speeds.length - 1 - i) * (240 / (HISTORY - 1));
  const y = (speed) => 57 - (speed / top) * 50;
  const points = speeds.map((speed, i) => x(i).toFixed(1) + "," + y(speed).toFixed(1));
  chart.replaceChildren();
  if (points.length < 2) return;
  const add = (name, className, value) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
    shape.setAttribute("class", className);
    shape.setAttribute("points", value);
    chart.append(shape);
  };
  add("polygon", "area", x(0).toFixed(1) + ",60 " + points.join(" ") + " 240,60");
  add("polyline", "line", points.join(" "));
  const label = document.querySelector(".live-label");
  label.textContent = "Generated per second: " + speeds.at(-1).toFixed(1)
    + " (most " + most.toFixed(1) + " in the last 2 minutes)";
}

async function refresh() {
  if (form && !apiKey()) return;
  try {
    const reply = await get("/dashboard/panels");
    if (reply.status === 401) {
      sessionStorage.removeItem(KEY_NAME);
      lock(true);
      return;
    }
    if (!reply.ok) throw new Error("status " + reply.status);
    swap(await reply.text());
    if (form) {
      form.hidden = true;
      panels.hidden = false;
    }
    remember();
    draw();
    show("live", "live");
  } catch (error) {
    show("lost", "no answer from the server");
  }
}

function lock(wasRefused) {
  if (!form) return;
  form.hidden = false;
  panels.hidden = true;
  panels.replaceChildren();
  document.getElementById("key-error").hidden = !wasRefused;
  show("", "locked");
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_MS);
}

// With a key a plain link would be refused: fetch the report and hand it over as a download.
async function download(event) {
  if (!apiKey()) return;
  event.preventDefault();
  const link = event.currentTarget;
  const reply = await get(link.getAttribute("href"));
  const file = document.createElement("a");
  file.href = URL.createObjectURL(await reply.blob());
  file.download = link.textContent;
  file.click();
  URL.revokeObjectURL(file.href);
}

form?.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_NAME, document.getElementById("key").value.trim());
  refresh();
});
for (const link of document.querySelectorAll("a.report")) link.addEventListener("click", download);
if (form && !apiKey()) lock(false);
poll();
