// The form for pictures.

import { ask, get } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, say } from "./dom.js";
import { bodyOf, field, fill, remember, values } from "./fields.js";
import { Gallery } from "./gallery.js";
import { beginPicker } from "./picker.js";
import { beginSources, picturesOf, setPictures, showSliders, withPictures } from "./sources.js";

const SHAPES = [["Square", 1, 1], ["Landscape 4:3", 4, 3], ["Landscape 3:2", 3, 2], ["Wide 16:9", 16, 9],
  ["Portrait 3:4", 3, 4], ["Portrait 2:3", 2, 3], ["Tall 9:16", 9, 16]];
const USUAL_SIDE = 1024;
const PLACED = ["init_image", "mask", "count", "preview_steps", "loras", "prompt", "negative_prompt", "width", "height",
  "steps", "guidance", "seed", "strength", "control", "control_image", "control_scale", "control_kind", "control_start",
  "control_end"]; // have inputs of their own
const PREVIEWS = 4; // of a picture
const USUAL_CONTROL = { control_scale: 1, control_kind: "none", control_start: "", control_end: "" };
let [form, picker, keep] = [null, null, null];

function sizes(model) {
  const { width, height } = model.defaults;
  if (width) return [[`${width} x ${height}`, width, height]];
  const round = (side) => Math.round(side / model.size_multiple) * model.size_multiple;
  const area = Math.min(USUAL_SIDE ** 2, model.limits.pixels);
  return SHAPES.map(([name, w, h]) => {
    const [a, b] = [round(Math.sqrt((area * w) / h)), round(Math.sqrt((area * h) / w))];
    return [`${name}, ${a} x ${b}`, a, b];
  });
}

function offerSizes(model) {
  const known = sizes(model);
  const select = $("size");
  select.replaceChildren(...known.map(([name, w, h]) => new Option(name, `${w}x${h}`)), new Option("Another", ""));
  const shown = () => {
    const now = `${$("width").value}x${$("height").value}`;
    select.value = known.some(([, w, h]) => `${w}x${h}` === now) ? now : "";
  };
  select.addEventListener("change", () => {
    if (!select.value) {
      $("width").focus();
      return;
    }
    [$("width").value, $("height").value] = select.value.split("x");
    keep();
  });
  for (const id of ["width", "height"]) {
    $(id).step = model.size_multiple;
    $(id).addEventListener("input", shown);
  }
  return [known[0], shown];
}

/** What the form asks of the server. */
function order() {
  const asked = values(form);
  for (const name of ["lock", "previews"]) delete asked[name];
  if (!$("lock").checked) delete asked.seed;
  asked.loras = picker.chosen();
  if ($("previews").checked) asked.preview_steps = Math.max(1, Math.round((asked.steps || 8) / PREVIEWS));
  return withPictures(asked);
}

async function make(event) {
  event.preventDefault();
  const job = await attempt(() => ask("POST", "/api/jobs", order()));
  if (!job) return;
  if (!$("lock").checked) $("seed").value = job.seeds[0];
  keep();
  say("Queued.");
  tell("queued", job);
}

/** Writes the settings of a picture into the form. */
async function use(row) {
  let asked = row.record;
  let [loras, known] = [[], false];
  if (row.job) {
    try {
      asked = { ...row.record, ...(await get(`/api/jobs/${row.job}`)).asked };
      loras = asked.loras || [];
      known = true;
    } catch {
      // the server has forgotten the job; the record of the picture is enough
    }
  }
  fill(form, { negative_prompt: "", ...USUAL_CONTROL, ...asked, seed: row.record.seed, count: 1 });
  for (const name of ["width", "height", "steps", "guidance"]) $(name).value = row.record[name] ?? $(name).value;
  $("lock").checked = true;
  picker.choose(loras);
  showSliders();
  await setPictures(picturesOf(known ? asked : {}));
  $("width").dispatchEvent(new Event("input"));
  keep();
  location.hash = "#create";
  say("The form holds the settings of that picture.");
}

/** Fills the form view with the defaults of the model, and what this tab had before a reload. */
export async function beginCreate(model) {
  form = $("create-form");
  const properties = await bodyOf("/api/jobs");
  const more = Object.entries(properties).filter(([name]) => !PLACED.includes(name));
  $("create-more").replaceChildren(...more.map(([name, schema]) => field("create", name, schema)));
  picker = beginPicker(() => keep());
  await beginSources(properties.control_kind.enum);
  keep = remember(form, "create");
  showSliders();
  const [first, sizeShown] = offerSizes(model);
  const { steps, guidance } = model.defaults;
  const usual = { width: first[1], height: first[2], steps, guidance };
  for (const [name, value] of Object.entries(usual)) if ($(name).value === "") $(name).value = value;
  $("steps").max = model.limits.steps;
  $("count").max = model.limits.count;
  sizeShown();
  $("seed").addEventListener("input", () => ($("lock").checked = $("seed").value !== ""));
  form.addEventListener("submit", make);
  hear("use settings", use);
  hear("start from", async (row) => {
    await setPictures({ init: row.id, mask: null });
    location.hash = "#create";
  });
  hear("use LoRA", (lora) => {
    picker.choose([{ name: lora.name, scale: 1 }]);
    if (lora.trigger && !$("prompt").value.includes(lora.trigger)) picker.insert(lora.trigger);
    location.hash = "#create";
    $("prompt").focus();
  });
  const results = new Gallery($("results"), $("results-more"), $("results-empty"));
  results.fresh();
  hear("finished", () => results.fresh());
  hear("back", () => results.fresh());
}
