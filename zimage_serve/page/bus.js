// News between the parts of the page, so that no part needs to know another.

const target = new EventTarget();

/** Tells every listener of `name`. */
export function tell(name, detail = null) {
  target.dispatchEvent(new CustomEvent(name, { detail }));
}

/** Calls `listener` with the detail of each news of this name. */
export function hear(name, listener) {
  target.addEventListener(name, (event) => listener(event.detail));
}
