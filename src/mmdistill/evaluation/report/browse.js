"use strict";
// The search of the page. The fragment of the address selects: #label=WORDS, or #video=NAME&frame=NUMBER.
const LIMIT = 200; // entries of a list
const index = JSON.parse(document.getElementById("index").textContent);
const clips = []; // in the order of the dataset
index.rows.forEach((row, video) => {
  for (let k = 0; k < row.length; k += 3) {
    clips.push({ number: clips.length, video, frame: row[k], label: row[k + 1], start: row[k + 2] });
  }
});
const elements = new Set(index.labels.flatMap((label) => label.toLowerCase().split("_")));
const output = document.getElementById("result");
const [byLabel, byFrame] = document.forms;

function add(parent, tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function labelText(number) {
  return number < 0 ? "no label" : index.labels[number];
}

function labelLink(parent, number) {
  if (number < 0) add(parent, "span", "no label");
  else add(parent, "a", index.labels[number], { href: "#" + new URLSearchParams({ label: index.labels[number] }) });
}

function frameLink(parent, clip) {
  const video = index.videos[clip.video];
  add(parent, "a", `${video}, frame ${clip.frame}`, { href: "#" + new URLSearchParams({ video, frame: clip.frame }) });
}

function addPictures(parent, found) {
  const box = add(parent, "div", undefined, { class: "clips" });
  for (const clip of found) {
    const picture = document.getElementById(`clip-${clip.number}`);
    if (!picture) continue;
    const copy = picture.cloneNode(true);
    copy.removeAttribute("id");
    box.append(copy);
  }
}

function more(parent, count) {
  if (count > LIMIT) add(parent, "p", `The first ${LIMIT} of ${count} are listed.`);
}

// An element of a label must match as a whole, any other word as a part of the label.
function matches(label, words) {
  const text = `_${label}_`.toLowerCase();
  return words.every((word) => text.includes(elements.has(word) ? `_${word}_` : word));
}

function showLabel(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const exact = index.labels.indexOf(query);
  const all = [...index.labels.keys()];
  const chosen = exact >= 0 ? [exact] : all.filter((number) => matches(index.labels[number], words));
  const selected = new Set(chosen);
  const found = clips.filter((clip) => selected.has(clip.label));
  add(output, "h3", `${query}: ${plural(found.length, "clip")} of ${plural(chosen.length, "label")}`);
  const counts = new Map(chosen.map((number) => [number, 0]));
  found.forEach((clip) => counts.set(clip.label, counts.get(clip.label) + 1));
  if (chosen.length > 1) {
    const list = add(output, "ul");
    const ordered = chosen.sort((a, b) => counts.get(b) - counts.get(a)).slice(0, LIMIT);
    for (const number of ordered) {
      const item = add(list, "li");
      labelLink(item, number);
      item.append(` (${counts.get(number)})`);
    }
    more(output, chosen.length);
  }
  addPictures(output, found);
  const list = add(add(output, "div", undefined, { class: "list" }), "ul");
  for (const clip of found.slice(0, LIMIT)) {
    const item = add(list, "li");
    frameLink(item, clip);
    if (chosen.length > 1) item.append(`: ${labelText(clip.label)}`);
  }
  more(output, found.length);
}

function showFrame(name, frame) {
  const video = index.videos.indexOf(name);
  if (video < 0) {
    const near = index.videos.filter((other) => other.toLowerCase().includes(name.toLowerCase()));
    add(output, "h3", `No video has the name “${name}”`);
    if (near.length) add(output, "p", "Videos whose name contains it:");
    const list = add(output, "ul");
    for (const other of near.slice(0, LIMIT)) {
      add(add(list, "li"), "a", other, { href: "#" + new URLSearchParams({ video: other, frame }) });
    }
    return more(output, near.length);
  }
  const own = clips.filter((clip) => clip.video === video);
  const distance = (clip) => Math.abs(clip.frame - frame);
  const nearest = own.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const found = own.filter((clip) => clip.start <= frame && frame < clip.start + index.span);
  const count = found.length === 1 ? "1 clip contains" : `${found.length || "no"} clips contain`;
  add(output, "h3", `${name}, frame ${frame}: ${count} it`);
  const answer = add(output, "p", "The nearest event is ");
  labelLink(answer, nearest.label);
  answer.append(` at frame ${nearest.frame}.`);
  const table = add(add(output, "div", undefined, { class: "scroll" }), "table");
  const head = add(add(table, "thead"), "tr");
  ["frame", "label", "frames of the clip", "contains the frame"].forEach((text) => add(head, "th", text, { class: "t" }));
  const body = add(table, "tbody");
  const listed = own.slice().sort((a, b) => distance(a) - distance(b)).slice(0, LIMIT).sort((a, b) => a.frame - b.frame);
  for (const clip of listed) {
    const row = add(body, "tr", undefined, clip === nearest ? { class: "nearest" } : {});
    add(row, "td", clip.frame);
    labelLink(add(row, "td", undefined, { class: "t" }), clip.label);
    add(row, "td", `${clip.start}–${clip.start + index.span - 1}`, { class: "t" });
    add(row, "td", found.includes(clip) ? "yes" : "", { class: "t" });
  }
  more(output, own.length);
  addPictures(output, found.includes(nearest) ? found : [nearest, ...found]);
}

function show() {
  const query = new URLSearchParams(location.hash.slice(1));
  if (!query.has("label") && !query.has("video")) return; // a link to a part of the page
  output.replaceChildren();
  if (query.has("label")) {
    byLabel.elements.label.value = query.get("label");
    showLabel(query.get("label"));
  } else {
    const frame = Number(query.get("frame") || 0);
    byFrame.elements.video.value = query.get("video");
    byFrame.elements.frame.value = frame;
    showFrame(query.get("video"), frame);
  }
  output.scrollIntoView();
}

for (const form of [byLabel, byFrame]) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const fragment = "#" + new URLSearchParams(new FormData(form));
    if (location.hash === fragment) show();
    else location.hash = fragment;
  });
}
const names = document.getElementById("videos");
index.videos.slice(0, 2000).forEach((video) => add(names, "option", undefined, { value: video }));
window.addEventListener("hashchange", show);
show();
