"use strict";
// What the pages share.
const $ = id => document.getElementById(id);
const HOTTEST = +getComputedStyle(document.documentElement).getPropertyValue("--hot-bits");

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("api_key");
  const headers = key ? {Authorization: `Bearer ${key}`} : {};
  if (body) headers["Content-Type"] = "application/json";
  const found = await fetch(`v1/${path}`, {
    method: body ? "POST" : "GET", headers, signal,
    body: body && JSON.stringify(body),
  });
  if (found.ok) return found;
  if (found.status === 401 && $("access").hidden) {
    $("access").hidden = false;
    $("api_key").focus();
  }
  throw new Error((await found.json()).error.message);
}

const answer = async (...call) => (await ask(...call)).json();

// The parts of an answer that is streamed.
async function* stream(path, body, signal) {
  const found = await ask(path, {...body, stream: true}, signal);
  const reader = found.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const text = event.replace(/^data: /, "");
      if (text === "[DONE]") return;
      const part = JSON.parse(text);
      if (part.error) throw new Error(part.error.message);
      yield part;
    }
  }
}

// While `done` is waited for longer than a moment, and is `current`, says why.
async function watch(done, current) {
  const wait = time => Promise.race([done, new Promise(end => setTimeout(end, time))]);
  let over = false;
  done.finally(() => { over = true; });
  for (await wait(300); !over; await wait(400)) {
    const health = await fetch("health").then(found => found.json()).catch(() => ({}));
    if (over || !current()) break;
    $("busy").hidden = false;
    $("busy").textContent = health.status === "warming up" ?
      "The server is warming up: it compiles its programs." : health.compiling ?
      "Compiling, once for texts of this length." : "Waiting for the model.";
  }
  if (current()) $("busy").hidden = true;
}

function say(text) {
  $("alert").hidden = !text;
  $("alert").textContent = text;
}

// What a token spells, made visible on one line.
function visible(candidate) {
  if (!candidate.bytes.length) return candidate.token;
  return candidate.token.replace(/ /g, "\u2423").replace(/\n/g, "\u23ce")
    .replace(/\t/g, "\u21e5").replace(/^bytes:/, "")
    .replace(/[\0-\x1f\x7f-\x9f]/g, c => "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0"));
}

const percent = share => share === 0 ? "0 %" : share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;

function element(name, parent, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

$("hottest").textContent = HOTTEST;
$("access").onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem("api_key", $("api_key").value);
  $("access").hidden = true;
  start();
};
