// ---- cluster x class table
function drawTable() {
  const layer = layerAt(state.layer), columns = Math.min(data.classes.length, data.cells), rows = Math.min(layer.k, data.cells);
  const dense = columns > 24 || rows > 40;
  const head = make("tr", {}, make("th", { className: "side" }, ""), ...data.classes.slice(0, columns).map((name) =>
    make("th", { scope: "col", title: name }, make("span", {}, shorten(name, 40)))));
  const body = layer.display.slice(0, rows).map((cluster, row) => {
    const line = make("tr", {}, make("th", { scope: "row", className: "side" }, dense ? String(cluster) : `cluster ${cluster}`));
    for (let column = 0; column < columns; column++) {
      const value = layer.table[row * columns + column];
      const cell = make("td", { "--share": data.sizes[column] ? value / data.sizes[column] : 0, "data-column": column }, String(value));
      if (!value) cell.classList.add("zero");
      if (layer.match[cluster] === column) cell.classList.add("match");
      if (dense) cell.title = `cluster ${cluster}, ${data.classes[column]}: ${value}`;
      line.append(cell);
    }
    return line;
  });
  $("table").closest(".pair").classList.toggle("stack", columns > 40);
  $("table").replaceChildren(make("table", { className: dense ? "dense" : "", style: `--columns:${columns}` },
    make("thead", {}, head), make("tbody", {}, ...body)));
  const cut = rows < layer.k || columns < data.classes.length;
  $("heat-note").textContent = cut ? `The first ${columns} classes and ${rows} clusters of ${data.classes.length} and ${layer.k}.` : "";
  dimTable();
}
function dimTable() {
  for (const cell of $("table").querySelectorAll("td"))
    cell.classList.toggle("dim", state.focus >= 0 && +cell.dataset.column !== state.focus);
}

// ---- projection
const canvas = $("points"), probe = make("i", { hidden: true });
let places = null, frame = 0; // where each point is now, in 0..1
document.body.append(probe);
function resolved(colour) { // a canvas takes no var() and no light-dark()
  probe.style.color = colour;
  return getComputedStyle(probe).color;
}
function target() {
  return Float32Array.from(layerAt(state.layer).xy, (value) => value / 0xffff);
}
const PAD = 22;
function paint() {
  const layer = layerAt(state.layer), ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight, pen = canvas.getContext("2d");
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  pen.scale(ratio, ratio);
  const hues = Array.from({ length: Math.min(data.colours, data.classes.length) }, (_, index) => resolved(hue(index)));
  const [none, ink, ground] = ["var(--strong)", "var(--ink)", "var(--panel)"].map(resolved);
  const tint = (index) => (index < 0 ? none : hues[index % data.colours]);
  const radius = points.length > 2000 ? 2.2 : points.length > 600 ? 3 : 4;
  const sums = new Map();
  points.forEach((image, i) => {
    const x = PAD + places[2 * i] * (width - 2 * PAD), y = PAD + (1 - places[2 * i + 1]) * (height - 2 * PAD);
    const cluster = layer.cluster[image], match = layer.match[cluster];
    const sum = sums.get(cluster) ?? [0, 0, 0];
    sums.set(cluster, [sum[0] + x, sum[1] + y, sum[2] + 1]);
    pen.globalAlpha = state.focus >= 0 && label[image] !== state.focus ? 0.12 : 0.9;
    pen.fillStyle = tint(state.found ? match : label[image]);
    pen.beginPath();
    pen.arc(x, y, radius, 0, 7);
    pen.fill();
    if (match !== label[image]) { // not in the cluster of its class: ringed in the other of the two colours
      pen.globalAlpha *= 0.6;
      pen.strokeStyle = tint(state.found ? label[image] : match);
      pen.lineWidth = 1;
      pen.beginPath();
      pen.arc(x, y, radius + 1.6, 0, 7);
      pen.stroke();
    }
    if (image === state.pin) {
      pen.globalAlpha = 1;
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, y, radius + 6, 0, 7);
      pen.stroke();
    }
  });
  pen.globalAlpha = 1;
  pen.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  pen.textAlign = "center";
  pen.lineWidth = 4;
  pen.lineJoin = "round";
  pen.strokeStyle = ground;
  pen.fillStyle = ink;
  if (layer.k <= 30) sums.forEach(([x, y, count], cluster) => {
    pen.strokeText(cluster, x / count, y / count + 4);
    pen.fillText(cluster, x / count, y / count + 4);
  });
}
function drawPoints(animate) {
  const from = places, to = target(), layer = data.layers[state.layer], began = performance.now();
  const share = layer.explained.map((value) => (value === null ? "–" : `${(100 * value).toFixed(1)}%`));
  const few = points.length < data.images ? ` ${points.length.toLocaleString("en")} of ${data.images.toLocaleString("en")} images.` : "";
  $("projection-note").textContent = `Across ${share[0]} of the variance, up ${share[1]}. Numbers mark the clusters.${few}`;
  $("ring-note").textContent = "ringed: not in the cluster of its class";
  canvas.setAttribute("aria-label", `Projection of ${layer.layer}: ${points.length} images, coloured by ${state.found ? "cluster" : "class"}`);
  cancelAnimationFrame(frame);
  if (!animate || !from || calm.matches) { places = to; paint(); return; }
  const tick = (now) => {
    const part = Math.min(1, Math.max(0, (now - began) / 420)), ease = part * part * (3 - 2 * part);
    places = part < 1 ? to.map((value, i) => from[i] + (value - from[i]) * ease) : to;
    paint();
    if (part < 1) frame = requestAnimationFrame(tick);
  };
  frame = requestAnimationFrame(tick);
}
function nearest(event) {
  const box = canvas.getBoundingClientRect();
  let best = -1, least = 14 ** 2;
  for (let i = 0; i < points.length; i++) {
    const x = PAD + places[2 * i] * (box.width - 2 * PAD) - (event.clientX - box.left);
    const y = PAD + (1 - places[2 * i + 1]) * (box.height - 2 * PAD) - (event.clientY - box.top);
    if (x * x + y * y < least) { least = x * x + y * y; best = points[i]; }
  }
  return best;
}
function buildPoints() {
  const colourBy = (found) => {
    state.found = found;
    press($("by-true"), !found);
    press($("by-found"), found);
    drawPoints(false);
  };
  $("by-true").addEventListener("click", () => colourBy(false));
  $("by-found").addEventListener("click", () => colourBy(true));
  canvas.addEventListener("pointermove", (event) => {
    const image = nearest(event);
    if (image < 0) hideTip();
    else imageTip(event, image, state.layer);
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => { if (nearest(event) >= 0) pin(nearest(event)); });
}

