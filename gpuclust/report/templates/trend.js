// ---- trend
const drawn = data.scores.map((score, index) => ({ ...score, hue: hue(index) }))
  .filter((score) => data.layers.some((layer) => layer.scores[score.key] !== null));
function buildChips() {
  for (const score of drawn) {
    const chip = make("button", { type: "button", "--tint": score.hue, "aria-pressed": state.scores.has(score.key) },
      make("i"), score.name);
    chip.addEventListener("click", () => {
      if (!state.scores.delete(score.key)) state.scores.add(score.key);
      press(chip, state.scores.has(score.key));
      drawTrend();
    });
    $("chips").append(chip);
  }
}
function spread(labels, low, high, gap) { // labels at .y, pushed apart
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((item, i) => { item.y = Math.max(item.y, i ? labels[i - 1].y + gap : low); });
  for (let i = labels.length - 1, top = high; i >= 0; i--, top = labels[i + 1].y - gap) labels[i].y = Math.min(labels[i].y, top);
  return labels;
}
function drawTrend() {
  const chart = $("chart"), active = drawn.filter((score) => state.scores.has(score.key));
  const count = data.layers.length, longest = Math.max(...data.layers.map((layer) => Math.min(layer.layer.length, 22)));
  const left = 34, right = 124, top = 14;
  const width = Math.max(chart.clientWidth, count * 15 + left + right), step = (width - left - right) / count;
  const flat = step > longest * 7 + 6, slanted = !flat && step > 26;
  const bottom = flat ? 30 : Math.min(170, longest * (slanted ? 5 : 7) + 18), height = 300 + bottom;
  const values = active.flatMap((score) => data.layers.map((layer) => layer.scores[score.key] ?? 0));
  const floor = Math.min(0, Math.floor(Math.min(0, ...values.map((value) => value + 0.03)) * 5) / 5);
  const x = (index) => left + step * (index + 0.5), y = (value) => top + (height - bottom - top) * (1 - value) / (1 - floor);
  const base = y(floor);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${active.map((score) => score.name).join(", ")} over ${count} layers; numbers in the table of all layers` });
  svg.append(draw("rect", { class: "band", x: x(state.layer) - step / 2, y: top, width: step, height: base - top, rx: 3 }));
  for (let value = floor; value < 1.01; value += 0.2) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1).replace("-0.0", "0.0")));
  }
  const labels = [], chances = new Map();
  for (const score of active) {
    if (score.chance !== null) {
      svg.append(draw("line", { class: "chance", style: `stroke:${score.hue}`, x1: left, x2: width - right, y1: y(score.chance), y2: y(score.chance) }));
      const key = score.chance.toFixed(2);
      chances.set(key, [...(chances.get(key) ?? []), score]);
    }
    let path = "", pen = "M";
    data.layers.forEach((layer, index) => {
      const value = layer.scores[score.key];
      if (value === null) { pen = "M"; return; }
      path += `${pen}${x(index)},${y(value)}`;
      pen = "L";
    });
    svg.append(draw("path", { class: "line", style: `stroke:${score.hue}`, d: path }));
    data.layers.forEach((layer, index) => {
      const value = layer.scores[score.key], on = index === state.layer;
      if (value !== null) svg.append(draw("circle", { style: `fill:${score.hue}`, cx: x(index), cy: y(value), r: on ? 5.5 : 3.2 }));
    });
    const end = data.layers[last].scores[score.key];
    if (end !== null) labels.push({ y: y(end), text: score.name, value: number(end, 2), fill: score.hue });
  }
  chances.forEach((scores, value) => labels.push({ y: y(+value), text: "chance", value: value.replace("-0.00", "0.00"), dash: scores[0].hue }));
  for (const item of spread(labels, top + 4, base + 6, 15)) {
    const at = width - right + 12;
    svg.append(item.dash ? draw("line", { class: "chance", style: `stroke:${item.dash}`, x1: at - 7, x2: at + 6, y1: item.y, y2: item.y })
      : draw("circle", { cx: at, cy: item.y, r: 4, style: `fill:${item.fill}` }),
      draw("text", { x: width - right + 21, y: item.y + 4 }, `${item.text} ${item.value}`));
  }
  data.layers.forEach((layer, index) => {
    const text = draw("text", { class: index === state.layer ? "name on" : "name", x: x(index), y: base + 18, "text-anchor": flat ? "middle" : "end" },
      shorten(layer.layer, 22));
    if (!flat) text.setAttribute("transform", slanted ? `rotate(-40 ${x(index) + 4} ${base + 14})` : `translate(${x(index) + 4} ${base + 10}) rotate(-90) translate(${-x(index)} ${-base - 18})`);
    const hit = draw("rect", { class: "hit", x: x(index) - step / 2, y: top, width: step, height: height - top, "data-layer": index });
    hit.addEventListener("click", () => choose(index));
    hit.addEventListener("pointermove", (event) => showTip(event, make("b", {}, layer.layer), make("table", {},
      ...drawn.map((score) => make("tr", {}, make("td", {}, score.name), make("td", {}, number(layer.scores[score.key])))))));
    hit.addEventListener("pointerleave", hideTip);
    svg.append(text, hit);
  });
  chart.replaceChildren(svg);
}

