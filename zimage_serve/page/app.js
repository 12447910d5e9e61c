// Begins the page: the views, the state of the server, and the facts that all parts need.

import { get } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt } from "./dom.js";
import { beginCreate } from "./create.js";
import { beginDatasets } from "./datasets.js";
import { beginLibrary } from "./library.js";
import { beginPlan } from "./plan.js";
import { beginQueue } from "./queue.js";
import { beginRuns } from "./runs.js";
import { beginViewer } from "./viewer.js";

const VIEWS = ["create", "train", "library"];
const BUSY_MS = 1000;
const CALM_MS = 4000;

function show(focus) {
  const asked = location.hash.slice(1);
  const name = VIEWS.includes(asked) ? asked : VIEWS[0];
  for (const each of VIEWS) {
    $(`view-${each}`).hidden = each !== name;
    const link = document.querySelector(`nav a[href="#${each}"]`);
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${$(`${name}-title`).textContent} - zimage`;
  if (focus) $(`${name}-title`).focus();
  tell("view", name);
}

function describe(model, status) {
  const parts = [model.name];
  if (status.training) parts.push(`training ${status.training.name}: ${status.training.step} of ${status.training.total}`);
  if (status.running.length) parts.push("drawing");
  if (status.waiting) parts.push(`${status.waiting} waiting`);
  if (parts.length === 1) parts.push(status.model_loaded ? "ready" : "idle");
  const text = parts.join(", ");
  if ($("state").textContent !== text) $("state").textContent = text;
}

/** Asks for the state again and again; more often while there is work, and not in a hidden tab. */
async function watch(model) {
  let wait = CALM_MS;
  if (!document.hidden) {
    try {
      const status = await get("/api/status");
      describe(model, status);
      tell("status", status);
      wait = status.waiting || status.running.length || status.training ? BUSY_MS : CALM_MS;
    } catch {
      wait = BUSY_MS;
    }
  }
  setTimeout(() => watch(model), wait);
}

async function begin() {
  let lost = false;
  hear("unreachable", () => {
    lost = true;
    $("offline").hidden = false;
  });
  hear("reached", () => {
    $("offline").hidden = true;
    if (lost) tell("back");
    lost = false;
  });
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
  const model = await attempt(() => get("/api/model"));
  if (!model) {
    setTimeout(begin, CALM_MS);
    return;
  }
  beginViewer();
  beginLibrary();
  beginRuns();
  await attempt(() => Promise.all([beginCreate(model), beginPlan(model), beginDatasets()]));
  beginQueue();
  window.addEventListener("hashchange", () => show(true));
  show(false);
  $("main").inert = false; // what is dropped or pressed before this would be lost
  watch(model);
}

begin();
