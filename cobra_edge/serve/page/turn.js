// One question and its answer on the page. What people and models say is only ever put in as text.

import { copyText } from "./copying.js";
import { ending, figures, memory } from "./words.js";

const template = document.getElementById("turn");

/** Make the view of a turn; `does` is {retry, announce}. `view.element` goes into the page, `view.update()` shows what changed. */
export function makeTurn(turn, does) {
  const element = template.content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const said = document.createTextNode("");
  find(".question .words").textContent = turn.question;
  find(".answer").append(said);
  find(".retry").addEventListener("click", does.retry);
  const copy = find(".copy");
  copy.setAttribute("aria-label", `Copy the answer to “${turn.question}”`);
  copy.addEventListener("click", () => copyAndSay(copy, turn.answer, does.announce));
  let ticking = 0;

  function showFailure({ title, words, retrySeconds }) {
    find(".failure .title").textContent = title;
    find(".failure .words").textContent = retrySeconds ? `${sentence(words)} Try again in ${retrySeconds} s.` : words;
    tick(Date.now() + (retrySeconds ?? 0) * 1000);
  }

  /** Count down on the button; it can be pressed before. */
  function tick(until) {
    const left = Math.ceil((until - Date.now()) / 1000);
    find(".retry span").textContent = left > 0 ? `Try again (${left} s)` : "Try again";
    if (left > 0) ticking = setTimeout(tick, 250, until);
  }

  function update() {
    const { outcome, answer, image } = turn;
    clearTimeout(ticking);
    const answering = outcome === "answering";
    if (answer.startsWith(said.data)) said.appendData(answer.slice(said.length));
    else said.data = answer;
    element.classList.toggle("answering", answering);
    find(".answer").hidden = !answer;
    find(".waiting").hidden = !answering || Boolean(answer);
    find(".waiting span").textContent = image ? "Reading the image and the question…" : "Reading the question…";
    find(".failure").hidden = outcome !== "failed";
    if (outcome === "failed") showFailure(turn.failure);
    const remark = answering ? "" : ending(turn);
    find(".ending").hidden = !remark;
    find(".ending").textContent = remark;
    find(".foot").hidden = answering || !answer;
    find(".figures").textContent = figures(turn);
    const remembered = memory(turn);
    find(".memory").hidden = !remembered;
    find(".memory .words").textContent = remembered?.words ?? "";
    find(".share span").style.width = `${100 * (remembered?.share ?? 0)}%`;
  }

  update();
  return { element, update };
}

const sentence = (words) => (/[.!?]$/.test(words) ? words : `${words}.`);

/** Copy, and say so on the button and to screen readers. */
export async function copyAndSay(button, text, announce) {
  const words = (await copyText(text)) ? "Copied" : "Could not copy";
  const label = button.querySelector("span");
  button.dataset.label ??= label.textContent;
  label.textContent = words;
  announce(words);
  setTimeout(() => (label.textContent = button.dataset.label), 1600);
}
