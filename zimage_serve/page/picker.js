// The LoRAs of a picture: chosen by name, each with its scale and its trigger words.

import { get } from "./api.js";
import { hear } from "./bus.js";
import { $, attempt, el } from "./dom.js";

const KEY = "loras";

/** Begins the list. changed: is called after each change. Returns functions to read and write it. */
export function beginPicker(changed) {
  let known = [];
  let picked = JSON.parse(sessionStorage.getItem(KEY) || "[]");

  function insert(words) {
    const prompt = $("prompt");
    const [before, after] = [prompt.value.slice(0, prompt.selectionEnd), prompt.value.slice(prompt.selectionEnd)];
    prompt.value = [before.trim(), words, after.trim()].filter(Boolean).join(" ");
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
    prompt.focus();
  }

  function row(entry) {
    const trigger = known.find((each) => each.name === entry.name)?.trigger;
    const shown = el("output", { textContent: entry.scale.toFixed(2) });
    const range = el("input", {
      type: "range", min: "-1", max: "2", step: "0.05", value: String(entry.scale), "aria-label": `Scale of ${entry.name}`,
      oninput: () => {
        entry.scale = Number(range.value);
        shown.textContent = entry.scale.toFixed(2);
        save();
      },
    });
    const remove = () => {
      picked = picked.filter((each) => each !== entry);
      draw();
      $("lora").focus();
    };
    return el("li", { className: "picked" },
      el("div", { className: "row" }, el("span", { className: "name", textContent: entry.name }), shown,
        trigger && el("button", { type: "button", textContent: `Insert "${trigger}"`, onclick: () => insert(trigger) }),
        el("button", { type: "button", textContent: "Remove", "aria-label": `Remove ${entry.name}`, onclick: remove })),
      range);
  }

  function save() {
    sessionStorage.setItem(KEY, JSON.stringify(picked));
    changed();
  }

  function draw() {
    $("picked").replaceChildren(...picked.map(row));
    const free = known.filter((lora) => !lora.problem && !picked.some((each) => each.name === lora.name));
    $("lora").replaceChildren(...free.map((lora) => new Option(lora.name)));
    $("lora").disabled = $("lora-add").disabled = free.length === 0;
    if (!free.length) $("lora").append(new Option(known.length ? "all are in use" : "none yet"));
    save();
  }

  function choose(loras) {
    const named = loras.map((each) => (typeof each === "string" ? { name: each } : each));
    picked = named.map(({ name, scale }) => ({
      name: name.endsWith(".safetensors") ? name : `${name}.safetensors`, scale: Number(scale ?? 1),
    }));
    draw();
  }

  async function load() {
    const found = await attempt(() => get("/api/loras"));
    if (!found) return;
    known = found;
    picked = picked.filter((entry) => known.some((each) => each.name === entry.name));
    draw();
  }

  $("lora-add").addEventListener("click", () => {
    picked.push({ name: $("lora").value, scale: 1 });
    draw();
  });
  hear("loras", (found) => {
    known = found;
    draw();
  });
  hear("view", (name) => name === "create" && load());
  return { choose, insert, chosen: () => picked.map(({ name, scale }) => ({ name, scale })) };
}
