// One picture large, with its facts; and two pictures under a slider.

import { ask } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, dangerous, facts, say } from "./dom.js";
import { beginCompare } from "./gallery.js";

const file = (row) => `/api/pictures/${row.id}/file`;
const fileName = (path) => String(path).split(/[/\\]/).at(-1);
let [shown, rows] = [null, []];

function show(row) {
  shown = row;
  const record = row.record || {};
  $("viewer-picture").src = file(row);
  $("viewer-picture").alt = row.prompt;
  $("viewer-prompt").textContent = row.prompt;
  facts($("viewer-facts"), [
    ["Size", `${row.width} x ${row.height}`], ["Seed", record.seed], ["Steps", record.steps], ["Guidance", record.guidance],
    ["Negative", record.negative_prompt], ["Sampler", record.sampler], ["Strength", record.strength],
    ["LoRAs", (record.loras || []).map((lora) => `${fileName(lora.file)} ${lora.scale}`).join(", ")],
    ["ControlNet", record.control && fileName(record.control)],
    ["Made", new Date(row.created * 1000).toLocaleString()],
  ]);
  const link = $("viewer-download");
  link.href = `${file(row)}?download=true`;
  link.setAttribute("download", `zimage-${row.id}.png`);
  const place = rows.findIndex((each) => each.id === row.id);
  $("viewer-before").disabled = place <= 0;
  $("viewer-after").disabled = place < 0 || place >= rows.length - 1;
}

function step(by) {
  const next = rows[rows.findIndex((each) => each.id === shown.id) + by];
  if (next) show(next);
}

async function remove() {
  const { id } = shown;
  if ((await attempt(async () => (await ask("DELETE", `/api/pictures/${id}`), true))) === undefined) return;
  $("viewer").close();
  tell("picture deleted", id);
  say("Deleted.");
}

function compare(a, b) {
  for (const [name, row] of [["a", a], ["b", b]]) {
    $(`compare-${name}`).src = file(row);
    $(`compare-${name}`).alt = row.prompt;
    $(`compare-${name}-text`).textContent = `${name === "a" ? "Left" : "Right"}: ${row.prompt} (seed ${row.record?.seed ?? "?"})`;
  }
  $("compare").showModal();
  $("cut").focus();
}

/** Begins the large views. */
export function beginViewer() {
  hear("open picture", (asked) => {
    rows = asked.rows;
    show(asked.row);
    $("viewer").showModal();
  });
  $("viewer-before").addEventListener("click", () => step(-1));
  $("viewer-after").addEventListener("click", () => step(1));
  $("viewer").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  for (const [id, news] of [["viewer-use", "use settings"], ["viewer-start", "start from"]]) {
    $(id).addEventListener("click", () => {
      $("viewer").close();
      tell(news, shown);
    });
  }
  $("viewer-delete").append(dangerous("Delete", remove));
  const cut = () => $("stack").style.setProperty("--cut", `${$("cut").value}%`);
  $("cut").addEventListener("input", cut);
  cut();
  beginCompare(compare);
}
