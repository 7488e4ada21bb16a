// The history as uPlot charts: tokens per second, the queue, the time between tokens.
const LENGTH = 900;

// Canvases need resolved colours: ask the browser what a custom property means right now.
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = "var(--" + name + ")";
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const faded = (value) => value.replace("rgb(", "rgba(").replace(")", ", 0.13)");
const clock = (at) => new Date(1000 * at).toISOString().slice(11, 19); // UTC, as everywhere here
const inMs = (seconds) => (seconds === null ? null : 1000 * seconds);
// The value under the pointer, or else the newest.
const worded = (unit, digits) => (plot, value, series) => {
  const shown = value ?? plot.data[series].at(-1);
  return shown == null ? "–" : shown.toFixed(digits) + unit;
};

export class Charts {
  constructor() {
    this.rows = null;
    this.dense = null;
    this.plots = [];
    const observer = new ResizeObserver(() => this.resize());
    for (const box of document.querySelectorAll(".chart-box")) observer.observe(box);
  }

  start(columns) {
    this.rows = columns;
    document.getElementById("traffic-charts").hidden = false;
    this.redraw();
  }

  add(sample) {
    if (this.rows === null || sample.at <= this.rows.at.at(-1)) return;
    for (const [key, values] of Object.entries(this.rows)) {
      values.push(sample[key]);
      if (values.length > LENGTH) values.shift();
    }
    this.update();
  }

  setDense(value) {
    if (value === this.dense) return;
    this.dense = value;
    this.update();
  }

  data() {
    const rows = this.rows;
    return [
      [rows.at, rows.generated_per_s, rows.at.map(() => this.dense)],
      [rows.at, rows.running, rows.waiting],
      [rows.at, rows.itl_p50.map(inMs), rows.itl_p95.map(inMs)],
    ];
  }

  update() {
    if (this.rows !== null) this.data().forEach((values, i) => this.plots[i]?.setData(values));
  }

  redraw() {
    if (this.rows === null) return;
    this.plots.forEach((plot) => plot.destroy());
    const [sparse, dense] = [colour("sparse"), colour("dense")];
    const line = (label, stroke, more) => ({ label, stroke, width: 2, spanGaps: false, points: { show: false }, ...more });
    const area = { fill: faded(sparse) };
    const dashed = { dash: [6, 4] };
    const all = [
      ["speed-chart", 220, [line("generated", sparse, { ...area, value: worded(" tokens/s", 1) }),
        line("dense, batch 1", dense, { ...dashed, value: worded(" tokens/s", 1) })]],
      ["queue-chart", 150, [line("running", sparse, { ...area, value: worded("", 0) }),
        line("waiting", dense, { ...dashed, value: worded("", 0) })]],
      ["latency-chart", 150, [line("between tokens, p50", sparse, { value: worded(" ms", 1) }),
        line("p95 of 30 s", dense, { ...dashed, value: worded(" ms", 1) })]],
    ];
    this.plots = all.map(([id, height, series], i) => this.plot(document.getElementById(id), height, series, this.data()[i]));
  }

  plot(box, height, series, data) {
    const [ink, edge] = [colour("quiet"), colour("edge")];
    const axis = { stroke: ink, grid: { stroke: edge, width: 1 }, ticks: { stroke: edge, width: 1 }, font: "12px system-ui, sans-serif" };
    const now = () => this.rows.at.at(-1);
    box.replaceChildren();
    return new uPlot({
      width: box.clientWidth,
      height,
      series: [{}, ...series],
      tzDate: (at) => uPlot.tzDate(new Date(1000 * at), "UTC"),
      axes: [
        { ...axis, size: 30, space: 70, values: (_, times) => times.map((at) => clock(at).slice(0, at % 60 ? 8 : 5)) },
        { ...axis, size: 44 },
      ],
      scales: {
        x: { range: () => [now() - Math.min(LENGTH, Math.max(120, now() - this.rows.at[0])), now()] },
        y: { range: (_, low, high) => [0, high > 0 ? 1.1 * high : 1] },
      },
      padding: [8, 22, 0, 0], // room for half of the last time
      cursor: { points: { size: 6 }, drag: { x: false, y: false } },
    }, data, box);
  }

  resize() {
    for (const plot of this.plots) {
      const width = plot.root.parentElement.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: plot.height });
    }
  }
}
