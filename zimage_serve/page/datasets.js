// Pictures and captions to train on.

import { ask, get, part, send } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, dangerous, el, say, takesFiles } from "./dom.js";
import { paintMask } from "./mask.js";

const KEY = "dataset";
const MARK = "[trigger]";
const MASK_SUFFIX = ".mask.png"; // of files that are masks of others
let [rows, crops] = [[], new Map()];
let chosen = "";

const path = () => `/api/datasets/${part(chosen)}`;

function showCrop(name, node) {
  const crop = crops.get(name);
  const box = node.querySelector(".crop");
  const row = rows.find((each) => each.name === name);
  const [width, height] = crop ? crop.sizes[0] : [row.width || 1, row.height || 1];
  box.style.setProperty("aspect-ratio", `${width} / ${height}`);
  const shown = crop ? `trained at ${crop.sizes.map((size) => size.join(" x ")).join(", ")}${crop.held_out ? ", held out" : ""}`
    : `${row.width} x ${row.height}`;
  node.querySelector(".shown").textContent = row.problem || shown + (row.mask ? ", with a mask" : "");
  node.querySelector(".mask-remove").hidden = !row.mask;
}

async function write(captions) {
  const facts = await attempt(() => ask("PATCH", `${path()}/captions`, captions));
  if (!facts) return;
  rows = facts.pictures;
  draw();
  tell("dataset changed");
}

function item(row) {
  const caption = el("textarea", { rows: 2, value: row.caption, "aria-label": `Caption of ${row.name}`, placeholder: "caption",
    onchange: () => write({ [row.name]: caption.value }) });
  const remove = async () => {
    await attempt(() => ask("DELETE", `${path()}/pictures/${part(row.name)}`));
    await load();
  };
  const mask = `${path()}/pictures/${part(row.name)}/mask`;
  const paint = async () => {
    const blob = await paintMask(`${path()}/pictures/${part(row.name)}`, "White parts are learned.");
    if (!blob || !(await attempt(() => send(mask, blob, {}, "PUT")))) return;
    tell("mask given");
    await load();
  };
  const unmask = async () => {
    await attempt(() => ask("DELETE", mask));
    await load();
  };
  const button = (label, onclick, className = "") => el("button", {
    type: "button", className, textContent: label, "aria-label": `${label}: ${row.name}`, onclick,
  });
  const node = el("li", {},
    el("div", { className: "crop" }, el("img", { src: `${path()}/pictures/${part(row.name)}/thumbnail`, alt: row.name, loading: "lazy" })),
    el("div", {}, caption, el("p", { className: "help" }, `${row.name}, `, el("span", { className: "shown" })),
      el("div", { className: "acts" },
        button("Paint a mask", paint), button("Remove mask", unmask, "mask-remove"), dangerous("Delete", remove))));
  node.dataset.name = row.name;
  return node;
}

/** Draws the list. A caption in which somebody writes stays as it is. */
function draw() {
  const known = new Map([...$("pictures").children].map((node) => [node.dataset.name, node]));
  const nodes = rows.map((row) => {
    const node = known.get(row.name) || item(row);
    const text = node.querySelector("textarea");
    if (text !== document.activeElement) text.value = row.caption;
    return node;
  });
  if (nodes.some((node, i) => $("pictures").children[i] !== node) || nodes.length !== known.size) {
    $("pictures").replaceChildren(...nodes);
  }
  rows.forEach((row, i) => showCrop(row.name, nodes[i]));
  const bare = rows.filter((row) => !row.caption).length;
  $("dataset-facts").textContent = !chosen ? "Make a dataset first, or drop pictures: they make one."
    : `${rows.length} pictures${bare ? `, ${bare} without a caption` : ""}`;
}

async function load() {
  const facts = chosen && (await attempt(() => get(path())));
  rows = facts ? facts.pictures : [];
  draw();
  tell("dataset changed");
}

async function list(wanted) {
  const names = await attempt(() => get("/api/datasets"));
  if (!names) return;
  const next = names.includes(wanted) ? wanted : names[0] || "";
  if (next !== chosen) {
    $("pictures").replaceChildren();
    crops = new Map();
  }
  chosen = next;
  sessionStorage.setItem(KEY, chosen);
  $("dataset").replaceChildren(...names.map((name) => new Option(name)));
  if (!names.length) $("dataset").append(new Option("none yet", ""));
  $("dataset").value = chosen;
  $("dataset").disabled = !names.length;
  tell("datasets", names);
  $("dataset-delete").hidden = $("replace").hidden = !names.length;
  await load();
}

async function make(name) {
  const made = await attempt(() => ask("PUT", `/api/datasets/${part(name)}`));
  if (made) await list(made.name);
  return made;
}

const stem = (name) => name.replace(/\.[^.]*$/, "");

/** The name of a file with only the letters that the server takes. */
function tame(file) {
  const clean = stem(file.name).normalize("NFKD").replace(/[^A-Za-z0-9 ._+-]/g, "_").replace(/^[^A-Za-z0-9]+/, "").slice(0, 80).trim();
  return new File([file], `${clean || "picture"}.png`, { type: file.type });
}

async function add(files) {
  if (!chosen && !(await make("pictures"))) return;
  const texts = new Map();
  for (const file of files.filter((each) => each.name.endsWith(".txt"))) texts.set(stem(file.name), (await file.text()).trim());
  const isMask = (file) => file.name.endsWith(MASK_SUFFIX);
  const pictures = files.filter((each) => !each.name.endsWith(".txt")) // a mask comes after its picture
    .sort((a, b) => isMask(a) - isMask(b) || a.name.localeCompare(b.name));
  let done = 0;
  for (const file of pictures) {
    $("dataset-facts").textContent = `Sending ${(done += 1)} of ${pictures.length}`;
    await attempt(() => send(`${path()}/pictures`, tame(file), { caption: texts.get(stem(file.name)) || "" }));
  }
  if (pictures.some(isMask)) tell("mask given");
  await load();
  const known = new Set(pictures.map((file) => stem(file.name)));
  const late = Object.fromEntries([...texts].filter(([name]) => !known.has(name))
    .map(([name, text]) => [`${name}.png`, text]).filter(([name]) => rows.some((row) => row.name === name)));
  if (Object.keys(late).length) await write(late);
}

/** Changes all captions by `change`, and says how many are other than before. */
async function change(work) {
  const changed = Object.fromEntries(rows.map((row) => [row.name, work(row.caption), row.caption])
    .filter(([, after, before]) => after !== before).map(([name, after]) => [name, after]));
  const count = Object.keys(changed).length;
  if (count) await write(changed);
  say(`${count} captions changed.`);
}

/** The dataset that is shown; "" if it has no pictures. */
export const dataset = () => (rows.length ? chosen : "");

/** Begins the list of pictures. */
export async function beginDatasets() {
  takesFiles($("pictures-drop"), $("pictures-file"), add);
  $("dataset").addEventListener("change", () => list($("dataset").value));
  $("dataset-new").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await make($("dataset-name").value.trim())) $("dataset-name").value = "";
  });
  $("dataset-delete").append(dangerous("Delete dataset", async () => {
    await attempt(() => ask("DELETE", path()));
    await list("");
  }));
  $("replace").addEventListener("submit", (event) => {
    event.preventDefault();
    change((text) => text.replaceAll($("find").value, $("put").value));
  });
  $("caption-trigger").addEventListener("click", () => change((text) => (text.includes(MARK) ? text : `${MARK} ${text}`.trim())));
  hear("crops", (found) => {
    crops = new Map(found.map((each) => [each.picture, each]));
    for (const node of $("pictures").children) showCrop(node.dataset.name, node);
  });
  hear("view", (name) => name === "train" && list(chosen));
  hear("back", () => list(chosen));
  await list(sessionStorage.getItem(KEY) || "");
}
