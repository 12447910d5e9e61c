// A grid of pictures, the newest first. Two can be chosen to compare them.

import { get } from "./api.js";
import { hear, tell } from "./bus.js";
import { attempt, el } from "./dom.js";

const PAGE = 24;
const compared = []; // rows, at most two, of any grid

function compareChanged() {
  for (const button of document.querySelectorAll(".compare-open")) button.hidden = compared.length !== 2;
  for (const box of document.querySelectorAll("[data-compare]")) {
    box.checked = compared.some((row) => row.id === box.dataset.compare);
  }
}

function toggle(row, chosen) {
  const at = compared.findIndex((each) => each.id === row.id);
  if (at >= 0) compared.splice(at, 1);
  if (chosen) compared.push(row);
  if (compared.length > 2) compared.shift();
  compareChanged();
}

/** Begins the buttons that open two chosen pictures. */
export function beginCompare(open) {
  for (const button of document.querySelectorAll(".compare-open")) {
    button.addEventListener("click", () => compared.length === 2 && open(...compared));
  }
}

/** The pictures of one grid. */
export class Gallery {
  constructor(list, more, empty) {
    [this.list, this.more, this.empty] = [list, more, empty];
    [this.rows, this.search, this.asked] = [[], "", 0];
    more.addEventListener("click", () => this.older());
    hear("picture deleted", (id) => {
      this.rows = this.rows.filter((row) => row.id !== id);
      toggle({ id }, false);
      this.draw();
    });
  }

  /** The newest pictures. Those that are shown already stay. */
  async fresh() {
    const asked = (this.asked += 1);
    const found = await attempt(() => this.load(""));
    if (!found || asked !== this.asked) return;
    const oldest = found.at(-1)?.id || "";
    const kept = found.length < PAGE ? [] : this.rows.filter((row) => row.id < oldest);
    this.rows = [...found, ...kept];
    if (!kept.length) this.more.hidden = found.length < PAGE;
    this.draw();
  }

  async older() {
    const found = await attempt(() => this.load(this.rows.at(-1)?.id || ""));
    if (!found) return;
    this.rows.push(...found);
    this.more.hidden = found.length < PAGE;
    this.draw();
  }

  load(before) {
    return get(`/api/pictures?limit=${PAGE}&search=${encodeURIComponent(this.search)}&before=${before}`);
  }

  find(words) {
    [this.search, this.rows] = [words, []];
    return this.fresh();
  }

  draw() {
    const known = new Map([...this.list.children].map((item) => [item.dataset.id, item]));
    const items = this.rows.map((row) => known.get(row.id) || this.item(row));
    for (const item of known.values()) if (!items.includes(item)) item.remove();
    items.forEach((item, i) => {
      if (this.list.children[i] !== item) this.list.insertBefore(item, this.list.children[i] || null);
    });
    this.empty.hidden = this.rows.length > 0;
    compareChanged();
  }

  item(row) {
    const prompt = row.prompt || "without a prompt";
    const id = `${this.list.id}-${row.id}`;
    const item = el("li", {},
      el("button", { type: "button", className: "tile", "aria-label": `Open: ${prompt}`, title: prompt,
        onclick: () => tell("open picture", { row, rows: this.rows }) },
      el("img", { src: `/api/pictures/${row.id}/thumbnail`, alt: "", loading: "lazy" })),
      el("div", { className: "check" },
        el("input", { type: "checkbox", id, "data-compare": row.id, "aria-label": `Compare: ${prompt}`,
          onchange: (event) => toggle(row, event.target.checked) }),
        el("label", { htmlFor: id, textContent: "compare" })));
    item.dataset.id = row.id;
    return item;
  }
}
