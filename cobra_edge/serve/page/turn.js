// The view of one question and its answer. Untrusted text is inserted as text nodes only.

import { copyText } from "./clipboard.js";
import { cacheText, endingText, metricsText } from "./format.js";

const template = document.getElementById("turn");

/** Return the view {element, update} of a turn; `actions` is {retry, announce}. */
export function makeTurn(turn, actions) {
  const element = template.content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const text = document.createTextNode("");
  find(".question .words").textContent = turn.question;
  find(".answer").append(text);
  find(".retry").addEventListener("click", actions.retry);
  const copy = find(".copy");
  copy.setAttribute("aria-label", `Copy the answer to “${turn.question}”`);
  copy.addEventListener("click", () => copyAndSay(copy, turn.answer, actions.announce));
  let ticking = 0;

  function showFailure({ title, words, retrySeconds }) {
    find(".failure .title").textContent = title;
    find(".failure .words").textContent = retrySeconds ? `${sentence(words)} Try again in ${retrySeconds} s.` : words;
    tick(Date.now() + (retrySeconds ?? 0) * 1000);
  }

  /** Show a countdown on the button, which can be pressed at any time. */
  function tick(until) {
    const left = Math.ceil((until - Date.now()) / 1000);
    find(".retry span").textContent = left > 0 ? `Try again (${left} s)` : "Try again";
    if (left > 0) ticking = setTimeout(tick, 250, until);
  }

  function update() {
    const { outcome, answer, image } = turn;
    clearTimeout(ticking);
    const answering = outcome === "answering";
    if (answer.startsWith(text.data)) text.appendData(answer.slice(text.length));
    else text.data = answer;
    element.classList.toggle("answering", answering);
    find(".answer").hidden = !answer;
    find(".waiting").hidden = !answering || Boolean(answer);
    find(".waiting span").textContent = image ? "Encoding the image and reading the question…" : "Reading the question…";
    find(".failure").hidden = outcome !== "failed";
    if (outcome === "failed") showFailure(turn.failure);
    const remark = answering ? "" : endingText(turn);
    find(".ending").hidden = !remark;
    find(".ending").textContent = remark;
    find(".foot").hidden = answering || !answer;
    find(".metrics").textContent = metricsText(turn);
    const cached = cacheText(turn);
    find(".cache").hidden = !cached;
    find(".cache .words").textContent = cached?.words ?? "";
    find(".share span").style.width = `${100 * (cached?.share ?? 0)}%`;
  }

  update();
  return { element, update };
}

const sentence = (words) => (/[.!?]$/.test(words) ? words : `${words}.`);

/** Copy, and confirm it on the button and to screen readers. */
export async function copyAndSay(button, text, announce) {
  const words = (await copyText(text)) ? "Copied" : "Could not copy";
  const label = button.querySelector("span");
  button.dataset.label ??= label.textContent;
  label.textContent = words;
  announce(words);
  setTimeout(() => (label.textContent = button.dataset.label), 1600);
}
