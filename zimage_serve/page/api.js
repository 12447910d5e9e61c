// Requests to this server. Each tab is a client of its own, so that tabs take turns.

import { $ } from "./dom.js";
import { tell } from "./bus.js";

function tabName() {
  let name = sessionStorage.getItem("client");
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("client", name);
  }
  return `page ${name}`;
}

const CLIENT = tabName();

/** The server refused a request, and said why. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server does not answer. */
export class Unreachable extends Error {}

let asking = null;

/** Asks for the API key until it is right. Requests that come meanwhile wait for the same answer. */
function login() {
  asking ??= new Promise((resolve) => {
    const dialog = $("login");
    const form = dialog.querySelector("form");
    const problem = $("login-problem");
    const refuse = (event) => event.preventDefault();
    dialog.addEventListener("cancel", refuse);
    form.onsubmit = async (event) => {
      event.preventDefault();
      const answer = await fetch("/login", {
        method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ key: $("key").value }),
      });
      if (!answer.ok) {
        problem.textContent = "This is not the API key.";
        $("key").focus();
        return;
      }
      problem.textContent = $("key").value = "";
      dialog.removeEventListener("cancel", refuse);
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

/** The answer of the server as JSON; null if it is empty. body: an object, or FormData. */
export async function ask(method, path, body = undefined) {
  const headers = { "x-client": CLIENT };
  let sent = body;
  if (body !== undefined && !(body instanceof FormData)) {
    headers["content-type"] = "application/json";
    sent = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: sent });
  } catch {
    tell("unreachable");
    throw new Unreachable("The server does not answer. The page tries again by itself.");
  }
  if (answer.status === 401) {
    await login();
    return ask(method, path, body);
  }
  const text = await answer.text();
  if (answer.ok) {
    tell("reached");
    return text ? JSON.parse(text) : null;
  }
  let message = `The server answered ${answer.status}.`;
  try {
    message = JSON.parse(text).detail || message;
  } catch {
    // an answer of a proxy, which is not JSON
  }
  if (answer.status === 429) message += ` Try again in ${answer.headers.get("retry-after")} s.`;
  throw new Refused(answer.status, message);
}

export const get = (path) => ask("GET", path);

/** Sends one file with other fields of a form. */
export function send(path, file, fields = {}, method = "POST") {
  const form = new FormData();
  form.append("file", file, file.name || "picture.png");
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return ask(method, path, form);
}

/** One part of a path, so that no name can change the path. */
export const part = (name) => encodeURIComponent(name);

/** Follows events until one of `ends`. Returns a function that stops. The browser connects again by itself. */
export function follow(path, kinds, ends, listener) {
  const source = new EventSource(path);
  for (const kind of [...kinds, ...ends]) {
    source.addEventListener(kind, (event) => {
      if (ends.includes(kind)) source.close();
      listener(kind, JSON.parse(event.data));
    });
  }
  return () => source.close();
}
