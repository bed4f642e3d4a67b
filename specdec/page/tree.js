// One step's tree as SVG: the accepted path straight along the top, rejected guesses below it, and after the path the
// target's own token. A step is what viewer.js makes of the data.

const ROW = 30, GAP = 26, PAD = 8, HEIGHT = 22;
const measure = document.createElement("canvas").getContext("2d");

function visible(text) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return [...shown].length > 14 ? [...shown].slice(0, 13).join("") + "…" : shown || "∅";
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Nodes with a place each: the step's own, and one more for the target's own token.
function layOut(step, initials) {
  const nodes = step.tokens.map((text, i) => ({
    index: i, text, parent: step.parents[i], by: i && step.source[i], on: step.path.includes(i), children: [], depth: 0,
  }));
  const end = step.path.at(-1);
  if (step.own)
    nodes.push({ index: nodes.length, text: step.committed.at(-1), parent: end, by: 0, own: true, on: false, children: [] });
  for (const node of nodes.slice(1)) {
    node.depth = nodes[node.parent].depth + 1;
    nodes[node.parent].children.push(node);
  }
  let row = 0;
  const place = (node) => {
    node.children.sort((a, b) => (b.on || !!b.own) - (a.on || !!a.own) || a.index - b.index);
    node.row = row;
    node.children.forEach((child, i) => {
      if (i) row += 1;
      place(child);
    });
  };
  place(nodes[0]);
  measure.font = "13px " + getComputedStyle(document.documentElement).getPropertyValue("--mono");
  const widths = [];
  for (const node of nodes) {
    node.label = visible(node.text);
    node.initial = initials[node.by];
    node.width = measure.measureText(node.label).width + 2 * PAD + inset(node);
    widths[node.depth] = Math.max(widths[node.depth] ?? 0, node.width);
  }
  const left = [1];
  widths.forEach((width, depth) => (left[depth + 1] = left[depth] + width + GAP));
  for (const node of nodes) [node.x, node.y] = [left[node.depth], node.row * ROW + 2];
  return { nodes, width: left.at(-1) - GAP + 2, height: (row + 1) * ROW };
}

function edge(from, to) {
  const [x, y, u, v] = [from.x + from.width, from.y + HEIGHT / 2, to.x, to.y + HEIGHT / 2];
  const bend = to.x - GAP / 2;
  const kind = to.own ? "edge own" : to.on ? "edge on" : "edge";
  return svg("path", { class: kind, d: `M${x},${y}H${bend - 8}C${bend},${y} ${bend - 4},${v} ${bend + 4},${v}H${u}` });
}

function box(node, label) {
  const kind = [node.by && `by-${hue(node.by)}`, node.on && "on", node.own && "own"].filter(Boolean).join(" ");
  const parts = [svg("rect", { width: node.width, height: HEIGHT, rx: 5 })];
  if (node.by) parts.push(svg("text", { class: "initial", x: PAD - 2, y: 15 }, node.initial));
  parts.push(svg("text", { x: PAD + inset(node), y: 15.5 }, node.label));
  const place = `translate(${node.x},${node.y})`;
  return svg("g", { class: kind, transform: place, role: "img", tabindex: -1, "aria-label": label, "aria-describedby": "node" }, ...parts);
}

// Draws into `host`; calls `show(node)` for the node pointed at or focused.
function drawTree(host, step, names, show) {
  const { nodes, width, height } = layOut(step, initialsOf(names));
  const boxes = nodes.map((node) => box(node, describe(node, step, names)));
  boxes.forEach((element, i) => {
    element.addEventListener("focus", () => show(nodes[i]));
    element.addEventListener("pointerenter", () => show(nodes[i]));
    element.addEventListener("click", () => element.focus());
  });
  const shape = { width, height, viewBox: `0 0 ${width} ${height}` };
  host.replaceChildren(svg("svg", shape, ...nodes.slice(1).map((node) => edge(nodes[node.parent], node)), ...boxes));
  const order = nodes.map((_, i) => i).sort((a, b) => nodes[a].row - nodes[b].row || nodes[a].depth - nodes[b].depth);
  host.onkeydown = (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key], at = order.findIndex((i) => boxes[i] === document.activeElement);
    if (!by || at < 0) return;
    event.preventDefault();
    boxes[order[Math.min(Math.max(at + by, 0), order.length - 1)]].focus();
  };
  const end = nodes.at(-1).own ? nodes.at(-1) : nodes[step.path.at(-1)];
  boxes[end.index].setAttribute("tabindex", 0);
  host.scrollTo(end.x + end.width + 3 * PAD - host.clientWidth, 0); // to where the step was decided
  return nodes;
}

function describe(node, step, names) {
  const fate = node.own ? "the target's own" : !node.index ? "the last committed token" : node.on ? "accepted" : "rejected";
  const guessed = node.by ? `, guessed by ${names[node.by]} with probability ${step.probability[node.index]}` : "";
  return `${visible(node.text)}: ${fate}${guessed}`;
}

// The fewest first letters that tell each name from the others.
const initialsOf = (names) => names.map((name) => {
  const others = names.filter((other) => other !== name);
  let length = 1;
  while (length < name.length && others.some((other) => other.startsWith(name.slice(0, length)))) length += 1;
  return name.charAt(0).toUpperCase() + name.slice(1, length);
});
const inset = (node) => (node.by ? 5 + 7 * node.initial.length : 0);
const hue = (source) => ((source - 1) % 6) + 1;
