// The pictures that a picture is made from: one to start from, its mask, and one to follow by a ControlNet.

import { get, send } from "./api.js";
import { hear } from "./bus.js";
import { $, attempt, takesFiles } from "./dom.js";
import { paintMask } from "./mask.js";

const KEY = "pictures";
const NEEDS = { init: ["strength"], control: ["control", "control_scale", "control_kind", "control_start", "control_end"] };
const MASK_HELP = "White parts are painted anew.";
let given = { init: null, mask: null, control: null }; // ids of pictures that the server keeps
let controls = []; // ControlNets of the server

/** Where a picture is that the server keeps: an upload, or one of the gallery. */
function sourceOf(id) {
  const upload = `/api/uploads/${id}`;
  return new Promise((resolve) => {
    const trial = new Image();
    trial.onload = () => resolve(upload);
    trial.onerror = () => resolve(`/api/pictures/${id}/file`);
    trial.src = upload;
  });
}

/** Shows other pictures. Those that are not named stay. */
export async function setPictures(changed) {
  given = { ...given, ...changed };
  if (!given.init) given.mask = null;
  sessionStorage.setItem(KEY, JSON.stringify(given));
  for (const name of ["init", "control"]) {
    $(name).hidden = !given[name];
    $(`${name}-drop`).hidden = Boolean(given[name]);
  }
  $("mask-figure").hidden = $("mask-clear").hidden = !given.mask;
  const shown = Object.entries(given).filter(([, id]) => id);
  await Promise.all(shown.map(async ([name, id]) => ($(`${name}-picture`).src = await sourceOf(id))));
}

/** Writes the pictures into an order, and takes out what needs a picture that is not there. */
export function withPictures(asked) {
  for (const [name, fields] of Object.entries(NEEDS)) {
    if (!given[name]) for (const field of fields) delete asked[field];
  }
  if (given.init) asked.init_image = given.init;
  if (given.mask) asked.mask = given.mask;
  if (given.control) asked.control_image = given.control;
  return asked;
}

/** The pictures of an order that was made before. */
export const picturesOf = (asked) => ({
  init: asked.init_image || null, mask: asked.mask || null, control: asked.control_image || null,
});

/** Shows the values beside the sliders. */
export function showSliders() {
  for (const id of ["strength", "control-scale"]) $(`${id}-shown`).textContent = $(id).value;
}

function offerControls() {
  const usable = controls.filter((each) => !each.problem);
  const kept = $("control-name").value;
  $("control-name").replaceChildren(...usable.map((each) => new Option(`${each.name} (${each.variant})`, each.name)));
  if (usable.some((each) => each.name === kept)) $("control-name").value = kept;
  $("control-none").hidden = usable.length > 0;
  $("control-drop").hidden = !usable.length || Boolean(given.control);
  $("control-problems").textContent = controls.filter((each) => each.problem).map((each) => each.problem).join("; ");
}

async function load() {
  const found = await attempt(() => get("/api/controls"));
  if (!found) return;
  controls = found;
  offerControls();
}

async function upload(name, file) {
  const got = await attempt(() => send("/api/uploads", file));
  if (got) await setPictures(name === "init" ? { init: got.id, mask: got.mask } : { [name]: got.id });
}

/** Begins the fields of pictures, with those that this tab had before a reload. kinds: of maps to follow. */
export async function beginSources(kinds) {
  $("control-kind").replaceChildren(...kinds.map((kind) => new Option(kind === "none" ? "none, it is a map" : kind, kind)));
  await load();
  for (const name of ["init", "control"]) {
    takesFiles($(`${name}-drop`), $(`${name}-file`), (files) => upload(name, files[0]));
    $(`${name}-clear`).addEventListener("click", () => setPictures({ [name]: null }));
  }
  $("mask-clear").addEventListener("click", () => setPictures({ mask: null }));
  $("mask-open").addEventListener("click", async () => {
    const blob = await paintMask($("init-picture").src, MASK_HELP);
    if (blob) await upload("mask", blob);
  });
  for (const id of ["strength", "control-scale"]) $(id).addEventListener("input", showSliders);
  await setPictures(JSON.parse(sessionStorage.getItem(KEY) || "{}"));
  offerControls();
  hear("view", (name) => name === "create" && load());
}
