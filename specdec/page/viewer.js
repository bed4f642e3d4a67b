// The viewer: which step of which sequence is shown, and everything that shows it.

const KEYS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
const BLOCK = 200; // tokens in a block of text, at least; the browser lays out blocks as they come into sight
const percent = (share) => `${(100 * share).toFixed(share && share < 0.1 ? 1 : 0)}%`;

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// A step with texts and shares in place of the data's numbers.
function readStep({ texts, steps }, at) {
  const [tokens, parents, probability, source, path, committed, guessedBy, wanted, share, micros, prompt] = steps[at];
  const spell = (list) => list.map((i) => texts[i]);
  const candidates = wanted.map((list, node) => list.map((i, rank) => [texts[i], share[node][rank] / 1e4]));
  const own = committed.length >= path.length && !guessedBy.at(-1);
  return {
    tokens: spell(tokens), parents, probability: probability.map((p) => p / 1e4), source, path,
    committed: spell(committed), guessedBy, candidates, own, milliseconds: micros.map((us) => us / 1e3), prompt: !!prompt,
  };
}

function startViewer(sequences) {
  let sequence, tokens, firstToken, at = 0;

  async function choose(number) {
    sequence = await inflate(sequences[number].data);
    byId("made").textContent = sequences[number].made;
    byId("prompt").textContent = sequences[number].prompt;
    byId("slider").max = sequence.steps.length - 1;
    writeText();
    writeLegend();
    drawStrip();
    at = 0;
    go(Math.max(sequence.steps.findIndex((step) => step[0].length > 1), 0));
    byId("viewer").dataset.ready = number;
  }

  function writeText() {
    const blocks = [make("div")];
    [tokens, firstToken] = [[], []];
    sequence.steps.forEach((step, number) => {
      firstToken.push(tokens.length);
      step[5].forEach((word, i) => {
        const text = sequence.texts[word], by = step[6][i];
        const token = make("span", { className: by ? `token by by-${hue(by)}` : "token", textContent: text });
        token.dataset.step = number;
        tokens.push(token);
        blocks.at(-1).append(token);
        if (text.endsWith("\n") && blocks.at(-1).childElementCount >= BLOCK) blocks.push(make("div"));
      });
    });
    firstToken.push(tokens.length);
    byId("text").replaceChildren(...blocks);
  }

  function writeLegend() {
    const shares = sequence.sources.map(() => 0);
    for (const step of sequence.steps) for (const by of step[6]) shares[by] += 1;
    const initials = initialsOf(sequence.sources);
    const entry = (name, by) => {
      const sample = by ? `${initials[by]} ${name}` : "the target itself";
      return make("li", {}, make("span", { className: by ? `by by-${hue(by)}` : "", textContent: sample }), ` ${percent(shares[by] / tokens.length)}`);
    };
    byId("legend").replaceChildren(...sequence.sources.map(entry));
  }

  // Guessed and accepted tokens of each step, along the slider; in long sequences the mean of several.
  function drawStrip() {
    const steps = sequence.steps, bins = Math.min(steps.length, 600);
    const heights = (size) => Array.from({ length: bins }, (_, i) => {
      const [from, to] = [Math.floor((i * steps.length) / bins), Math.floor(((i + 1) * steps.length) / bins)];
      const part = steps.slice(from, Math.max(to, from + 1));
      return part.reduce((sum, step) => sum + size(step), 0) / part.length;
    });
    const accepted = heights((step) => step[4].length - 1), drafted = heights((step) => step[0].length - 1);
    const top = Math.max(...accepted, 4);
    const area = (list) => list.map((h, i) => `M${i},${top}v${-Math.min(h, top)}h0.85v${Math.min(h, top)}z`).join("");
    byId("strip").setAttribute("viewBox", `0 0 ${bins} ${top}`);
    byId("strip").querySelector(".drafted").setAttribute("d", area(drafted));
    byId("strip").querySelector(".accepted").setAttribute("d", area(accepted));
  }

  function go(to) {
    const last = sequence.steps.length - 1;
    mark(at, false);
    at = Math.min(Math.max(to, 0), last);
    mark(at, true);
    const step = readStep(sequence, at);
    byId("slider").value = at;
    byId("slider").setAttribute("aria-valuetext", `step ${at} of ${last}`);
    byId("says").textContent = `Step ${at} of ${last}: ${sentence(step)}`;
    for (const [id, off] of [["first", !at], ["back", !at], ["next", at === last], ["last", at === last]]) byId(id).disabled = off;
    const nodes = drawTree(byId("tree"), step, sequence.sources, (node) => showNode(step, node));
    showNode(step, nodes[step.path.at(-1)]);
    showMeasures(step);
  }

  function mark(number, on) {
    const group = tokens.slice(firstToken[number], firstToken[number + 1]);
    for (const token of group) token.classList.toggle("now", on);
    if (on && group.length) reveal(group[0]);
  }

  // Scrolls the text alone, never the page. Blocks get their true heights only when they come into sight, which may
  // move the token away again: so look once more after each scroll.
  function reveal(token, tries = 5) {
    const text = byId("text"), [inner, outer] = [token.getBoundingClientRect(), text.getBoundingClientRect()];
    if (!tries || (inner.top >= outer.top + 20 && inner.bottom <= outer.bottom - 40)) return;
    text.scrollTop += inner.top - outer.top - text.clientHeight / 3;
    requestAnimationFrame(() => reveal(token, tries - 1));
  }

  function sentence(step) {
    const quoted = step.committed.map((text) => `“${visible(text)}”`);
    if (step.prompt) return `the prompt's own pass; its first token is ${quoted.join(" ")}.`;
    const guesses = step.tokens.length - 1, accepted = step.path.length - 1;
    const judged = guesses ? `${guesses} guessed, ${accepted} accepted` : "nothing guessed";
    if (!step.own) return `${judged}. Committed ${quoted.join(" ")}.`;
    const kept = accepted ? `Kept ${quoted.slice(0, -1).join(" ")}; then the` : "The";
    return `${judged}. ${kept} target itself chose ${quoted.at(-1)}.`;
  }

  function showNode(step, node) {
    const candidates = step.candidates[node.own ? node.parent : node.index] ?? [];
    const next = step.path.indexOf(node.own ? node.parent : node.index);
    const chosen = next >= 0 ? step.committed[next] : null;
    const head = make("h4", { textContent: describe(node, step, sequence.sources) });
    const after = node.own ? "before it" : `after “${visible(node.text)}”`;
    const list = candidates.map(([text, share]) => {
      const bar = make("span", { className: "bar-of" });
      bar.style.width = percent(share);
      const row = make("li", { className: text === chosen ? "chosen" : "" }, make("code", { textContent: visible(text) + (text === chosen ? " ✓" : "") }));
      row.append(make("span", { className: "share", textContent: percent(share) }), bar);
      return row;
    });
    const lead = list.length ? `What the target wanted ${after}:` : "The trace has no probabilities of the target here.";
    byId("node").replaceChildren(head, make("span", { className: "fine", textContent: lead }), make("ol", {}, ...list));
  }

  function showMeasures(step) {
    const sum = step.milliseconds.reduce((a, b) => a + b, 0);
    const [draft, verify, walk, cache, all] = [...step.milliseconds, sum].map((ms) => `${ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0)} ms`);
    const figures = { drafted: step.tokens.length - 1, accepted: step.path.length - 1, committed: step.committed.length, "whole step": all, draft, verify, walk, cache };
    const pairs = Object.entries(figures).map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
    byId("measures").replaceChildren(...pairs);
  }

  function onKey(event) {
    const focus = document.activeElement, viewer = byId("viewer"), { top, bottom } = viewer.getBoundingClientRect();
    const ours = viewer.contains(focus) || (focus === document.body && top < innerHeight && bottom > 0);
    if (!ours || event.ctrlKey || event.metaKey || event.altKey || focus.matches("select, summary, .prose")) return;
    if (event.key === "?") byId("keys").showModal();
    else if (event.key in KEYS) go(at + KEYS[event.key]);
    else return;
    event.preventDefault();
  }

  sequences.forEach(({ label, row, rows }, i) => byId("generation").append(new Option(rows > 1 ? `${label}, row ${row}` : label, i)));
  byId("generation").addEventListener("change", (event) => choose(+event.target.value));
  byId("slider").addEventListener("input", (event) => go(+event.target.value));
  byId("text").addEventListener("click", (event) => event.target.dataset.step && go(+event.target.dataset.step));
  byId("first").addEventListener("click", () => go(0));
  byId("back").addEventListener("click", () => go(at - 1));
  byId("next").addEventListener("click", () => go(at + 1));
  byId("last").addEventListener("click", () => go(Infinity));
  byId("help").addEventListener("click", () => byId("keys").showModal());
  document.addEventListener("keydown", onKey);
  choose(0);
}

if (byId("sequences")) startViewer(JSON.parse(byId("sequences").textContent));
