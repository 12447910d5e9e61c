// Jobs that wait or run: their progress and previews. One stream of events at a time, since browsers allow few.

import { ask, follow, get } from "./api.js";
import { hear, tell } from "./bus.js";
import { $, attempt, el, say } from "./dom.js";

const OPEN = ["queued", "running"];
const STAGES = { encode: "reading the prompt", denoise: "denoising", decode: "finishing" };
const cards = new Map(); // id -> card
let followed = null;
let asking = false;

function makeCard(job) {
  const bar = el("progress", { max: 1, value: 0, "aria-label": `Progress: ${job.asked.prompt}` });
  const state = el("p", { className: "help" });
  const shots = el("div", { className: "shots" });
  const cancel = el("button", {
    type: "button", textContent: "Cancel", "aria-label": `Cancel: ${job.asked.prompt}`,
    onclick: () => attempt(() => ask("DELETE", `/api/jobs/${job.id}`)).then(refresh),
  });
  const node = el("li", { className: "job" }, shots,
    el("div", { className: "about" }, el("p", { className: "prompt", textContent: job.asked.prompt }), state, bar), cancel);
  return { node, bar, state, shots, pictures: new Map() };
}

function showProgress(card, { stage, done, total }) {
  card.state.textContent = `${STAGES[stage] || stage}, ${done} of ${total}`;
  card.bar.value = total ? done / total : 0;
}

function showPreview(card, id, place) {
  let picture = card.pictures.get(place);
  if (!picture) {
    picture = el("img", { alt: `Preview of picture ${place + 1}` });
    card.pictures.set(place, picture);
    card.shots.append(picture);
  }
  picture.src = `/api/jobs/${id}/preview?place=${place}&at=${Date.now()}`;
}

function watch(job) {
  if (followed?.id === job.id) return;
  followed?.stop();
  const stop = follow(`/api/jobs/${job.id}/events`, ["started", "progress", "preview"], ["done", "failed", "cancelled"],
    (kind, facts) => {
      const card = cards.get(job.id);
      if (kind === "progress" && card) showProgress(card, facts);
      else if (kind === "preview" && card) showPreview(card, job.id, facts.place);
      else if (["done", "failed", "cancelled"].includes(kind)) {
        followed = null;
        refresh();
      }
    });
  followed = { id: job.id, stop };
}

function end(id, job) {
  cards.get(id).node.remove();
  cards.delete(id);
  if (followed?.id === id) {
    followed.stop();
    followed = null;
  }
  if (job?.state === "failed") say(`Failed: ${job.error}`, "bad");
  tell("finished", job);
}

/** Asks for the jobs of all clients, and shows those that are not over. */
async function refresh() {
  if (asking) return;
  asking = true;
  try {
    const jobs = await get("/api/jobs?limit=100");
    const open = jobs.filter((job) => OPEN.includes(job.state)).reverse();
    for (const id of [...cards.keys()]) {
      if (!open.some((job) => job.id === id)) end(id, jobs.find((job) => job.id === id));
    }
    for (const job of open) {
      if (!cards.has(job.id)) {
        cards.set(job.id, makeCard(job));
        $("queue").append(cards.get(job.id).node);
      }
      const card = cards.get(job.id);
      if (job.state === "queued") card.state.textContent = `waiting, place ${(job.position ?? 0) + 1}`;
      else if (job.progress) showProgress(card, job.progress);
      else card.state.textContent = "begins";
    }
    const running = open.find((job) => job.state === "running");
    if (running && !document.hidden) watch(running);
    $("queue-section").hidden = open.length === 0;
  } catch {
    // the banner says that the server does not answer
  } finally {
    asking = false;
  }
}

/** Begins to watch the jobs. */
export function beginQueue() {
  let last = "";
  hear("queued", refresh);
  hear("back", refresh);
  hear("status", (status) => {
    const now = JSON.stringify([status.waiting, status.running]);
    if (cards.size || now !== last) refresh();
    if (now !== last) tell("finished", null); // another tab may have made pictures
    last = now;
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return refresh();
    followed?.stop();
    followed = null;
    return undefined;
  });
  refresh();
}
