// The losses of a run as a drawing (SVG), with its numbers as text for those who do not see it.

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 220, 62, 24];

function shape(tag, attributes, text = "") {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

/** At most `most` points: the mean of each group of neighbours. */
function thinned(points, most = 300) {
  const size = Math.ceil(points.length / most);
  if (size < 2) return points;
  const found = [];
  for (let i = 0; i < points.length; i += size) {
    const group = points.slice(i, i + size);
    found.push([group.at(-1)[0], group.reduce((sum, [, y]) => sum + y, 0) / group.length]);
  }
  return found;
}

/** Draws lines into `svg`. series: [{name, points: [[step, loss], ...]}]; total: the last step of the axis. */
export function draw(svg, series, total) {
  const drawn = series.map((each) => ({ ...each, points: thinned(each.points.filter(([, y]) => y !== null)) }));
  const all = drawn.flatMap((each) => each.points.map(([, y]) => y));
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  if (!all.length) {
    svg.replaceChildren(shape("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no step yet"));
    return;
  }
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const span = high - low || 1;
  const x = (step) => LEFT + (step / Math.max(1, total)) * (WIDTH - LEFT - 10);
  const y = (loss) => 10 + ((high - loss) / span) * (HEIGHT - BOTTOM - 20);
  const parts = [0, 0.5, 1].flatMap((share) => {
    const level = low + share * span;
    return [
      shape("line", { x1: LEFT, x2: WIDTH - 10, y1: y(level), y2: y(level), class: "grid" }),
      shape("text", { x: LEFT - 6, y: y(level) + 4, "text-anchor": "end" }, level.toFixed(3)),
    ];
  });
  parts.push(shape("text", { x: WIDTH - 10, y: HEIGHT - 6, "text-anchor": "end" }, `step ${total}`));
  drawn.forEach((each, i) => {
    const path = each.points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    parts.push(shape("polyline", { points: path, class: `series-${i}` }));
  });
  svg.replaceChildren(...parts);
}
