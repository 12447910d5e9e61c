// LoRAs with their facts, and the search in the gallery.

import { ask, get, part, send } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, bytes, dangerous, el, facts, later, say, takesFiles } from "./dom.js";
import { Gallery } from "./gallery.js";

const HIDDEN = ["name", "bytes", "changed", "problem", "trigger", "changes"];
const words = (name) => name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());

function plain(value) {
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (value !== null && typeof value === "object") return Object.entries(value).map(([k, v]) => `${k}: ${plain(v)}`).join(", ");
  return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : value;
}

const pairs = (lora) => [
  ["Trigger", lora.trigger], ["File", bytes(lora.bytes)],
  ...Object.entries(lora).filter(([name]) => !HIDDEN.includes(name)).map(([name, value]) => [words(name), plain(value)]),
];

async function inspect(name) {
  const lora = await attempt(() => get(`/api/loras/${part(name)}`));
  if (!lora) return;
  $("inspect-title").textContent = name;
  facts($("inspect-facts"), pairs(lora));
  const head = ["Module", "Blocks", "Ranks", "Mean norm", "Largest norm"];
  const rows = lora.changes.map((row) => [row.module, row.blocks, row.ranks.join(", "), row.mean_norm, row.largest_norm]);
  $("inspect-changes").replaceChildren(
    el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col", textContent: text })))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => el("td", { textContent: plain(value) }))))));
  $("inspect").showModal();
}

async function rename(lora, input) {
  const renamed = await attempt(() => ask("PATCH", `/api/loras/${part(lora.name)}`, { name: input.value.trim() }));
  if (renamed) say(`It is named ${renamed.name} now.`);
  await load();
}

async function remove(lora) {
  await attempt(() => ask("DELETE", `/api/loras/${part(lora.name)}`));
  await load();
}

function card(lora) {
  const stem = lora.name.replace(/\.safetensors$/, "");
  const input = el("input", { value: stem, "aria-label": `New name of ${lora.name}`, maxLength: 88 });
  const form = el("form", { className: "row", hidden: true, onsubmit: (event) => {
    event.preventDefault();
    rename(lora, input);
  } }, input, el("button", { textContent: "Rename" }));
  const open = () => {
    form.hidden = !form.hidden;
    if (!form.hidden) input.select();
  };
  return el("li", {}, el("h4", { textContent: lora.name }),
    lora.problem ? el("p", { className: "problem", textContent: lora.problem })
      : facts(el("dl", { className: "facts" }), pairs(lora).slice(0, 5)),
    el("div", { className: "row" },
      !lora.problem && el("button", { type: "button", className: "primary", textContent: "Use", "aria-label": `Use ${lora.name} in Create`,
        onclick: () => tell("use LoRA", lora) }),
      !lora.problem && el("button", { type: "button", textContent: "Details", "aria-label": `Details of ${lora.name}`, onclick: () => inspect(lora.name) }),
      el("button", { type: "button", textContent: "Rename", "aria-label": `Rename ${lora.name}`, onclick: open }),
      el("a", { className: "button", href: `/api/loras/${part(lora.name)}/file`, textContent: "Download", "aria-label": `Download ${lora.name}` }),
      dangerous("Delete", () => remove(lora))),
    form);
}

async function load() {
  const found = await attempt(() => get("/api/loras"));
  if (!found) return;
  $("loras").replaceChildren(...found.map(card));
  $("loras-empty").hidden = found.length > 0;
  tell("loras", found);
}

async function upload(files) {
  for (const file of files) {
    $("lora-progress").textContent = `Sending ${file.name}`;
    await attempt(() => send("/api/loras", file));
  }
  $("lora-progress").textContent = "";
  await load();
}

/** Begins the view. */
export function beginLibrary() {
  const gallery = new Gallery($("gallery"), $("gallery-more"), $("gallery-empty"));
  takesFiles($("lora-drop"), $("lora-file"), upload);
  const search = () => gallery.find($("search").value);
  $("search").addEventListener("input", later(search, 250));
  $("gallery-form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  const visible = () => !$("view-library").hidden;
  hear("view", (name) => {
    if (name !== "library") return;
    load();
    gallery.fresh();
  });
  hear("finished", () => visible() && gallery.fresh());
  hear("LoRA saved", () => visible() && load());
}
