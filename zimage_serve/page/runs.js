// A run while it trains: its loss, its pictures, its LoRAs.

import { ask, follow, get, part } from "./api.js";
import { hear, tell } from "./bus.js";
import { draw } from "./chart.js";
import { $, attempt, duration, el } from "./dom.js";

const KEY = "run";
const ENDS = ["done", "failed", "stopped", "closing"];
const KINDS = ["running", "prepared", "begun", "step", "held_out", "preview", "saved", "paused", "notice"];
const LATEST = 20; // steps whose time predicts the rest
let [runs, run, leave, following] = [[], null, null, ""];
let [steps, heldOut, previews] = [new Map(), new Map(), new Map()];
let waiting = false;

function take(line) {
  if ("loss" in line) steps.set(line.step, line);
  else if ("validation" in line) heldOut.set(line.step, line);
  else if ("preview" in line) {
    const found = previews.get(line.step) || new Map();
    previews.set(line.step, found.set(line.index, line));
  }
}

const mean = (numbers) => numbers.reduce((sum, each) => sum + each, 0) / numbers.length;

function showState() {
  const { state, step, total, error } = run;
  const words = [`${run.name}: ${state}`];
  if (total) words.push(`step ${step} of ${total}`);
  const latest = [...steps.values()].slice(-LATEST);
  if (state === "running" && latest.length && total) {
    words.push(`about ${duration(mean(latest.map((each) => each.seconds)) * (total - step))} left`);
  }
  if (state === "paused") words.push("it goes on when the pictures are made");
  if (state === "stopped" && run.can_resume) words.push("its state is saved");
  if (error) words.push(error);
  $("run-state").textContent = words.join(", ");
  $("run-progress").max = Math.max(1, total);
  $("run-progress").value = step;
  $("run-stop").hidden = ["done", "failed", "stopped"].includes(state);
  $("run-resume").hidden = !run.can_resume;
}

function showChart() {
  const lines = [...steps.values()].sort((a, b) => a.step - b.step);
  const tested = [...heldOut.values()].map((each) => [each.step, mean(Object.values(each.validation))]);
  draw($("chart"), [{ name: "smoothed", points: lines.map((each) => [each.step, each.smoothed]) },
    { name: "held out", points: tested.sort((a, b) => a[0] - b[0]) }], run.total || lines.at(-1)?.step || 1);
  const [first, last] = [lines[0], lines.at(-1)];
  $("chart-text").textContent = last ? `Step ${last.step}: loss ${last.smoothed?.toFixed(4)}, at first ${first.smoothed?.toFixed(4)}`
    + `${tested.length ? `, held out ${tested.at(-1)[1].toFixed(4)}` : ""}.` : "No step yet.";
}

function showPreviews() {
  const known = [...previews.keys()].sort((a, b) => a - b);
  $("samples").hidden = !known.length;
  if (!known.length) return;
  const range = $("sample");
  const atEnd = Number(range.value) >= Number(range.max);
  range.max = known.length - 1;
  if (atEnd) range.value = known.length - 1;
  const step = known[Number(range.value)];
  range.setAttribute("aria-valuetext", `step ${step}`);
  $("sample-shown").textContent = `step ${step}`;
  const lines = [...previews.get(step).values()].sort((a, b) => a.index - b.index);
  const shown = lines.map((line) => `/api/runs/${run.id}/previews/${part(line.preview.split("/").at(-1))}`);
  const now = [...$("sample-pictures").querySelectorAll("img")].map((picture) => picture.getAttribute("src"));
  if (JSON.stringify(now) === JSON.stringify(shown)) return;
  $("sample-pictures").replaceChildren(...lines.map((line, i) => el("figure", {},
    el("img", { src: shown[i], alt: `Step ${step}: ${line.prompt}` }), el("figcaption", { textContent: line.prompt }))));
}

function showSaved() {
  const names = [...(run.lora ? [run.lora] : []), ...[...run.checkpoints].sort((a, b) => b.localeCompare(a, "en", { numeric: true }))];
  const trigger = run.options.trigger;
  $("checkpoints").replaceChildren(...(names.length ? names : ["none yet"]).map((name) => (names.length
    ? el("li", {}, el("span", { textContent: name }), el("button", { type: "button", textContent: "Test in Create",
      "aria-label": `Test in Create: ${name}`, onclick: () => tell("use LoRA", { name, trigger }) }))
    : el("li", { className: "empty", textContent: "None yet." }))));
}

/** Draws what has come, at most once in a frame. */
function show() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    showState();
    showChart();
    showPreviews();
  });
}

async function renew() {
  run = await get(`/api/runs/${run.id}`);
  showSaved();
  show();
}

function listen(kind, told) {
  if (told.step !== undefined && kind !== "preview" && kind !== "held_out") run.step = told.step;
  if (told.total) run.total = told.total;
  if (["step", "held_out", "preview"].includes(kind)) take(told);
  if (["running", "begun", "step"].includes(kind)) run.state = "running";
  if (kind === "paused") run.state = "paused";
  if (kind === "prepared") $("run-state").textContent = `${run.name}: preparing ${told.what}, ${told.done} of ${told.total}`;
  else show();
  if (kind === "saved") {
    attempt(renew);
    tell("LoRA saved");
  }
  if (ENDS.includes(kind)) {
    following = "";
    attempt(load);
    tell("LoRA saved");
    tell("run over");
  }
}

/** Follows the shown run, if it trains, the view is open and the tab is seen. */
function watch() {
  const wanted = run && !ENDS.includes(run.state) && !document.hidden && !$("view-train").hidden ? run.id : "";
  if (wanted === following) return;
  leave?.();
  [leave, following] = [null, wanted];
  if (wanted) leave = follow(`/api/runs/${wanted}/events`, KINDS, ENDS, listen);
}

async function choose(id) {
  run = runs.find((each) => each.id === id) || runs[0] || null;
  $("run-panel").hidden = !run;
  if (!run) return;
  $("run").replaceChildren(...runs.map((each) => new Option(`${each.name}, ${each.state}`, each.id)));
  $("run").value = run.id;
  sessionStorage.setItem(KEY, run.id);
  [steps, heldOut, previews] = [new Map(), new Map(), new Map()];
  const { id: mine } = run;
  const lines = await get(`/api/runs/${mine}/metrics`);
  if (run.id !== mine) return;
  lines.forEach(take);
  showSaved();
  show();
  watch();
}

async function load() {
  runs = await get("/api/runs");
  await choose(run?.id || sessionStorage.getItem(KEY));
}

/** Begins the view of runs. */
export function beginRuns() {
  $("run").addEventListener("change", () => attempt(() => choose($("run").value)));
  $("sample").addEventListener("input", showPreviews);
  for (const action of ["stop", "resume"]) {
    $(`run-${action}`).addEventListener("click", async () => {
      await attempt(() => ask("POST", `/api/runs/${run.id}/${action}`));
      following = "";
      await attempt(load);
    });
  }
  hear("run started", async (started) => {
    run = started;
    await attempt(load);
    $("run-panel").scrollIntoView({ block: "nearest" });
  });
  hear("view", (name) => (name === "train" ? attempt(load) : watch()));
  hear("back", () => {
    following = "";
    attempt(load);
  });
  document.addEventListener("visibilitychange", watch);
}
