// ---- the layer bar
const slider = $("slider"), picker = $("layer");
function choose(index) {
  const next = Math.max(0, Math.min(last, index));
  if (next === state.layer) return;
  state.layer = next;
  state.cluster = -1;
  state.rows = FIRST_ROWS;
  state.lines.clear();
  history.replaceState(null, "", `#${encodeURIComponent(data.layers[next].layer)}`);
  show();
}
function drawBar() {
  const layer = data.layers[state.layer];
  slider.value = picker.value = state.layer;
  slider.setAttribute("aria-valuetext", layer.layer);
  $("previous").disabled = state.layer === 0;
  $("next").disabled = state.layer === last;
  $("at").replaceChildren(...data.scores.filter((score) => ["accuracy", "ami", "silhouette"].includes(score.key))
    .map((score) => make("span", {}, `${score.name} `, make("b", {}, number(layer.scores[score.key])))));
}
function buildBar() {
  slider.max = last;
  data.layers.forEach((layer, index) => picker.append(make("option", { value: index }, layer.layer)));
  slider.addEventListener("input", () => choose(+slider.value));
  picker.addEventListener("change", () => choose(+picker.value));
  $("previous").addEventListener("click", () => choose(state.layer - 1));
  $("next").addEventListener("click", () => choose(state.layer + 1));
  const heights = data.layers.map((layer) => 1 - Math.max(0, layer.scores.accuracy ?? 0));
  const xs = heights.map((_, index) => (last ? index / last : 0.5) * 100);
  const line = heights.map((y, index) => `${xs[index]},${y * 26}`).join("L");
  const chance = data.scores[0].chance;
  const spark = $("spark");
  spark.setAttribute("viewBox", "0 0 100 34");
  spark.setAttribute("preserveAspectRatio", "none");
  spark.append(draw("path", { class: "area", d: `M${xs[0]},26L${line}L${xs[last]},26Z` }), draw("path", { d: `M${line}` }));
  if (chance !== null) spark.append(draw("line", { x1: 0, x2: 100, y1: 26 * (1 - chance), y2: 26 * (1 - chance) }));
  data.classes.forEach((name, index) => {
    const button = make("button", { type: "button", title: `${name}: ${data.sizes[index]} images`, "aria-pressed": false },
      swatch(index), make("span", {}, name));
    button.addEventListener("click", () => {
      state.focus = state.focus === index ? -1 : index;
      [...$("legend").children].forEach((other, i) => press(other, i === state.focus));
      drawFocus();
    });
    $("legend").append(button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, .scroll, .strip")) return;
    if (event.key === "ArrowLeft") choose(state.layer - 1);
    if (event.key === "ArrowRight") choose(state.layer + 1);
  });
  addEventListener("hashchange", fromAddress);
}
function fromAddress() {
  let name = "";
  try { name = decodeURIComponent(location.hash.slice(1)); } catch { return; } // a hash that is no encoded name
  const index = data.layers.findIndex((layer) => layer.layer === name);
  if (index >= 0) choose(index);
}

// ---- table of all layers
function buildLayers() {
  const table = $("all"), body = table.tBodies[0], rows = [...body.querySelectorAll("tr[data-layer]")];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(+key(row)));
      const compare = (a, b) => (key(a) === "" ? 1 : key(b) === "" ? -1
        : (down ? -1 : 1) * (numeric ? key(a) - key(b) : key(a).localeCompare(key(b))));
      rows.sort(compare).forEach((row) => body.insertBefore(row, body.querySelector(".chance")));
    });
    head.replaceChildren(button);
  });
  for (const row of rows) row.addEventListener("click", () => choose(+row.dataset.layer));
}

// ---- theme: the system's, or what the button says
function buildTheme() {
  const themes = ["auto", "light", "dark"], button = $("theme");
  let theme = "auto";
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    document.documentElement.dataset.theme = theme;
    button.textContent = `theme: ${theme}`;
    drawPoints(false);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawPoints(false));
}

function drawFocus() {
  $("rows").querySelectorAll(".tile").forEach(mark);
  dimTable();
  drawPoints(false);
}
function show() {
  drawBar();
  drawTrend();
  fillClusters();
  drawRows();
  drawTable();
  drawPoints(true);
  for (const row of $("all").querySelectorAll("tr[data-layer]"))
    row.setAttribute("aria-current", +row.dataset.layer === state.layer);
}
document.documentElement.classList.add("on");
buildTheme();
buildBar();
buildChips();
buildHero();
buildRows();
buildPoints();
buildLayers();
fromAddress();
show();
let width = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width === width) return; // choosing more scores changes the height alone
  width = entry.contentRect.width;
  drawTrend();
  drawRows();
  drawPoints(false);
}).observe($("trend"));
