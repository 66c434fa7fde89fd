"""The page at /chat, in a real Chromium without a window."""

import re
import time

import numpy as np
import pytest
import serving
from playwright import sync_api

from lm.data import chat as chat_lib
from lm.sample import request as request_lib

pytestmark = pytest.mark.slow
expect = sync_api.expect
QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def browser():
  with serving.chromium() as browser:
    yield browser


@pytest.fixture(scope="module")
def sampler():
  return serving.sampler_of(serving.TEMPLATE)


@pytest.fixture(scope="module")
def tiny(sampler):
  with serving.serve(sampler) as running:
    yield running


@pytest.fixture
def page(browser, tiny):
  """The page; nothing may go wrong in it."""
  page = browser.new_page()
  page.set_default_timeout(60000)
  wrong = []
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.on("console", lambda message: wrong.append(message.text))
  page.goto(tiny.url)
  page.get_by_role("link", name="Chat").click()
  expect(page.locator("#model")).to_have_text("tiny, context of 101 tokens")
  yield page
  page.close()
  assert [text for text in wrong if "status of 400" not in text] == []


def expected(sampler, messages, seed=0, **rules):
  tokenizer = sampler.tokenizer
  request = request_lib.Request(
    chat_lib.chat_ids(tokenizer, messages),
    stop_ids=chat_lib.stop_ids(tokenizer),
    seed=seed,
    alternatives=20,
    **rules,
  )
  (result,) = sampler.generate([request])
  return result


def say(page, text):
  page.get_by_label("Message").fill(text)
  page.get_by_label("Message").press("Enter")


def check_answer(page, result, n_answers=1):
  """Waits for the answer's tokens, with the colour of each."""
  said = page.locator(".message.assistant .said")
  expect(said).to_have_count(n_answers)
  spans = said.last.locator("span")
  expect(spans).to_have_count(len(result.token_ids))
  expect(page.locator("#stop")).to_be_disabled()
  heats = spans.evaluate_all(
    "all => all.map(x => +x.style.getPropertyValue('--heat'))"
  )
  bits = -np.array(result.log_probabilities) / np.log(2)
  np.testing.assert_allclose(heats, np.clip(bits / 12, 0, 1), atol=1e-4)


def test_answers_are_those_of_the_template(page, sampler):
  """Of a conversation of two turns; regenerated, with the next seed."""
  say(page, "Hello")
  first = expected(sampler, QUESTION)
  check_answer(page, first)
  page.locator("#temperature").fill("0.5")
  page.get_by_role("button", name="Regenerate").click()
  expect(page.get_by_label("Seed")).to_have_value("1")
  second = expected(sampler, QUESTION, seed=1, temperature=0.5)
  assert second.token_ids != first.token_ids
  check_answer(page, second)
  page.get_by_role("button", name="New").click()
  expect(page.locator(".message")).to_have_count(0)
  expect(page.get_by_label("Message")).to_be_focused()


def test_a_token_that_is_pressed_shows_its_distribution(page, sampler):
  say(page, "Hello")
  result = expected(sampler, QUESTION)
  check_answer(page, result)
  spans = page.locator(".message.assistant .said span")
  for place, press in (
    (3, lambda: spans.nth(3).click()),
    (4, lambda: page.locator("#log").press("ArrowRight")),
    (3, lambda: page.locator("#log").press("ArrowLeft")),
  ):
    press()
    bits = -result.log_probabilities[place] / np.log(2)
    expect(page.locator("#about")).to_contain_text(f"{bits:.2f} bits")
    logs = [a.log_probability for a in result.alternatives[place]]
    others = [a.id for a in result.alternatives[place]]
    if result.token_ids[place] not in others:
      logs.append(result.log_probabilities[place])
    shown = page.locator("#bars .share").all_inner_texts()
    assert shown == [
      "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"
      for share in np.exp(logs)
    ]
    expect(page.locator("#bars .drawn")).to_have_count(1)
    expect(page.locator("#log .on")).to_have_count(1)


def test_an_answer_that_is_stopped_stays(page, tiny, sampler, monkeypatch):
  """And the server's slot is free at once."""
  step = type(tiny.worker._engine).step

  def slow(engine, *arguments):
    time.sleep(0.2)
    return step(engine, *arguments)

  monkeypatch.setattr(type(tiny.worker._engine), "step", slow)
  say(page, "Hello")
  spans = page.locator(".message.assistant .said span")
  expect(spans.nth(3)).to_be_visible()
  expect(page.locator("#send")).to_be_disabled()
  page.keyboard.press("Escape")
  expect(page.locator("#stop")).to_be_disabled()
  n, result = spans.count(), expected(sampler, QUESTION)
  assert 4 <= n < len(result.token_ids)
  tiny.settle()
  assert spans.count() == n
  monkeypatch.undo()
  # What was said of it is part of the conversation.
  with page.expect_request("**/v1/chat/completions") as asked:
    say(page, "go on")
  messages = asked.value.post_data_json["messages"]
  assert [m["role"] for m in messages] == ["user", "assistant", "user"]
  text = messages[1]["content"]
  assert text and result.text.startswith(text)


def test_what_is_too_long_is_told_and_can_be_asked_again(page):
  say(page, "a" * 101)
  expect(page.get_by_role("alert")).to_contain_text("tokens")
  expect(page.locator(".message.assistant")).to_have_count(0)
  expect(page.get_by_role("button", name="Try again")).to_be_enabled()
  page.get_by_role("button", name="New").click()
  expect(page.get_by_role("alert")).to_be_hidden()


def test_the_buttons_stay_while_an_answer_grows(page, sampler):
  boxes = """() => [...document.querySelectorAll("#form button")].map(x => {
    const {x: left, y, width, height} = x.getBoundingClientRect();
    return [left, y + scrollY, width, height];
  })"""
  before = page.evaluate(boxes)
  say(page, "Hello")
  check_answer(page, expected(sampler, QUESTION))
  assert page.evaluate(boxes) == before


def test_markup_is_text(page):
  evil = "<img src=x onerror=\"document.title='hit'\">"
  say(page, evil)
  expect(page.locator(".message.user .said")).to_have_text(evil)
  expect(page.locator("#stop")).to_be_disabled()
  assert page.locator("img").count() == 0
  assert page.title() == "next-token: chat"


def test_a_checkpoint_without_a_template_says_so(browser):
  with serving.serve(serving.sampler_of()) as running:
    page = browser.new_page()
    page.goto(f"{running.url}/chat")
    expect(page.get_by_role("alert")).to_contain_text("no chat template")
    expect(page.locator("#send")).to_be_disabled()
    page.close()


def test_everything_has_a_name(page):
  nameless = page.evaluate(
    """() => [...document.querySelectorAll("input, textarea, button")]
      .filter(x => x.offsetParent && !x.labels?.length && !x.ariaLabel &&
        !x.textContent.trim()).map(x => x.outerHTML)"""
  )
  assert nameless == []
  keys = page.locator("#keys kbd").all_inner_texts()
  assert keys == ["Enter", "Shift", "Enter", "Esc", "\u2190", "\u2192"]
  assert re.search("presses|Press a token", page.locator("#keys").inner_text())
