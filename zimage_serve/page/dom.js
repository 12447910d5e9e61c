// Elements and messages. Data reaches the page as text only, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties or attributes, listeners (onclick, ...) and children: elements or texts. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

let silence = 0;

/** Shows a line for some seconds, and lets a screen reader say it. kind: "" or "bad". */
export function say(text, kind = "") {
  const place = $("said");
  place.textContent = text;
  place.className = `said ${kind}`;
  place.hidePopover(); // shown anew it is above dialogs that were opened since
  place.showPopover();
  clearTimeout(silence);
  silence = setTimeout(() => place.hidePopover(), kind ? 12000 : 5000);
}

/** Runs `work`, and says its error in one line. Returns undefined after an error. */
export async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    say(plain(error.message), "bad");
    return undefined;
  }
}

/** A button that asks once more before it does something that cannot be undone. */
export function dangerous(label, action) {
  const button = el("button", { type: "button", className: "danger", textContent: label });
  let armed = 0;
  const calm = () => {
    clearTimeout(armed);
    armed = 0;
    button.textContent = label;
  };
  button.addEventListener("click", () => {
    if (armed) {
      calm();
      action();
      return;
    }
    button.textContent = "Really delete?";
    armed = setTimeout(calm, 4000);
  });
  button.addEventListener("blur", calm);
  return button;
}

/** Rows of names and values as the children of a <dl>. */
export function facts(list, pairs) {
  const rows = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(...rows.flatMap(([name, value]) => [
    el("dt", { textContent: name }), el("dd", { textContent: String(value) }),
  ]));
  return list;
}

/** Gives files that are dropped on `zone` or chosen in `input` to `take`. */
export function takesFiles(zone, input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) take(files);
  });
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
  });
}

/** Calls `work` when no other call came for `ms` milliseconds. */
export function later(work, ms) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), ms);
  };
}

/** A message or help text of the server, with the names of options in words. */
export const plain = (text) => text.replace(/`(\w+)`/g, (_, name) => name.replaceAll("_", " "));

/** Bytes in words. */
export function bytes(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(1)} GB`;
  return number >= 1e6 ? `${(number / 1e6).toFixed(1)} MB` : `${Math.ceil(number / 1e3)} KB`;
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
