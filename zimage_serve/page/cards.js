// A card for one file of the library: its facts, and what can be done with it.

import { ask, part } from "./api.js";
import { attempt, dangerous, el, facts, say } from "./dom.js";

const words = (name) => name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());

/** A value of the server's facts as text. */
export function text(value) {
  if (Array.isArray(value)) return value.map(text).join(", ");
  if (value !== null && typeof value === "object") return Object.entries(value).map(([k, v]) => `${k}: ${text(v)}`).join(", ");
  return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : value;
}

/** Names and values of `found` without those in `hidden`. */
export const pairsOf = (found, hidden) => Object.entries(found).filter(([name]) => !hidden.includes(name))
  .map(([name, value]) => [words(name), text(value)]);

/** A table with a head in a <table>. */
export function fillTable(table, head, rows) {
  table.replaceChildren(
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col", textContent: name })))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => el("td", { textContent: text(value) }))))));
}

function renaming(file, path, renew) {
  const input = el("input", { value: file.name.replace(/\.[^.]*$/, ""), "aria-label": `New name of ${file.name}`, maxLength: 88 });
  const form = el("form", { className: "row", hidden: true, onsubmit: async (event) => {
    event.preventDefault();
    const renamed = await attempt(() => ask("PATCH", path, { name: input.value.trim() }));
    if (renamed) say(`It is named ${renamed.name} now.`);
    renew();
  } }, input, el("button", { textContent: "Rename" }));
  const open = () => {
    form.hidden = !form.hidden;
    if (!form.hidden) input.select();
  };
  return [form, open];
}

/** A card. file: its facts; folder: of the interface; actions: [label, function] before the common ones; fixed: it stays as it is. */
export function card(file, folder, pairs, actions, renew, fixed = false) {
  const path = `${folder}/${part(file.name)}`;
  const [form, open] = renaming(file, path, renew);
  const button = (label, onclick, className = "") => el("button", {
    type: "button", className, textContent: label, "aria-label": `${label}: ${file.name}`, onclick,
  });
  const own = file.problem ? [] : actions.map(([label, action], i) => button(label, action, i ? "" : "primary"));
  const common = fixed ? [] : [button("Rename", open),
    el("a", { className: "button", href: `${path}/file`, textContent: "Download", "aria-label": `Download: ${file.name}` }),
    dangerous("Delete", async () => {
      await attempt(() => ask("DELETE", path));
      renew();
    })];
  return el("li", {}, el("h4", { textContent: fixed ? "The transformer of this server" : file.name }),
    file.problem ? el("p", { className: "problem", textContent: file.problem }) : facts(el("dl", { className: "facts" }), pairs),
    el("div", { className: "row" }, own, common), form);
}
