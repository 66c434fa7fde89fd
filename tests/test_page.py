"""The page at /, in a real Chromium without a window."""

import json
import re
import time
import urllib.parse

import httpx
import pytest
import serving
from playwright import sync_api

from lm.explain import heat
from lm.sample import request as request_lib

pytestmark = pytest.mark.slow
expect = sync_api.expect
Request = request_lib.Request


@pytest.fixture(scope="module")
def browser():
  with serving.chromium() as browser:
    yield browser


@pytest.fixture(scope="module")
def sampler():
  return serving.sampler_of()


@pytest.fixture(scope="module")
def tiny(sampler):
  with serving.serve(sampler) as running:
    yield running


@pytest.fixture
def page(browser, tiny):
  """The page, once it shows its first distribution; nothing may go wrong in
  it, and nothing be loaded from elsewhere.
  """
  page = browser.new_page()
  wrong = []
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.on("console", lambda message: wrong.append(message.text))
  page.on("request", lambda request: page_requests.append(request.url))
  page_requests = []
  page.goto(tiny.url)
  expect(rows(page).nth(19)).to_be_visible()
  yield page
  page.close()
  hosts = {urllib.parse.urlsplit(url).netloc for url in page_requests}
  assert hosts - {""} == {urllib.parse.urlsplit(tiny.url).netloc}
  # Chromium itself writes down every answer from 400 on.
  assert [text for text in wrong if "status of 400" not in text] == []


def rows(page):
  return page.locator("#bars button")


def type_prompt(page, text):
  with page.expect_response("**/v1/score"):
    page.get_by_label("Prompt").fill(text)


def slide(page, name, *values):
  """Moves a slider from value to value, without a pause."""
  page.evaluate(
    """([id, values]) => {
      const slider = document.getElementById(id);
      for (const value of values) {
        slider.value = value;
        slider.dispatchEvent(new Event("input"));
      }
    }""",
    [name, values],
  )


def heats(page):
  """Of each token of the text: its part of the hottest colour."""
  return page.eval_on_selector_all(
    "#text span", "all => all.map(x => +x.style.getPropertyValue('--heat'))"
  )


def percent(share):
  if share == 0:
    return "0 %"
  return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def shares(page):
  """Of each row: what the model says and what the rules leave."""
  texts = page.locator("#bars .share").all_inner_texts()
  return list(zip(texts[::2], texts[1::2], strict=True))


def check_bars(page, sampler, prompt, **rules):
  """Waits until the bars are those of the Sampler for this request."""
  found = sampler.next_token(Request(prompt, **rules), 20)
  candidates = list(found.candidates)
  if found.chosen not in candidates:
    candidates.append(found.chosen)
  expected = [
    (percent(c.probability), percent(c.stages["typical_p"])) for c in candidates
  ]
  expect(page.locator("#bars .share")).to_have_text(
    [text for pair in expected for text in pair]
  )
  assert page.locator("#bars .rank").all_inner_texts() == [
    str(c.rank) for c in candidates
  ]
  drawn = page.locator("#bars .drawn .rank")
  expect(drawn).to_have_text(str(found.chosen.rank))
  most = max(max(c.probability, c.stages["typical_p"]) for c in candidates)
  widths = page.eval_on_selector_all(
    "#bars .track .kept", "all => all.map(x => parseFloat(x.style.width))"
  )
  assert widths == pytest.approx(
    [100 * c.stages["typical_p"] / most for c in candidates], abs=0.01
  )
  return found


def test_bars_are_the_distribution_of_the_next_token(page, sampler):
  check_bars(page, sampler, "def main(")
  type_prompt(page, "a\u00e9\u4f60 <b>")
  found = check_bars(page, sampler, "a\u00e9\u4f60 <b>")
  entropy = page.locator("#entropy")
  expect(entropy).to_contain_text(f"{found.entropy:.2f} bits")
  expect(page.locator("#model")).to_have_text("tiny, context of 101 tokens")
  # There is nothing to chat with.
  expect(page.get_by_role("link", name="Chat")).to_be_hidden()


def test_rules_redraw_the_bars(page, sampler):
  for name, value, rules in (
    ("temperature", 0.5, {"temperature": 0.5}),
    ("top_k", 3, {"temperature": 0.5, "top_k": 3}),
    ("top_p", 0.5, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}),
  ):
    slide(page, name, value)
    check_bars(page, sampler, "def main(", **rules)
  expect(
    page.locator("#bars .note", has_text="cut by top-k")
  ).not_to_have_count(0)
  page.get_by_role("button", name="Reset").click()
  check_bars(page, sampler, "def main(")
  slide(page, "min_p", 0.6)
  check_bars(page, sampler, "def main(", min_p=0.6)
  expect(
    page.locator("#bars .note", has_text="cut by min-p")
  ).not_to_have_count(0)
  slide(page, "temperature", 0)
  check_bars(page, sampler, "def main(", temperature=0.0, min_p=0.6)
  expect(page.get_by_label("Temperature")).to_have_attribute(
    "aria-valuetext", "0, greedy"
  )
  page.get_by_role("button", name="Reset").click()
  page.get_by_role("spinbutton", name="Seed").fill("17")
  check_bars(page, sampler, "def main(", seed=17)


def test_many_moves_are_one_request_and_late_answers_are_dropped(page, sampler):
  asked = []

  def wait(route):
    asked.append(json.loads(route.request.post_data)["temperature"])
    if asked[-1] == 1.5:
      page.wait_for_timeout(600)
    route.continue_()

  page.route("**/v1/next_token", wait)
  slide(page, "temperature", 1.5)
  page.wait_for_timeout(150)
  slide(page, "temperature", *(h / 100 for h in range(50, 100, 5)))
  check_bars(page, sampler, "def main(", temperature=0.95)
  page.wait_for_timeout(800)
  check_bars(page, sampler, "def main(", temperature=0.95)
  assert asked == [1.5, 0.95]


def test_steps_are_what_generate_draws(page, sampler):
  slide(page, "top_k", 12)
  rules = {"top_k": 20, "seed": 0}
  k = int(page.locator("output[for=top_k]").inner_text())
  rules["top_k"] = k
  prompt = "def main("
  check_bars(page, sampler, prompt, **rules)
  (result,) = sampler.generate([Request(prompt, max_new_tokens=8, **rules)])
  n_prompt = len(prompt)
  step = page.get_by_role("button", name="Step")
  for _ in range(4):  # Faster than the model: none is lost.
    step.click()
  for _ in range(4):
    page.keyboard.press("ArrowRight")
  spans = page.locator("#text span")
  expect(spans).to_have_count(n_prompt + 8)
  ids = [*sampler.encode(prompt), *result.token_ids]
  check_bars(page, sampler, ids, **rules)
  # Colour and sum are those of the score of the whole.
  score = sampler.score(ids)
  bits = [-log / 0.6931471805599453 for log in score.log_probabilities]
  assert heats(page) == pytest.approx([min(1, b / 12) for b in bits], abs=1e-4)
  expect(page.locator("#sum")).to_have_text(
    f"{len(bits)} tokens, {sum(bits):.1f} bits in all"
  )
  spans.nth(n_prompt).hover()
  expect(page.locator("#about")).to_contain_text(
    f"{bits[n_prompt]:.2f} bits of surprisal, and rank {score.ranks[n_prompt]}"
  )
  # And back.
  page.keyboard.press("ArrowLeft")
  expect(spans).to_have_count(n_prompt + 7)
  check_bars(page, sampler, ids[:-1], **rules)
  page.get_by_role("button", name="Clear").click()
  expect(spans).to_have_count(n_prompt)
  check_bars(page, sampler, prompt, **rules)


def test_a_bar_that_is_pressed_is_taken(page, sampler):
  """By the mouse, and by arrow keys and Enter."""
  found = check_bars(page, sampler, "def main(")
  rows(page).nth(6).click()
  ids = [*found.prompt_ids, found.candidates[6].id]
  found = check_bars(page, sampler, ids)
  rows(page).nth(1).focus()
  page.keyboard.press("ArrowDown")
  page.keyboard.press("Enter")
  ids = [*ids, found.candidates[2].id]
  check_bars(page, sampler, ids)
  # The focus is still in the list.
  expect(rows(page).nth(2)).to_be_focused()
  expect(page.locator("#text span")).to_have_count(len(ids) - 1)


def test_it_runs_until_it_is_stopped_or_full(page, sampler):
  run = page.get_by_role("button", name=re.compile("Run|Stop"))
  run.click()
  expect(run).to_have_attribute("aria-pressed", "true")
  spans = page.locator("#text span")
  expect(spans.nth(20)).to_be_visible()
  page.keyboard.press("r")
  expect(run).to_have_attribute("aria-pressed", "false")
  n = spans.count()
  page.wait_for_timeout(600)
  assert spans.count() <= n + 1  # one was asked for before
  slide(page, "temperature", 0)
  run.click()
  full = "The context of 101 tokens is full."
  expect(page.get_by_role("alert")).to_have_text(full)
  expect(spans).to_have_count(100)
  expect(run).to_have_attribute("aria-pressed", "false")
  expect(page.get_by_role("button", name="Step")).to_be_disabled()
  page.get_by_role("button", name="Undo").click()
  expect(spans).to_have_count(99)
  expect(page.get_by_role("alert")).to_be_hidden()


BOXES = """() => Object.fromEntries(
  [...document.querySelectorAll("button, input, #bars button")].map((x, i) => {
    const {x: left, y, width, height} = x.getBoundingClientRect();
    return [x.id || i, [left, y + scrollY, width, height]];
  }).filter(([name, [, , width]]) => width))"""


@pytest.mark.parametrize("width", [1280, 900, 700])
def test_buttons_stay_where_they_are_while_the_text_grows(page, width):
  """Also while it runs, when candidates are below the list, at an error, and
  when the server is slow to say what model it has.
  """
  page.set_viewport_size({"width": width, "height": 900})
  page.route("**/v1/models", lambda route: (time.sleep(0.5), route.continue_()))
  page.reload()
  expect(rows(page).nth(19)).to_be_visible()
  slide(page, "temperature", 1.6)
  before = page.evaluate(BOXES)
  spans, n = page.locator("#text span"), len("def main(")
  page.keyboard.press("Escape")
  for i in range(25):
    page.keyboard.press("ArrowRight")
    expect(spans).to_have_count(n + i + 1)
    now = page.evaluate(BOXES)
    same = {name: now[name] for name in before if name in now}
    assert same == {name: before[name] for name in same} and len(same) > 30
  warm = {"status": "warming up", "compiling": True}
  page.route("**/health", lambda route: route.fulfill(json=warm))
  held = []
  page.route("**/v1/next_token", lambda route: held.append(route))
  page.keyboard.press("ArrowRight")
  expect(page.locator("#busy")).to_be_visible()
  assert page.evaluate(BOXES)["temperature"] == before["temperature"]
  page.unroute("**/v1/next_token")
  held[0].continue_()
  spans.first.hover()
  run = page.get_by_role("button", name=re.compile("Run|Stop"))
  run.click()
  expect(spans.nth(n + 40)).to_be_visible()
  assert page.evaluate(BOXES)["undo"] == before["undo"]
  run.click()


def test_what_is_waited_for_is_said(page):
  """A mark while a program compiles, the server warms up, or others run."""
  state = {"status": "warming up", "compiling": True}
  shown = page.locator("#busy")
  expect(shown).to_be_hidden()
  page.route("**/health", lambda route: route.fulfill(json=state))
  held = []
  page.route("**/v1/next_token", lambda route: held.append(route))
  page.get_by_role("button", name="Step").click()
  expect(shown).to_contain_text("warming up")
  state["status"] = "ok"
  expect(shown).to_contain_text("Compiling")
  state["compiling"] = False
  expect(shown).to_contain_text("Waiting")
  page.unroute("**/v1/next_token")
  for route in held:
    route.continue_()
  expect(shown).to_be_hidden()
  expect(page.locator("#text span")).to_have_count(len("def main(") + 1)


def test_the_keys_that_are_named_do_what_they_say(page):
  names = page.locator("#keys kbd").all_inner_texts()
  assert names == [
    "\u2192",
    "R",
    "\u2190",
    "C",
    "\u2193",
    "\u2191",
    "Enter",
    "Esc",
  ]
  spans, n = page.locator("#text span"), len("def main(")
  field = page.get_by_label("Prompt")
  field.focus()
  page.keyboard.press("Escape")
  expect(field).not_to_be_focused()
  page.keyboard.press("ArrowDown")
  expect(rows(page).nth(0)).to_be_focused()
  page.keyboard.press("ArrowDown")
  page.keyboard.press("ArrowUp")
  page.keyboard.press("Enter")
  expect(spans).to_have_count(n + 1)
  page.keyboard.press("ArrowRight")
  expect(spans).to_have_count(n + 2)
  page.keyboard.press("ArrowLeft")
  expect(spans).to_have_count(n + 1)
  page.keyboard.press("c")
  expect(spans).to_have_count(n)


def test_the_colours_are_those_of_the_html_files(page, tmp_path, browser):
  """One scale: tokens of equal surprisal look the same in both."""
  bits = [0.0, 3.0, 6.0, 9.0, 12.0]
  tokenizer = serving.sampler_of().tokenizer
  ids = tokenizer.encode("abcde")
  score = request_lib.Score(
    ids,
    [*"abcde"],
    [-b * 0.6931471805599453 for b in bits],
    [1] * 5,
    [[]] * 5,
    5,
  )
  path = tmp_path / "score.html"
  path.write_text(heat.page(score, tokenizer, "a"))
  other = browser.new_page()
  other.goto(f"file://{path}")
  colour = "all => all.map(x => getComputedStyle(x).backgroundColor)"
  expected = other.eval_on_selector_all("#text span", colour)
  other.close()
  assert len(set(expected)) == 5
  page.eval_on_selector_all(
    "#text span",
    "(all, bits) => all.slice(0, 5).forEach((x, i) => "
    "x.style.setProperty('--heat', bits[i] / 12))",
    bits,
  )
  found = page.eval_on_selector_all("#text span", colour)[:5]
  assert found == expected


def test_the_end_of_a_text_stops_the_run(page, sampler):
  def end(route):
    found = route.fetch()
    content = found.json()
    if len(content["prompt_ids"]) == len(sampler.encode("def main(")) + 3:
      ended = {"id": 2, "token": "<eos>", "bytes": [], "ends": True}
      content["chosen"] = {**content["candidates"][0], **ended}
    route.fulfill(response=found, json=content)

  page.route("**/v1/next_token", end)
  type_prompt(page, "def main(")
  page.get_by_role("button", name="Run").click()
  expect(page.locator("#text .special").last).to_have_text("<eos>")
  run = page.get_by_role("button", name=re.compile("Run|Stop"))
  expect(run).to_have_attribute("aria-pressed", "false")
  expect(page.locator("#text span")).to_have_count(len("def main(") + 4)


def test_a_token_is_text_whatever_it_spells(page):
  """The server is made to say what would run, were it read as HTML."""
  evil = "<img src=x onerror=\"document.title='hit'\">"

  def rename(route):
    found = route.fetch()
    content = found.json()
    if "tokens" in content:
      content["tokens"][0] = evil
      content["bytes"][0] = list(evil.encode())
    else:
      for candidate in (content["chosen"], content["candidates"][0]):
        candidate |= {"token": evil, "bytes": list(evil.encode())}
    route.fulfill(response=found, json=content)

  page.route("**/v1/score", rename)
  page.route("**/v1/next_token", rename)
  type_prompt(page, "<img src=x onerror=\"document.title='hit'\"> ab")
  expect(page.locator("#text span").first).to_have_text(evil)
  shown = evil.replace(" ", "\u2423")
  expect(rows(page).first.locator(".token")).to_have_text(shown)
  page.locator("#text span").first.hover()
  expect(page.locator("#about b")).to_have_text(shown)
  page.get_by_role("button", name="Step").click()
  expect(page.locator("#text .own")).to_have_text(evil)
  page.wait_for_timeout(200)
  assert page.locator("img").count() == 0 and page.title() == "next-token"


def test_characters_of_several_tokens_are_whole(page):
  type_prompt(page, "\u4f60 a\n\u00e9")
  expect(page.locator("#text span")).to_have_text(
    ["", "", "\u4f60", " ", "a", "\u21b5\n", "", "\u00e9"],
    use_inner_text=False,
  )


def test_an_error_is_told_and_forgotten(page, sampler):
  type_prompt(page, "a" * 101)
  alert = page.get_by_role("alert")
  expect(alert).to_contain_text("102 tokens")
  expect(rows(page)).to_have_count(0)
  type_prompt(page, "a")
  expect(alert).to_be_hidden()
  check_bars(page, sampler, "a")
  type_prompt(page, "")
  check_bars(page, sampler, "")


@pytest.fixture
def refused(browser):
  """A page whose server wants a key."""
  with serving.serve(
    serving.sampler_of(), token="s3cret", loopback_only=False
  ) as running:
    page = browser.new_page()
    page.goto(running.url)
    yield page
    page.close()


def test_a_key_can_be_given(refused, sampler):
  field = refused.get_by_label("API key")
  for key in ("wrong", "s3cret"):
    expect(field).to_be_visible()
    field.fill(key)
    field.press("Enter")
  check_bars(refused, sampler, "def main(")
  expect(field).to_be_hidden()
  expect(refused.get_by_role("alert")).to_be_hidden()
  refused.reload()
  check_bars(refused, sampler, "def main(")


def test_everything_has_a_name_and_is_reached_by_keys(page):
  nameless = page.evaluate(
    """() => [...document.querySelectorAll("input, textarea, button")]
      .filter(x => x.offsetParent && !x.labels?.length && !x.ariaLabel &&
        !x.textContent.trim()).map(x => x.outerHTML)"""
  )
  assert nameless == []
  label = rows(page).first.get_attribute("aria-label")
  assert re.match(r"Take .+, rank 1: the model says [\d.]+ %, after", label)
  order = []
  page.get_by_label("Prompt").focus()
  for _ in range(11):
    page.keyboard.press("Tab")
    order.append(page.evaluate("document.activeElement.id"))
  assert order == (
    ["step", "run", "text", "reset", "temperature", "min_p", "top_k", "top_p"]
    + ["seed", "dice", ""]
  )
  page.get_by_label("Top-k").focus()
  page.keyboard.press("ArrowLeft")
  expect(page.locator("output[for=top_k]")).to_have_text("1000")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, tiny, scheme):
  """Contrast of 4.5 to 1 at least, as WCAG asks, also on the hottest colour."""
  page = browser.new_page(color_scheme=scheme)
  page.goto(tiny.url)
  expect(rows(page).nth(19)).to_be_visible()
  contrast = """() => {
    const rgb = color => {
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
      canvas.fillRect(0, 0, 1, 1);
      for (const layer of [color].flat()) {
        canvas.fillStyle = layer;
        canvas.fillRect(0, 0, 1, 1);
      }
      return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = color => rgb(color).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const style = x => getComputedStyle(document.querySelector(x));
    const card = style(".card").backgroundColor;
    const span = document.querySelector("#text span");
    span.style.setProperty("--heat", 1);
    const pairs = {
      body: [style("body").color, []], heat: [style("#text span").color,
        [card, style("#text span").backgroundColor]],
      soft: [style(".soft").color, [card]],
      after: [style(".share.after").color, [card]],
      main: [style("#step").color, [style("#step").backgroundColor]],
    };
    return Object.fromEntries(Object.entries(pairs).map(([name, [a, b]]) => {
      const [x, y] = [light([...b, a]), light(b)].sort((p, q) => q - p);
      return [name, (x + 0.05) / (y + 0.05)];
    }));
  }"""
  found = page.evaluate(contrast)
  assert min(found.values()) >= 4.5, found
  page.close()


def test_nothing_inline_or_from_elsewhere_may_run(page, tiny):
  policy = httpx.get(tiny.url).headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy
  assert "http" not in policy and "*" not in policy
  names = "", "chat", "shared.js", "page.js", "chat.js", "page.css", "heat.css"
  for path in (f"/{name}" for name in names):
    text = httpx.get(tiny.url + path).text
    assert not re.search(r"https?://|<script>|<style>|innerHTML", text)
