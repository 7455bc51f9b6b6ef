// The page: image input, questions, streamed answers.

import { watchImageSources } from "./image_sources.js";
import { makeCamera } from "./camera.js";
import { Conversations, messagesFor, titleOf } from "./conversations.js";
import { readImage } from "./image.js";
import { Failure, answer, models } from "./server.js";
import { makeSettings } from "./settings.js";
import { copyAndSay, makeTurn } from "./turn.js";
import { transcript } from "./format.js";

const byId = (id) => document.getElementById(id);
const conversations = new Conversations();
const narrow = matchMedia("(max-width: 52rem)"); // the side panel overlays the page, as in style.css
const settings = makeSettings(() => drawer(true));
const views = new Map(); // turn -> its view, of the current conversation
let current = conversations.all[0] ?? conversations.begin();
let running = null; // {conversation, turn, abort} of the answer being streamed
let model = null; // model name of the server

// ---- rendering

function render() {
  const { image, turns } = current;
  const empty = !image && turns.length === 0;
  byId("welcome").hidden = !empty;
  byId("conversation").hidden = empty;
  byId("current-image").hidden = !image;
  if (image) {
    byId("current-image-view").src = conversations.urlOf(current) ?? image.thumbnail;
    byId("current-image-view").alt = `The image asked about: ${image.name}`;
    byId("current-image-name").textContent = image.name;
    byId("current-image-size").textContent = [`${image.width} × ${image.height}`, image.note].filter(Boolean).join(", ");
  }
  views.clear();
  for (const turn of turns) views.set(turn, makeTurn(turn, { retry: () => ask(turn.question, turn), announce }));
  byId("turns").replaceChildren(...Array.from(views.values(), ({ element }) => element));
  renderList();
  renderControls();
}

function renderList() {
  const begun = conversations.all.filter(({ image, turns }) => image || turns.length > 0);
  byId("list").replaceChildren(...begun.map(listItem));
}

function listItem(conversation) {
  const item = byId("item").content.firstElementChild.cloneNode(true);
  const [open, bin] = item.querySelectorAll("button");
  const title = titleOf(conversation);
  open.querySelector(".title").textContent = open.title = title;
  const thumbnail = conversation.image?.thumbnail;
  if (thumbnail) open.querySelector("img").src = thumbnail;
  open.querySelector(thumbnail ? "svg" : "img").remove();
  if (conversation === current) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => show(conversation));
  bin.setAttribute("aria-label", `Delete “${title}”`);
  bin.addEventListener("click", () => remove(conversation));
  return item;
}

function renderControls() {
  const lost = conversations.urlOf(current) === undefined;
  const hadFocus = [byId("ask"), byId("stop")].includes(document.activeElement);
  byId("ask").hidden = Boolean(running);
  byId("stop").hidden = !running;
  byId("question").disabled = byId("ask").disabled = lost;
  byId("question").placeholder = lost
    ? "The image was too large to survive the reload. Choose it again to continue."
    : current.image ? "Ask about the image" : "Ask about an image";
  byId("suggestions").hidden = !current.image || current.turns.length > 0 || lost;
  byId("copy-all").hidden = !current.turns.some((turn) => turn.answer);
  if (hadFocus) (running ? byId("stop") : byId("question")).focus();
}

function show(conversation) {
  current = conversation;
  drawer(false);
  notice("");
  render();
  scrollTo(0, current.turns.length > 0 ? document.body.scrollHeight : 0);
  byId("question").focus();
}

function announce(words) {
  byId("status").textContent = words;
}

function notice(words, undo = null) {
  byId("notice").hidden = !words;
  byId("notice-words").textContent = words;
  byId("notice-undo").hidden = !undo;
  byId("notice-undo").onclick = undo;
}

function drawer(open) {
  const over = open && narrow.matches;
  byId("side").classList.toggle("open", over);
  byId("drawer").setAttribute("aria-expanded", String(over));
  document.querySelector("main").inert = over;
}

// ---- conversations

function begin(image = null) {
  const blank = conversations.all.find((one) => !one.image && one.turns.length === 0); // keep at most one
  if (blank) conversations.remove(blank);
  show(conversations.begin(image));
}

function remove(conversation) {
  if (running?.conversation === conversation) running.abort.abort();
  const index = conversations.all.indexOf(conversation);
  conversations.remove(conversation);
  if (conversations.all.length === 0) conversations.begin();
  show(conversation === current ? conversations.all[Math.min(index, conversations.all.length - 1)] : current);
  save();
  if (!conversation.image && conversation.turns.length === 0) return;
  notice(`“${titleOf(conversation)}” was deleted.`, () => {
    conversations.restore(conversation, index);
    show(conversation);
    save();
  });
}

function save() {
  if (conversations.save(current)) return;
  notice("This tab's storage is full: some images will be lost on reload.");
}

// ---- images

async function take(file) {
  let image;
  try {
    image = await readImage(file);
  } catch (error) {
    return notice(error.message);
  }
  if (current.turns.length > 0) {
    begin(image);
    notice("This is a new conversation: the model takes one image per conversation. The previous one is in the list.");
  } else {
    conversations.show(current, image);
    show(current);
  }
  save();
  announce(`Image ${image.name}, ${image.width} by ${image.height}. Ask about it.`);
}

// ---- questions

async function ask(question, again = null) {
  if (running || !settings.valid()) return;
  const conversation = current;
  const url = conversations.urlOf(conversation);
  if (url === undefined) return notice("The image of this conversation was too large to be stored. Choose it again to ask about it.");
  const turn = again ?? { question: question.trim() };
  Object.assign(turn, { answer: "", outcome: "answering", failure: null, finish: null, usage: null, extension: null });
  turn.image = Boolean(url);
  if (!again) conversation.turns.push(turn);
  running = { conversation, turn, abort: new AbortController() };
  notice("");
  render();
  save();
  scrollTo(0, document.body.scrollHeight);
  await answerInto(turn, messagesFor(conversation.turns.slice(0, conversation.turns.indexOf(turn)), url, turn.question));
  running = null;
  following(() => views.get(turn)?.update());
  renderControls();
  if (conversations.all.includes(conversation)) save();
  announce(screenReaderText(turn));
  if (turn.failure?.status === 401 && (await settings.askForKey(turn.failure.words))) {
    await showModel();
    if (current === conversation) ask(turn.question, turn);
  }
}

/** Stream the answer into the turn and set its outcome. */
async function answerInto(turn, messages) {
  try {
    const unknown = model ? null : await showModel();
    if (unknown) throw unknown;
    const body = { model, messages, ...settings.sampling() };
    for await (const { text, ...rest } of answer({ body, key: settings.key(), signal: running.abort.signal })) {
      turn.answer += text;
      for (const [name, value] of Object.entries(rest)) turn[name] = value ?? turn[name];
      following(() => views.get(turn)?.update());
    }
    turn.outcome = "done";
  } catch (error) {
    turn.outcome = running.abort.signal.aborted ? "stopped" : "failed";
    if (turn.outcome === "failed" && !(error instanceof Failure)) console.error(error);
    if (error.status === 404) model = null; // the server has another model now
    const { title = "An error in this page", words = String(error), status, retrySeconds } = error;
    turn.failure = turn.outcome === "failed" ? { title, words, status, retrySeconds } : null;
  }
}

function screenReaderText({ outcome, failure, answer: text }) {
  if (outcome === "failed") return `${failure.title}. ${failure.words}`;
  return outcome === "stopped" ? `Stopped. ${text}` : `Answer: ${text}`;
}

/** Change the page, and keep it scrolled to the end if it is. */
function following(change) {
  const root = document.documentElement;
  const atEnd = root.scrollHeight - root.clientHeight - root.scrollTop < 48;
  change();
  if (atEnd) scrollTo(0, root.scrollHeight);
}

/** Request the model name and show it; returns the Failure, or null. */
async function showModel() {
  const words = byId("model");
  byId("again-models").hidden = true;
  try {
    model = (await models(settings.key()))[0].id;
    words.textContent = model;
  } catch (failure) {
    model = null;
    words.textContent = `${failure.title}. ${failure.words}`;
    byId("again-models").hidden = false;
    return failure;
  }
  return null;
}

// ---- events

const actions = { choose: () => byId("file").click(), camera: makeCamera(take) };
for (const button of document.querySelectorAll("[data-action]")) button.addEventListener("click", actions[button.dataset.action]);

watchImageSources(take, notice);

const field = byId("question");
function send() {
  const question = field.value;
  if (running || !question.trim() || field.disabled || !settings.valid()) return;
  field.value = "";
  grow();
  ask(question);
}
function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}
field.addEventListener("input", grow);
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => running?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (byId("side").classList.contains("open")) drawer(false);
  else running?.abort.abort();
});
for (const button of byId("suggestions").querySelectorAll("button")) {
  button.addEventListener("click", () => {
    field.focus();
    ask(button.textContent);
  });
}

byId("new").addEventListener("click", () => begin());
byId("drawer").addEventListener("click", () => drawer(!byId("side").classList.contains("open")));
narrow.addEventListener("change", () => drawer(false));
byId("copy-all").addEventListener("click", (event) => copyAndSay(event.currentTarget, transcript(current, model ?? "Model"), announce));
byId("notice-close").addEventListener("click", () => notice(""));
byId("again-models").addEventListener("click", showModel);

render();
const failure = await showModel();
if (failure?.status === 401 && (await settings.askForKey(failure.words))) await showModel();
