// LoRAs and checkpoints with their facts, and the search in the gallery.

import { get, part, send } from "./api.js";
import { hear, tell } from "./bus.js";
import { card, fillTable, pairsOf } from "./cards.js";
import { beginConverter, convert } from "./converter.js";
import { $, attempt, bytes, facts, later, takesFiles } from "./dom.js";
import { Gallery } from "./gallery.js";

const HIDDEN = ["name", "bytes", "changed", "problem", "trigger", "changes", "own", "tensors", "model_type", "dtypes"];
const SHOWN = 6; // facts on a card

const pairs = (file) => [["Trigger", file.trigger], ["File", bytes(file.bytes)], ...pairsOf(file, HIDDEN)];

function show(file, title, what, head, rows) {
  $("inspect-title").textContent = title;
  $("inspect-what").textContent = what;
  facts($("inspect-facts"), pairs(file));
  fillTable($("inspect-table"), head, rows);
  $("inspect").showModal();
}

async function inspectLora(name) {
  const lora = await attempt(() => get(`/api/loras/${part(name)}`));
  if (lora) {
    show(lora, name, "How much it changes", ["Module", "Blocks", "Ranks", "Mean norm", "Largest norm"],
      lora.changes.map((row) => [row.module, row.blocks, row.ranks, row.mean_norm, row.largest_norm]));
  }
}

async function inspectCheckpoint(name) {
  const found = await attempt(() => get(`/api/checkpoints/${part(name)}`));
  if (found) {
    show(found, name, "Tensors", ["Name", "Shape", "Type"],
      found.tensors.map((row) => [row.name, row.shape.join(" x "), row.dtype]));
  }
}

async function loadLoras() {
  const found = await attempt(() => get("/api/loras"));
  if (!found) return;
  $("loras").replaceChildren(...found.map((lora) => card(lora, "/api/loras", pairs(lora).slice(0, SHOWN), [
    ["Use", () => tell("use LoRA", lora)], ["Details", () => inspectLora(lora.name)],
    ["Convert or merge", () => attempt(() => convert("loras", lora.name))],
  ], loadLoras)));
  $("loras-empty").hidden = found.length > 0;
  tell("loras", found);
}

async function loadCheckpoints() {
  const found = await attempt(() => get("/api/checkpoints"));
  if (!found) return;
  $("checkpoint-files").replaceChildren(...found.map((file) => card(file, "/api/checkpoints", pairs(file).slice(0, SHOWN), [
    ["Convert or merge", () => attempt(() => convert("checkpoints", file.name))], ["Details", () => inspectCheckpoint(file.name)],
  ], loadCheckpoints, file.own)));
}

async function upload(files) {
  for (const file of files) {
    $("lora-progress").textContent = `Sending ${file.name}`;
    await attempt(() => send("/api/loras", file));
  }
  $("lora-progress").textContent = "";
  await loadLoras();
}

/** Begins the view. */
export function beginLibrary() {
  const gallery = new Gallery($("gallery"), $("gallery-more"), $("gallery-empty"));
  takesFiles($("lora-drop"), $("lora-file"), upload);
  beginConverter();
  const search = () => gallery.find($("search").value);
  $("search").addEventListener("input", later(search, 250));
  $("gallery-form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  const visible = () => !$("view-library").hidden;
  const load = () => Promise.all([loadLoras(), loadCheckpoints()]);
  hear("view", (name) => {
    if (name !== "library") return;
    load();
    gallery.fresh();
  });
  hear("finished", () => visible() && gallery.fresh());
  hear("LoRA saved", () => visible() && loadLoras());
  hear("file made", () => visible() && load());
}
