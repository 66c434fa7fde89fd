"use strict";
const RULES = ["temperature", "min_p", "top_p"];
// {role, content}; an answer also has its tokens, with their alternatives.
let messages = [];
// Of the answer that is being drawn, or null.
let running = null, chosen = null;

function rules() {
  const fields = RULES.map(name => [name, +$(name).value]);
  return {...Object.fromEntries(fields), seed: +$("seed").value};
}

// Draws an answer to all that was said.
async function reply() {
  const mine = running = new AbortController();
  const answered = {role: "assistant", content: "", tokens: []};
  const said = messages.map(({role, content}) => ({role, content}));
  messages.push(answered);
  say("");
  draw();
  const view = $("log").lastElementChild.querySelector(".said");
  const decoder = new TextDecoder();
  const first = {};
  watch(new Promise(done => { first.done = done; }), () => running === mine);
  try {
    const body = {messages: said, logprobs: true, top_logprobs: 20, ...rules()};
    for await (const part of stream("chat/completions", body, mine.signal)) {
      const [choice] = part.choices;
      answered.content += choice.delta.content ?? "";
      for (const token of choice.logprobs?.content ?? []) {
        first.done();
        answered.tokens.push(token);
        show(view, token, decoder);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
  first.done();
  if (running !== mine) return;
  running = null;
  // Nothing was said: the question can be asked again.
  if (!answered.tokens.length) messages.pop();
  draw();
}

function send() {
  const content = $("message").value;
  if (running || !content.trim()) return;
  messages.push({role: "user", content});
  $("message").value = "";
  reply();
}

function stop() { running?.abort(); }

function regenerate() {
  if (running || !messages.length) return;
  if (messages.at(-1).role === "assistant") {
    messages.pop();
    $("seed").value = (+$("seed").value + 1) % 2 ** 32;
  }
  reply();
}

function restart() {
  const before = running;
  running = null;
  before?.abort();
  messages = [];
  say("");
  draw();
  tell();
  $("message").focus();
}

// One token of an answer, coloured by its surprisal.
function show(view, token, decoder) {
  const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 40;
  const span = element("span", view, "heat own");
  const bytes = token.bytes ?? [];
  span.textContent = bytes.length ?
    decoder.decode(new Uint8Array(bytes), {stream: true}) : token.token;
  if (!bytes.length) span.classList.add("special");
  if (!span.textContent) span.classList.add("part");
  span.style.setProperty("--heat", Math.min(1, -token.logprob / Math.LN2 / HOTTEST));
  span.onclick = () => choose(span);
  span.token = token;
  if (near) $("log").scrollTop = $("log").scrollHeight;
}

function choose(span) {
  chosen?.classList.remove("on");
  chosen = span;
  span.classList.add("on");
  span.scrollIntoView({block: "nearest"});
  tell(span.token);
}

// The distribution from which a token was drawn.
function tell(token) {
  $("bars").replaceChildren();
  $("about").textContent = token ? "" : "Press a token of an answer.";
  if (!token) return;
  const named = one => visible({token: one.token, bytes: one.bytes ?? []});
  element("b", $("about"), "", named(token));
  $("about").append(`  had ${percent(Math.exp(token.logprob))}, ` +
    `${(-token.logprob / Math.LN2).toFixed(2)} bits of surprisal, before the rules`);
  const same = one => one.token === token.token && one.logprob === token.logprob;
  const all = token.top_logprobs, rows = all.some(same) ? all : [...all, token];
  const most = Math.exp(rows[0].logprob);
  rows.forEach((one, i) => {
    const row = element("li", $("bars"), same(one) ? "drawn" : "");
    element("span", row, "rank", i < all.length ? i + 1 : "");
    element("span", row, "token" + (one.bytes?.length ? "" : " special"), named(one));
    const share = Math.exp(one.logprob);
    element("i", element("span", row, "track"), "raw").style.width = `${100 * share / most}%`;
    element("span", row, "share", percent(share));
    element("span", row, "note", same(one) ? "\u25c0 drawn" : "");
  });
}

function draw() {
  const log = $("log");
  log.replaceChildren();
  for (const message of messages) {
    const view = element("article", log, `message ${message.role}`);
    element("h3", view, "soft", message.role);
    const said = element("div", view, "said", message.tokens ? "" : message.content);
    const decoder = new TextDecoder();
    for (const token of message.tokens ?? []) show(said, token, decoder);
  }
  log.scrollTop = log.scrollHeight;
  $("send").disabled = !!running;
  $("stop").disabled = !running;
  $("again").disabled = !!running || !messages.length;
  $("new").disabled = !messages.length;
  $("again").textContent = messages.at(-1)?.role === "user" ? "Try again" : "Regenerate";
}

function label() {
  const {temperature, min_p, top_p} = rules();
  const texts = [temperature ? temperature.toFixed(2) : "0, greedy",
    min_p ? min_p.toFixed(2) : "off", top_p < 1 ? top_p.toFixed(2) : "off"];
  RULES.forEach((id, i) => {
    document.querySelector(`output[for=${id}]`).textContent = texts[i];
    $(id).setAttribute("aria-valuetext", texts[i]);
  });
}

async function start() {
  say("");
  try {
    const {data: [card]} = await answer("models");
    $("model").textContent = `${card.id}, context of ${card.context_length} tokens`;
    if (card.chat) return;
    $("send").disabled = true;
    say("This checkpoint has no chat template: it can continue texts, not hold a conversation.");
  } catch (error) { say(error.message); }
}

for (const id of RULES) $(id).oninput = label;
$("form").onsubmit = event => { event.preventDefault(); send(); };
$("stop").onclick = stop;
$("again").onclick = regenerate;
$("new").onclick = restart;
document.onkeydown = event => {
  if (event.key === "Escape") return stop();
  if (event.target === $("message") && event.key === "Enter" && !event.shiftKey &&
      !event.isComposing) {
    event.preventDefault();
    if (!$("send").disabled) send();
  }
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (event.target !== $("log") || !step) return;
  const spans = [...document.querySelectorAll("#log .own")];
  const next = spans[chosen ? spans.indexOf(chosen) + step : 0];
  event.preventDefault();
  if (next) choose(next);
};
label();
start();
