"use strict";
const SLIDERS = ["temperature", "min_p", "top_k", "top_p"];
// A slider's places for k; the last is off.
const K = [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100, 200, 500, 1000, 0];
const CUTS = {temperature: "greedy", min_p: "min-p", top_k: "top-k", top_p: "top-p"};
let context = Infinity;
// Tokens shown; how many of them were typed; ids with bos; the last answer.
let tokens = [], given = 0, ids = [], found = null;
// Whether the prompt was changed since it was read.
let unread = true;
let running = false, timer = 0, asking = null, pending = Promise.resolve();
// What was pressed, one after another, and how much of it is not done.
let presses = Promise.resolve(), waiting = 0;

function rules() {
  return {
    temperature: +$("temperature").value, min_p: +$("min_p").value,
    top_k: K[$("top_k").value], top_p: +$("top_p").value, seed: +$("seed").value,
  };
}

// One look at a time: a newer one drops the older one and its answer.
function look() {
  clearTimeout(timer);
  timer = 0;
  asking?.abort();
  const mine = asking = new AbortController();
  const typed = unread ? $("prompt").value : undefined;
  const full = !unread && ids.length >= context;
  pending = (async () => {
    try {
      const prompt = typed ?? ids;
      const [next, score] = await Promise.all([
        full ? null : answer("next_token", {prompt, candidates: 20, ...rules()}, mine.signal),
        typed === undefined ? null : answer("score", {input: typed}, mine.signal),
      ]);
      if (mine !== asking) return;
      if (score) {
        unread = false;
        ids = next.prompt_ids;
        tokens = score.tokens.map((name, i) => ({
          name, bytes: score.bytes[i], rank: score.ranks[i],
          bits: -score.log_probabilities[i] / Math.LN2,
        }));
        given = tokens.length;
      }
      found = next;
      say(full ? `The context of ${context} tokens is full.` : "");
    } catch (error) {
      if (mine !== asking) return;
      found = null;
      halt();
      say(error.message);
    }
    draw();
  })();
  watch(pending, () => mine === asking);
  return pending;
}

// Runs `act` once all that was pressed before is done, and the newest look with
// what was moved or typed a moment ago.
function press(act) {
  waiting++;
  return presses = presses.then(async () => {
    if (timer) look();
    for (let last; last !== pending;) await (last = pending);
    await act();
  }).finally(() => waiting--);
}

function later(wait) {
  clearTimeout(timer);
  timer = setTimeout(look, wait);
}

function reread(wait) {
  halt();
  unread = true;
  later(wait);
}

function halt() {
  running = false;
  $("run").firstChild.data = "Run";
  $("run").ariaPressed = "false";
}

function take(candidate) {
  tokens.push({
    name: candidate.token, bytes: candidate.bytes, rank: candidate.rank,
    bits: -Math.log2(candidate.probability),
  });
  ids = [...ids, candidate.id];
  if (candidate.ends) halt();
  return look();
}

const step = () => press(() => found && take(found.chosen));

async function run() {
  if (running) return halt();
  running = true;
  $("run").firstChild.data = "Stop";
  $("run").ariaPressed = "true";
  while (running) {
    await step();
    if (!found) halt();
    // Time to see the bars.
    await new Promise(done => setTimeout(done, 60));
  }
}

function undo() {
  halt();
  return press(() => {
    if (tokens.length === given) return;
    tokens.pop();
    ids = ids.slice(0, -1);
    return look();
  });
}

const clear = () => reread(0);

function drawText() {
  const panel = $("text"), decoder = new TextDecoder();
  panel.replaceChildren();
  tokens.forEach((token, i) => {
    let text = decoder.decode(new Uint8Array(token.bytes), {stream: true});
    const kind = i < given ? "given" : "own";
    const span = element("span", panel, `heat ${kind}`);
    if (!token.bytes.length) [text] = [token.name, span.classList.add("special")];
    if (!text) span.classList.add("part");
    span.textContent = text.replace(/\n/g, "\u21b5\n");
    span.style.setProperty("--heat", Math.min(1, token.bits / HOTTEST));
    span.onpointerenter = () => tell(token, kind);
  });
  panel.scrollTop = panel.scrollHeight;
  tell();
  const bits = tokens.reduce((sum, token) => sum + token.bits, 0);
  $("sum").textContent = `${tokens.length} tokens, ${bits.toFixed(1)} bits in all`;
}

// The numbers of one token; without one, what the colours mean.
function tell(token, kind) {
  $("about").textContent = token ? "" :
    "The redder a token, the less the model expected it. Point at one to see its numbers.";
  if (!token) return;
  element("b", $("about"), "", visible({...token, token: token.name}));
  $("about").append(
    `  ${kind === "given" ? "of the prompt" : "taken"}: the model gave it ` +
    `${percent(2 ** -token.bits)}, which is ${token.bits.toFixed(2)} bits of surprisal, ` +
    `and rank ${token.rank}`);
}

function drawBars() {
  const list = $("bars"), focused = [...list.children].findIndex(
    row => row.contains(document.activeElement));
  list.replaceChildren();
  $("rest").hidden = !found;
  const equal = found && (2 ** found.entropy).toFixed(found.entropy < 3 ? 1 : 0);
  $("entropy").textContent = found ? `entropy ${found.entropy.toFixed(2)} bits, ` +
    `like ${equal} equal choices` : "";
  if (!found) return;
  const {candidates, chosen} = found, shown = ids;
  const below = candidates.every(c => c.id !== chosen.id);
  const rows = below ? [...candidates, chosen] : candidates;
  const after = c => Object.values(c.stages).at(-1);
  const most = Math.max(...rows.map(c => Math.max(c.probability, after(c))));
  for (const c of rows) {
    const drawn = c.id === chosen.id;
    const cut = after(c) === 0 && Object.keys(CUTS).find(name => c.stages[name] === 0);
    const row = element("button", element("li", list), drawn ? "drawn" : cut ? "cut" : "");
    const note = drawn ? "\u25c0 drawn" : cut ? `cut by ${CUTS[cut]}` : "";
    element("span", row, "rank", c.rank);
    element("span", row, "token" + (c.bytes.length ? "" : " special"), visible(c));
    const track = element("span", row, "track");
    element("i", track, "raw").style.width = `${100 * c.probability / most}%`;
    element("i", track, "kept").style.width = `${100 * after(c) / most}%`;
    element("span", row, "share", percent(c.probability));
    element("span", row, "share after", percent(after(c)));
    element("span", row, "note", note);
    row.ariaLabel = `Take ${visible(c)}, rank ${c.rank}: the model says ` +
      `${percent(c.probability)}, after the rules ${percent(after(c))}` +
      (drawn ? ", drawn by the seed" : cut ? `, ${note}` : "");
    row.onclick = () => { halt(); press(() => shown === ids && take(c)); };
  }
  const left = f => Math.max(0, 1 - rows.reduce((sum, c) => sum + f(c), 0));
  const shares = [left(c => c.probability), left(after)].map(x => x < 1e-5 ? 0 : x);
  $("rest").querySelectorAll(".share").forEach((share, i) => {
    share.textContent = percent(shares[i]);
  });
  if (focused >= 0) list.children[Math.min(focused, rows.length - 1)].firstChild.focus();
}

function draw() {
  drawText();
  drawBars();
  $("step").disabled = $("run").disabled = !found;
  $("undo").disabled = $("clear").disabled = tokens.length === given;
}

function show() {
  const {temperature, min_p, top_k, top_p} = rules();
  const texts = [
    temperature ? temperature.toFixed(2) : "0, greedy", min_p ? min_p.toFixed(2) : "off",
    top_k || "off", top_p < 1 ? top_p.toFixed(2) : "off",
  ];
  SLIDERS.forEach((id, i) => {
    document.querySelector(`output[for=${id}]`).textContent = texts[i];
    $(id).setAttribute("aria-valuetext", texts[i]);
  });
}

async function start() {
  say("");
  let wrong;
  // Before the first look: the line it fills moves what is below it.
  try {
    const {data: [card]} = await answer("models");
    context = card.context_length;
    $("model").textContent = `${card.id}, context of ${context} tokens`;
    $("other").hidden = !card.chat;
  } catch (error) { wrong = error.message; }
  await look();
  if (wrong) say(wrong);
}

for (const id of [...SLIDERS, "seed"]) $(id).oninput = () => { show(); later(60); };
$("prompt").oninput = () => reread(250);
$("step").onclick = step;
$("run").onclick = run;
$("undo").onclick = undo;
$("clear").onclick = clear;
$("dice").onclick = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; later(0); };
$("reset").onclick = () => {
  for (const id of SLIDERS) $(id).value = $(id).defaultValue;
  show();
  later(0);
};
document.onkeydown = event => {
  const field = event.target.closest("input, textarea");
  if (field && event.key === "Escape") field.blur();
  if (field || event.ctrlKey || event.altKey || event.metaKey) return;
  const rows = [...document.querySelectorAll("#bars button")];
  const here = rows.indexOf(document.activeElement);
  const act = {
    ArrowRight: step, ArrowLeft: undo, r: run, R: run, c: clear, C: clear,
    // Within the text the arrows scroll.
    ArrowDown: document.activeElement !== $("text") && (() => rows[here + 1]?.focus()),
    ArrowUp: here >= 0 && (() => rows[here - 1]?.focus()),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  // A key that is held down goes as fast as the model, and no further.
  if (!event.repeat || !waiting) act();
};
show();
start();
