// The options of a run, and what it would do with them.

import { ask, get } from "./api.js";
import { hear, tell } from "./bus.js";
import { dataset } from "./datasets.js";
import { $, attempt, bytes, duration, el, facts, later, plain, say } from "./dom.js";
import { bodyOf, field, fill, remember, values } from "./fields.js";

const PLACED = ["name", "dataset", "training_adapter", "trigger", "steps", "resolution", "rank", "preview_prompt",
  "preview_every", "save_every", "validation", "kind", "mask", "regularization"]; // have inputs of their own
const KEPT = ["name", "trigger", "preview_prompt", "training_adapter", "init_lora", "mask", "regularization", "preserve",
  "preserve_prompt"]; // by a preset
let [form, presets, asked] = [null, [], 0];

function order() {
  const given = Object.fromEntries(Object.entries(values(form)).filter(([, value]) => value !== false));
  return { ...given, dataset: dataset() };
}

function show(plan) {
  const per = plan.seconds ? plan.seconds / plan.steps : null;
  facts($("plan"), [
    ["Pictures", plan.held_out ? `${plan.pictures}, and ${plan.held_out} held out` : plan.pictures],
    ["Sizes", plan.sizes.map((size) => `${size.width} x ${size.height} (${size.pictures})`).join(", ")],
    ["Steps", `${plan.steps}, ${plan.steps_per_epoch} for each time through the pictures`],
    ["Learning rate", plan.lr.toPrecision(3)],
    ["Memory", `about ${bytes(plan.memory_bytes)}, in ${plan.precision}`],
    ["Time", per ? `about ${duration(plan.seconds)}, ${per.toPrecision(2)} s a step` : "known after the first run on this server"],
    ["Learned", `${plan.parameters.toLocaleString()} numbers in ${plan.layers} layers`],
  ]);
  $("plan-warnings").replaceChildren(...plan.warnings.map((text) => el("li", { textContent: plain(text) })));
  tell("crops", plan.crops);
}

async function plan() {
  const mine = (asked += 1);
  let problem = "";
  let made = null;
  try {
    if (!dataset()) problem = "Choose a dataset that has pictures.";
    else made = await ask("POST", "/api/runs/plan", { ...order(), name: $("run-name").value.trim() || "unnamed" });
  } catch (error) {
    problem = plain(error.message);
  }
  if (mine !== asked) return;
  $("plan-problem").textContent = problem;
  $("plan").hidden = $("plan-warnings").hidden = !made;
  $("train-start").disabled = !made;
  if (made) show(made);
}

function offerPresets() {
  $("preset").replaceChildren(new Option("own options", ""), ...presets.map((each) => new Option(each.name)));
  $("preset").addEventListener("change", () => {
    const preset = presets.find((each) => each.name === $("preset").value);
    $("preset-about").textContent = preset ? preset.about : "";
    if (preset) use(preset);
  });
}

/** Writes the options of a preset. The trigger and the prompts of the user stay. */
function use(preset) {
  for (const input of form.querySelectorAll("[name]")) {
    if (KEPT.includes(input.name)) continue;
    if (input.type === "checkbox") input.checked = input.defaultChecked;
    else if (input.tagName === "SELECT") input.value = input.dataset.usual ?? "";
    else input.value = "";
  }
  const { trigger, preview_prompt: prompts, ...options } = preset.options;
  fill(form, options);
  if (trigger && !$("trigger").value) $("trigger").value = trigger;
  if (prompts && !$("preview-prompt").value) $("preview-prompt").value = prompts.join("\n");
  form.dispatchEvent(new Event("change"));
}

async function start(event) {
  event.preventDefault();
  const run = await attempt(() => ask("POST", "/api/runs", order()));
  if (!run) return;
  say(`${run.name}: training begins as soon as the machine is free.`);
  tell("run started", run);
}

/** Offers `names` in a select, after "none". It keeps what is chosen. */
function offer(select, names) {
  const kept = select.value;
  select.replaceChildren(new Option("none", ""), ...names.map((name) => new Option(name)));
  select.value = names.includes(kept) ? kept : "";
}

const offerAdapters = (loras) => offer($("adapter"), loras.filter((lora) => !lora.problem).map((lora) => lora.name));

/** Masks that were painted or sent are meant to be used. */
function useMasks() {
  if ($("train-mask").value === "file") return;
  $("train-mask").value = "file";
  form.dispatchEvent(new Event("change"));
  say("The run uses masks now.");
}

/** Begins the form. */
export async function beginPlan(model) {
  form = $("train-form");
  const [properties, found, loras] = await Promise.all([bodyOf("/api/runs"), get("/api/runs/presets"), get("/api/loras")]);
  presets = found;
  const more = Object.entries(properties).filter(([name]) => !PLACED.includes(name));
  $("train-more").replaceChildren(...more.map(([name, schema]) => field("train", name, schema)));
  for (const [id, name] of [["kind", "kind"], ["train-mask", "mask"]]) {
    $(id).replaceChildren(...properties[name].enum.map((value) => new Option(value)));
    $(id).value = properties[name].default;
    $(`${id}-help`).textContent = plain(properties[name].description);
  }
  offer($("regularization"), await get("/api/datasets"));
  for (const select of form.querySelectorAll("select")) select.dataset.usual = select.value;
  offerPresets();
  offerAdapters(loras);
  const fresh = !sessionStorage.getItem("train");
  remember(form, "train");
  const soon = later(plan, 350);
  if (fresh && model.defaults.width && presets[0]) {
    $("preset").value = presets[0].name;
    $("preset").dispatchEvent(new Event("change"));
  }
  form.addEventListener("input", soon);
  form.addEventListener("change", soon);
  form.addEventListener("submit", start);
  hear("dataset changed", soon);
  hear("loras", offerAdapters);
  hear("datasets", (names) => offer($("regularization"), names));
  hear("mask given", useMasks);
  hear("run over", soon);
  hear("view", (name) => name === "train" && soon());
}
