"use strict";
// What the page holds, and how to make elements. Text only ever goes in as text, so no name can become markup.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const unpack = (text, Type) => new Type(Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer);
const Index = data.wide ? Uint32Array : Uint16Array;
const label = unpack(data.labels, Uint32Array); // class of each embedded image
const listed = unpack(data.listed, Uint32Array); // 1 where its thumbnail is on the page
const points = unpack(data.points, Uint32Array); // embedded images that the projection draws
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const last = data.layers.length - 1;
const FIRST_ROWS = 12;
const state = {
  layer: data.best, scores: new Set(["accuracy", "ami"]), byLayer: false, cluster: -1, follow: data.follow,
  focus: -1, found: false, pin: -1, rows: FIRST_ROWS, lines: new Map(),
};

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key in node && key !== "style") node[key] = value;
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const hue = (index) => (index < 0 ? "var(--strong)" : `var(--c${index % data.colours})`);
const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(part && part < whole ? 1 : 0)}%` : "–");
const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const press = (button, on) => button.setAttribute("aria-pressed", on);
const swatch = (index) => make("i", { className: "swatch", "--hue": hue(index), style: `border-color:${hue(index)}` }, String(index));

// ---- a layer's bulk numbers are unpacked when first needed
function layerAt(index) {
  const layer = data.layers[index];
  if (!layer.starts) {
    layer.order = unpack(layer.order, Index);
    layer.table = unpack(layer.table, Uint32Array);
    layer.xy = unpack(layer.xy, Uint16Array);
    layer.starts = [0];
    layer.cluster = new Uint32Array(label.length);
    layer.listed.forEach((count, cluster) => {
      const start = layer.starts[cluster];
      layer.starts.push(start + count);
      for (let i = start; i < start + count; i++) layer.cluster[layer.order[i]] = cluster;
    });
  }
  return layer;
}
const members = (layer, cluster) =>
  layer.order.subarray(layer.starts[cluster], layer.starts[cluster + 1]).filter((image) => listed[image]);

// ---- tooltip
const tip = $("tip");
function showTip(event, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 16 + box.height < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, below ? event.clientY + 16 : event.clientY - box.height - 12)}px`;
}
const hideTip = () => { tip.hidden = true; };
function imageTip(event, image, index) {
  const layer = layerAt(index), cluster = layer.cluster[image];
  const parts = [make("b", {}, data.classes[label[image]]), `cluster ${cluster} at ${layer.layer}`,
    make("small", {}, data.paths[image])];
  if (data.thumbs[image]) parts.unshift(make("img", { src: data.thumbs[image], alt: "", "--hue": hue(label[image]) }));
  showTip(event, ...parts);
}

