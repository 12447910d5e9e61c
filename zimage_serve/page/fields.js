// Form fields made of the server's own description of its options, so that the page has each of them.

import { get } from "./api.js";
import { el, plain } from "./dom.js";

let described = null;

/** The fields of the body of `POST path`: name -> JSON schema. */
export async function bodyOf(path) {
  described ??= get("/openapi.json");
  const found = (await described).paths[path].post.requestBody.content;
  return found["application/json"].schema.properties;
}

const words = (name) => name.replaceAll("_", " ");

/** A labelled input for one option. Empty stands for the default. */
export function field(prefix, name, schema) {
  const id = `${prefix}-${name}`;
  const common = { id, name, "aria-describedby": `${id}-help` };
  let input;
  if (schema.type === "boolean") input = el("input", { ...common, type: "checkbox", checked: schema.default === true });
  else if (schema.enum) {
    const none = schema.default === undefined ? [el("option", { value: "", textContent: "auto" })] : [];
    input = el("select", common, none, schema.enum.map((value) => el("option", { value, textContent: value })));
    if (schema.default !== undefined) input.value = schema.default;
  } else if (schema["x-lines"]) {
    input = el("textarea", { ...common, rows: 2, placeholder: "one in each line" });
  } else {
    const number = schema.type === "integer" || schema.type === "number";
    input = el("input", {
      ...common, type: number ? "number" : "text", step: number && (schema.type === "integer" ? "1" : "any"),
      placeholder: schema.default === undefined || schema.default === "" ? "auto" : String(schema.default),
    });
  }
  input.dataset.type = schema["x-lines"] ? "lines" : schema.type;
  return el("div", { className: "field" },
    el("label", { htmlFor: id, textContent: words(name) }), input,
    el("p", { id: `${id}-help`, className: "help", textContent: plain(schema.description) }));
}

/** The values of all named inputs in `form` that are not empty. Lists are written with commas, or in lines. */
export function values(form) {
  const found = {};
  for (const input of form.querySelectorAll("[name]")) {
    const type = input.dataset.type || "string";
    if (input.type === "checkbox") {
      found[input.name] = input.checked;
      continue;
    }
    const text = input.value.trim();
    if (text === "") continue;
    const list = text.split(/[,\n]/).map((each) => each.trim()).filter(Boolean);
    if (type === "integer" || type === "number") found[input.name] = Number(text);
    else if (type === "numbers") found[input.name] = list.map(Number);
    else if (type === "array") found[input.name] = list;
    else if (type === "lines") found[input.name] = text.split("\n").map((line) => line.trim()).filter(Boolean);
    else found[input.name] = text;
  }
  return found;
}

/** Writes `given` into the inputs of `form`. Other inputs keep what they have. */
export function fill(form, given) {
  for (const [name, value] of Object.entries(given)) {
    const input = form.querySelector(`[name="${CSS.escape(name)}"]`);
    if (!input || value === undefined) continue;
    if (input.type === "checkbox") input.checked = value === true;
    else if (Array.isArray(value)) input.value = value.join(input.dataset.type === "lines" ? "\n" : ", ");
    else input.value = value === null ? "" : String(value);
  }
}

/** Keeps what is written in `form` for this tab, so that it survives a reload. */
export function remember(form, key) {
  const save = () => {
    const kept = {};
    for (const input of form.querySelectorAll("[name]")) {
      kept[input.name] = input.type === "checkbox" ? input.checked : input.value;
    }
    sessionStorage.setItem(key, JSON.stringify(kept));
  };
  fill(form, JSON.parse(sessionStorage.getItem(key) || "{}"));
  form.addEventListener("input", save);
  form.addEventListener("change", save);
  return save;
}
