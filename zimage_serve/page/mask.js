// A brush for masks. White parts are the chosen ones, as in every mask of this project.

import { $, el } from "./dom.js";

const strokes = []; // of {points: [[x, y], ...], width, erase}; redrawn to undo
let [canvas, under, cursor, file] = [null, null, [0, 0], null];

function paint() {
  const draw = canvas.getContext("2d");
  draw.fillStyle = "#000";
  draw.fillRect(0, 0, canvas.width, canvas.height);
  draw.lineCap = draw.lineJoin = "round";
  for (const { points, width, erase } of strokes) {
    draw.strokeStyle = draw.fillStyle = erase ? "#000" : "#fff";
    draw.lineWidth = width;
    draw.beginPath();
    draw.moveTo(...points[0]);
    for (const point of points) draw.lineTo(...point);
    draw.stroke();
    draw.beginPath();
    draw.arc(...points[0], width / 2, 0, 2 * Math.PI);
    draw.fill();
  }
}

/** Shows the place of the brush that the keyboard moves. */
function mark() {
  paint();
  const draw = canvas.getContext("2d");
  draw.strokeStyle = "#f40";
  draw.lineWidth = Math.max(1, canvas.width / 200);
  draw.beginPath();
  draw.arc(...cursor, brush() / 2, 0, 2 * Math.PI);
  draw.stroke();
}

const brush = () => (Number($("brush").value) / 100) * Math.min(canvas.width, canvas.height);
const stroke = (point) => strokes.push({ points: [point], width: brush(), erase: $("erase").checked });

/** The pixel of the picture under the pointer. The canvas is fitted into its box. */
function place(event) {
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(box.width / canvas.width, box.height / canvas.height);
  const [left, top] = [(box.width - canvas.width * scale) / 2, (box.height - canvas.height * scale) / 2];
  return [(event.clientX - box.left - left) / scale, (event.clientY - box.top - top) / scale];
}

function byKey(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (moves[event.key]) {
    const by = brush() / 2;
    cursor = cursor.map((at, i) => Math.min(Math.max(at + moves[event.key][i] * by, 0), [canvas.width, canvas.height][i]));
  } else if (event.key === " ") stroke([...cursor]);
  else return;
  event.preventDefault();
  mark();
}

function listen() {
  let down = false;
  canvas.addEventListener("pointerdown", (event) => {
    down = true;
    canvas.setPointerCapture(event.pointerId);
    stroke(place(event));
    paint();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!down) return;
    strokes.at(-1).points.push(place(event));
    paint();
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (down = false));
  canvas.addEventListener("keydown", byKey);
  canvas.addEventListener("blur", paint);
  $("paint-undo").addEventListener("click", () => {
    strokes.pop();
    paint();
  });
  $("paint-clear").addEventListener("click", () => {
    strokes.length = 0;
    paint();
  });
  $("mask-file").addEventListener("change", () => {
    [file] = $("mask-file").files;
    $("mask-file").value = "";
    $("painter").close("done");
  });
  $("paint-done").addEventListener("click", () => $("painter").close("done"));
}

function made() {
  if (file) return Promise.resolve(file);
  if (!strokes.length) return Promise.resolve(null);
  paint();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Lets the user paint over the picture at `source`. Returns the mask as a blob; null if there is none.
 *
 * meaning: a sentence that says what white parts are for.
 */
export async function paintMask(source, meaning) {
  if (!canvas) {
    canvas = $("paint");
    listen();
  }
  under = el("img", { src: source });
  await under.decode();
  [canvas.width, canvas.height] = [under.naturalWidth, under.naturalHeight];
  $("paint-under").src = source;
  $("paint-meaning").textContent = meaning;
  cursor = [canvas.width / 2, canvas.height / 2];
  [strokes.length, file] = [0, null];
  paint();
  const dialog = $("painter");
  dialog.returnValue = "";
  dialog.showModal();
  canvas.focus();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "done" ? made() : null;
}
