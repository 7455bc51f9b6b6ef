// Conversations, in the session storage of this tab: they survive a reload. Where storage is full, images are dropped; their
// conversations stay readable.

const LIST = "cobra-edge.conversations";
const IMAGE_KEY = "cobra-edge.image.";
const MAX_CHARACTERS = 4_000_000; // of an image; browsers store about five million per origin

/**
 * A conversation is {id, image, turns}: image is null or {thumbnail, name, width, height, note}, and a turn is
 * {question, answer, outcome, failure, finish, usage, extension} with outcome "answering", "done", "stopped" or "failed".
 */
export class Conversations {
  constructor() {
    this.images = new Map(); // id -> data URL
    this.all = stored();
    for (const { id } of this.all) {
      const url = read(IMAGE_KEY + id);
      if (url) this.images.set(id, url);
    }
  }

  /** Insert a new conversation at the front, with an image (see image.js) or without. */
  begin(image = null) {
    const conversation = { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, image: null, turns: [] };
    this.all.unshift(conversation);
    if (image) this.show(conversation, image);
    return conversation;
  }

  /** Set the image of a conversation. */
  show(conversation, { url, ...image }) {
    conversation.image = image;
    this.images.set(conversation.id, url);
  }

  /** The data URL of the image: null for no image, undefined if it was dropped. */
  urlOf(conversation) {
    return conversation.image ? this.images.get(conversation.id) : null;
  }

  remove(conversation) {
    this.all = this.all.filter((other) => other !== conversation);
    drop(IMAGE_KEY + conversation.id);
  }

  restore(conversation, index) {
    this.all.splice(index, 0, conversation);
  }

  /** Store the conversations. Returns false if images had to be dropped, the oldest first, the current one last. */
  save(current) {
    const begun = this.all.filter(({ image, turns }) => image || turns.length > 0);
    const victims = begun.filter(({ id }) => id !== current.id && read(IMAGE_KEY + id)).reverse();
    const url = this.urlOf(current);
    const tooLarge = url?.length > MAX_CHARACTERS;
    const store = () => write(LIST, JSON.stringify(begun)) && (!url || tooLarge || this.#keep(current.id, url));
    let kept = store();
    const complete = kept && !tooLarge;
    while (!kept && victims.length > 0) {
      drop(IMAGE_KEY + victims.shift().id);
      kept = store();
    }
    return complete;
  }

  #keep(id, url) {
    return read(IMAGE_KEY + id) === url || write(IMAGE_KEY + id, url);
  }
}

/** The API messages for a question after `turns`; the image (a data URL or null) is in the first. */
export function messagesFor(turns, url, question) {
  const answered = turns.filter(({ outcome, answer }) => outcome !== "failed" && answer);
  const history = answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  const messages = [...history, { role: "user", content: question }];
  if (url) messages[0].content = [{ type: "image_url", image_url: { url } }, { type: "text", text: messages[0].content }];
  return messages;
}

/** The title of a conversation in the list. */
export function titleOf({ image, turns }) {
  return turns[0]?.question ?? image?.name ?? "New conversation";
}

function stored() {
  let all = [];
  try {
    all = JSON.parse(read(LIST)) ?? [];
  } catch {
    // not written by this page
  }
  if (!Array.isArray(all) || !all.every(({ id, turns }) => id && Array.isArray(turns))) return [];
  for (const turn of all.flatMap(({ turns }) => turns)) {
    if (turn.outcome !== "answering") continue;
    turn.outcome = "failed";
    turn.failure = { title: "Interrupted", words: "The page was closed or reloaded before the answer ended." };
  }
  return all;
}

// Storage may be full or disabled; then conversations last until the page is closed.
function read(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    sessionStorage.setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

function drop(name) {
  try {
    sessionStorage.removeItem(name);
  } catch {
    // nothing was stored
  }
}
