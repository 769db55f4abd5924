// ---- the images of the clusters. An image has one tile, which moves from row to row as the layer changes.
const tiles = new Map();
function newTile(image) {
  const name = data.classes[label[image]], thumb = data.thumbs[image];
  const tile = make("button", { type: "button", className: thumb ? "tile" : "tile bare", tabIndex: -1, "--hue": hue(label[image]),
    "data-image": image, "data-key": label[image], "aria-label": name });
  if (thumb) tile.append(make("img", { src: thumb, alt: "", draggable: false }));
  return tile;
}
function tileOf(image, own) {
  if (!own) return newTile(image);
  if (!tiles.has(image)) tiles.set(image, newTile(image));
  return tiles.get(image);
}
function mark(tile) {
  const image = +tile.dataset.image;
  tile.classList.toggle("dim", state.focus >= 0 && label[image] !== state.focus);
  tile.classList.toggle("pin", image === state.pin);
}
function perLine(size, beside) { // tiles that fit into a line
  return Math.max(3, Math.floor(($("trend").clientWidth - 2 * parseFloat(getComputedStyle($("trend")).paddingLeft) - beside + 4) / (size + 4)));
}
function strip(index, cluster, key, own, lines, main) {
  const layer = layerAt(index), box = make("div", { className: "strip" }), found = members(layer, cluster);
  const narrow = matchMedia("(max-width: 800px)").matches;
  const room = perLine(narrow ? 46 : 52, narrow ? 0 : 230) * (state.lines.get(key) ?? lines);
  const limit = found.length > room ? room - 1 : room;
  for (const image of found.subarray(0, limit)) {
    const tile = tileOf(image, own);
    tile.classList.toggle("odd", label[image] !== main);
    tile.dataset.layer = index;
    tile.tabIndex = box.firstChild ? -1 : 0;
    mark(tile);
    box.append(tile);
  }
  if (found.length > limit) {
    const more = make("button", { type: "button", className: "tile more", "aria-label": `show more of ${found.length}` }, `+${found.length - limit}`);
    more.addEventListener("click", () => { state.lines.set(key, (state.lines.get(key) ?? lines) * 2 + 2); drawRows(); });
    box.append(more);
  } else if (found.length < layer.size[cluster]) {
    box.append(make("span", { className: "hint" }, `${layer.size[cluster] - found.length} more not on this page`));
  }
  return box;
}
function mix(layer, cluster) {
  const row = layer.display.indexOf(cluster), columns = Math.min(data.classes.length, data.cells);
  const bar = make("div", { className: "mix", "aria-hidden": true });
  const cells = row < data.cells ? [...layer.table.subarray(row * columns, (row + 1) * columns).entries()] : [];
  for (const [index, value] of cells.filter(([, value]) => value).sort((a, b) => b[1] - a[1]))
    bar.append(make("i", { style: `flex:${value};background:${hue(index)}`, title: `${data.classes[index]}: ${value}` }));
  return bar;
}
const named = (layer, cluster) => (layer.match[cluster] < 0 ? layer.majority[cluster] : layer.match[cluster]);
function summary(layer, cluster) { // how much of a cluster is the class it is named by
  const size = layer.size[cluster], majority = layer.majority[cluster], name = named(layer, cluster);
  const count = name === majority ? layer.most[cluster] : countOf(layer, cluster, name);
  const parts = [count === null ? `${size} images` : `${count} of ${size} are ${data.classes[name]} (${percent(count, size)})`];
  if (layer.match[cluster] < 0) parts.push("no class left to match");
  if (name !== majority) parts.push(`the most are ${data.classes[majority]} (${layer.most[cluster]})`);
  return size ? parts.join("; ") : "empty";
}
function clusterRows() {
  const layer = layerAt(state.layer);
  const wanted = state.cluster < 0 ? layer.display : [state.cluster];
  const rows = wanted.slice(0, state.rows).map((cluster) => {
    const name = named(layer, cluster);
    return make("article", { className: "row", "aria-label": `cluster ${cluster}` },
      make("div", {}, make("h3", {}, swatch(name), make("span", {}, shorten(data.classes[name], 40))),
        make("p", {}, `cluster ${cluster}: ${summary(layer, cluster)}`), mix(layer, cluster)),
      strip(state.layer, cluster, cluster, true, 2, name));
  });
  $("more-rows").hidden = wanted.length <= state.rows;
  $("more-rows").textContent = `show more clusters (${wanted.length - state.rows})`;
  return rows;
}
function countOf(layer, cluster, index) { // images of a class in a cluster, as far as the page has the table
  const row = layer.display.indexOf(cluster), columns = Math.min(data.classes.length, data.cells);
  return row < data.cells && index < columns ? layer.table[row * columns + index] : null;
}
function layerRows() {
  $("more-rows").hidden = true;
  return data.layers.map((_, index) => {
    const layer = layerAt(index), cluster = layer.match.indexOf(state.follow);
    const name = make("button", { type: "button" }, layer.layer);
    name.addEventListener("click", () => choose(index));
    const head = make("div", {}, make("h3", {}, name));
    const row = make("article", { className: index === state.layer ? "row chosen" : "row", "aria-label": layer.layer }, head);
    if (cluster < 0) head.append(make("p", {}, "no cluster is matched to this class"));
    else {
      head.append(make("p", {}, `cluster ${cluster}: ${summary(layer, cluster)}`), mix(layer, cluster));
      row.append(strip(index, cluster, `layer ${index}`, false, 1, state.follow));
    }
    return row;
  });
}
const visible = (box) => box.bottom > 0 && box.top < innerHeight;
function drawRows() {
  const before = new Map();
  const moving = !state.byLayer && !calm.matches && visible($("rows").getBoundingClientRect());
  if (moving) for (const tile of $("rows").querySelectorAll(".tile")) before.set(tile, tile.getBoundingClientRect());
  $("rows").replaceChildren(...(state.byLayer ? layerRows() : clusterRows()));
  if (!moving || before.size > 700) return;
  for (const tile of $("rows").querySelectorAll(".tile")) {
    const from = before.get(tile), to = tile.getBoundingClientRect();
    if (!visible(to) && !(from && visible(from))) continue;
    if (!from) tile.animate([{ opacity: 0 }, { opacity: getComputedStyle(tile).opacity }], 300);
    else if (from.left !== to.left || from.top !== to.top)
      tile.animate([{ transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)` }, { transform: "none" }],
        { duration: 420, easing: "cubic-bezier(.3, 0, .1, 1)" });
  }
}
function fillClusters() {
  const layer = layerAt(state.layer);
  $("cluster").replaceChildren(make("option", { value: -1 }, `all ${layer.k}`),
    ...layer.display.map((cluster) => make("option", { value: cluster }, `${cluster}: ${shorten(data.classes[named(layer, cluster)], 40)}`)));
  $("cluster").value = state.cluster;
}
function buildHero() { // the answer seen: one cluster at the first layer, half way and at the best layer
  const stops = [...new Set([0, Math.round(data.best / 2), data.best])];
  for (const index of stops) {
    const layer = layerAt(index), cluster = layer.match.indexOf(data.follow);
    if (cluster < 0) continue;
    const row = make("div", { className: "strip" });
    const found = members(layer, cluster), many = Math.min(7, found.length);
    for (let i = 0; i < many; i++) { // evenly from the centroid to the rim, so that they show what the cluster holds
      const image = found[Math.floor((i + 0.5) * found.length / many)];
      const tile = make("span", { className: "tile", "--hue": hue(label[image]) });
      if (data.thumbs[image]) tile.append(make("img", { src: data.thumbs[image], alt: "" }));
      row.append(tile);
    }
    const count = countOf(layer, cluster, data.follow);
    $("hero").append(make("p", {}, make("b", {}, layer.layer), count === null ? "" : ` ${count} of ${layer.size[cluster]}`), row);
  }
  $("hero").hidden = !data.thumbs.length || !$("hero").querySelector(".tile");
  $("hero").append(make("figcaption", {}, `The cluster matched to ${data.classes[data.follow]}${last ? ", the class that gains most" : ""}: how many of its images are of that class, and a few of them from the centroid to the rim. The border is the true class.`));
}
function buildRows() {
  const all = data.shown === data.images;
  $("shown").textContent = all ? `All ${data.images.toLocaleString("en")} images are on the page.`
    : `The page holds ${data.shown.toLocaleString("en")} of the ${data.images.toLocaleString("en")} images: those nearest to the centroids of every layer.`;
  data.classes.forEach((name, index) => $("class").append(make("option", { value: index }, name)));
  const view = (byLayer) => {
    state.byLayer = byLayer;
    press($("by-cluster"), !byLayer);
    press($("by-layer"), byLayer);
    $("pick-cluster").hidden = byLayer;
    $("pick-class").hidden = !byLayer;
    drawRows();
  };
  $("by-cluster").addEventListener("click", () => view(false));
  $("by-layer").addEventListener("click", () => view(true));
  $("cluster").addEventListener("change", () => { state.cluster = +$("cluster").value; drawRows(); });
  $("class").addEventListener("change", () => { state.follow = +$("class").value; drawRows(); });
  $("keys").addEventListener("change", () => $("rows").classList.toggle("keys", $("keys").checked));
  $("more-rows").addEventListener("click", () => { state.rows += FIRST_ROWS; drawRows(); });
  const over = (event) => event.target.closest?.("[data-image]");
  $("rows").addEventListener("pointerover", (event) => {
    const tile = over(event);
    if (tile) imageTip(event, +tile.dataset.image, +tile.dataset.layer);
  });
  $("rows").addEventListener("pointerout", hideTip);
  $("rows").addEventListener("keydown", (event) => { // one stop per strip, arrows within it
    const steps = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
    const next = event.target.closest(".strip") && event.target[steps[event.key]];
    if (next) next.focus();
  });
  $("rows").addEventListener("click", (event) => { if (over(event)) pin(+over(event).dataset.image); });
}
function pin(image) {
  state.pin = state.pin === image ? -1 : image;
  drawFocus();
}

