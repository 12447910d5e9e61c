// New LoRAs and checkpoints made of others: the dialog that asks for one, and those in the making.

import { ask, get } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, el, plain, say } from "./dom.js";
import { bodyOf, field, values } from "./fields.js";

const PLACED = ["name", "loras", "checkpoint"]; // have inputs of their own
const ENDS = ["done", "failed", "cancelled"];
const EVERY_MS = 700;
const rows = new Map(); // id of a task -> its row
let [kind, picked, known, timer] = ["loras", [], [], 0];

function scaleRow(entry) {
  const scale = el("input", { type: "number", step: "0.05", value: String(entry.scale), "aria-label": `Scale of ${entry.name}`,
    oninput: () => (entry.scale = Number(scale.value)) });
  const remove = el("button", { type: "button", textContent: "Remove", "aria-label": `Remove ${entry.name}`, onclick: () => {
    picked = picked.filter((each) => each !== entry);
    draw();
  } });
  return el("li", { className: "row" }, el("span", { className: "name", textContent: entry.name }), scale, remove);
}

function draw() {
  $("convert-loras").replaceChildren(...picked.map(scaleRow));
  const free = known.filter((lora) => !lora.problem && !picked.some((each) => each.name === lora.name));
  $("convert-lora").replaceChildren(...free.map((lora) => new Option(lora.name)));
  if (!free.length) $("convert-lora").append(new Option(known.length ? "all are in use" : "none yet", ""));
  $("convert-lora").disabled = $("convert-add").disabled = !free.length;
}

/** Opens the dialog for a new file. asked: "loras" or "checkpoints"; name: of the file to begin with. */
export async function convert(asked, name) {
  const [properties, loras] = await Promise.all([bodyOf(`/api/${asked}/convert`), get("/api/loras")]);
  [kind, known] = [asked, loras];
  picked = kind === "loras" ? [{ name, scale: 1 }] : [];
  $("convert-title").textContent = kind === "loras" ? "Make a LoRA of others" : "Make a checkpoint";
  $("convert-of").textContent = kind === "loras" ? "One LoRA is converted, several are added up."
    : `It begins with ${name === "model" ? "the transformer of this server" : name}. LoRAs are merged into it.`;
  $("convert-form").dataset.checkpoint = name;
  $("convert-name").value = "";
  $("convert-problem").textContent = "";
  const more = Object.entries(properties).filter(([each]) => !PLACED.includes(each));
  $("convert-fields").replaceChildren(...more.map(([each, schema]) => field("convert", each, schema)));
  draw();
  $("convert").showModal();
  $("convert-name").focus();
}

async function start(event) {
  event.preventDefault();
  const order = { ...values($("convert-form")), loras: picked };
  if (kind === "checkpoints" && $("convert-form").dataset.checkpoint !== "model") order.checkpoint = $("convert-form").dataset.checkpoint;
  try {
    const task = await ask("POST", `/api/${kind}/convert`, order);
    $("convert").close();
    show(task);
    renew();
  } catch (error) {
    $("convert-problem").textContent = plain(error.message);
  }
}

function ended(id, task) {
  rows.get(id).remove();
  rows.delete(id);
  if (task?.state === "done") say([`${task.name} is there.`, ...task.notes].join(" "), task.notes.length ? "bad" : "");
  if (task?.state === "failed") say(`${task.name}: ${plain(task.error)}`, "bad");
  tell("file made");
}

function makeRow(task) {
  const bar = el("progress", { "aria-label": `Progress: ${task.name}` });
  const cancel = el("button", { type: "button", textContent: "Cancel", "aria-label": `Cancel: ${task.name}`,
    onclick: () => attempt(() => ask("DELETE", `/api/tasks/${task.id}`)) });
  return el("li", { className: "job" }, el("div", { className: "about" }, el("p", { textContent: task.name }), bar), cancel);
}

function show(task) {
  if (!rows.has(task.id)) {
    rows.set(task.id, makeRow(task));
    $("tasks").append(rows.get(task.id));
  }
  if (task.total) Object.assign(rows.get(task.id).querySelector("progress"), { max: task.total, value: task.done });
  $("tasks-section").hidden = false;
}

/** Asks for the tasks again and again while there are some. A browser allows few streams, so they have none. */
async function renew() {
  clearTimeout(timer);
  const found = await attempt(() => get("/api/tasks"));
  for (const task of found || []) if (rows.has(task.id) || !ENDS.includes(task.state)) show(task);
  for (const id of found ? [...rows.keys()] : []) {
    const task = found.find((each) => each.id === id);
    if (!task || ENDS.includes(task.state)) ended(id, task); // a server that was started again has forgotten it
  }
  $("tasks-section").hidden = rows.size === 0;
  if (rows.size) timer = setTimeout(renew, EVERY_MS);
}

/** Begins the dialog, and shows what is in the making after a reload. */
export function beginConverter() {
  $("convert-form").addEventListener("submit", start);
  $("convert-add").addEventListener("click", () => {
    picked.push({ name: $("convert-lora").value, scale: 1 });
    draw();
  });
  hear("view", (name) => name === "library" && renew());
}
