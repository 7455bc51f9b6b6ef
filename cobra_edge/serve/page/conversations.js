// Conversations, kept in this tab: they outlive a reload and end with the tab. Images are kept while there is room for them;
// a conversation whose image was let go can still be read.

const LIST = "cobra-edge.conversations";
const IMAGE_KEY = "cobra-edge.image.";
const LARGEST = 4_000_000; // characters; browsers keep about five million for a page

/**
 * A conversation is {id, image, turns}: image is null or {thumbnail, name, width, height, note}, and a turn is
 * {question, answer, outcome, failure, finish, usage, extension} with outcome "answering", "done", "stopped" or "failed".
 */
export class Conversations {
  constructor() {
    this.images = new Map(); // id -> data URI
    this.all = stored();
    for (const { id } of this.all) {
      const url = read(IMAGE_KEY + id);
      if (url) this.images.set(id, url);
    }
  }

  /** Put a new conversation in front; of `image` (see image.js) or of none. */
  begin(image = null) {
    const conversation = { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, image: null, turns: [] };
    this.all.unshift(conversation);
    if (image) this.show(conversation, image);
    return conversation;
  }

  /** Give a conversation its image; one that has turns keeps what it has. */
  show(conversation, { url, ...image }) {
    conversation.image = image;
    this.images.set(conversation.id, url);
  }

  /** The image's data URI: null where there was none, undefined where there was no room to keep it. */
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

  /** Write all that has begun. Returns false where images had to be left out: the oldest first, this one's last. */
  save(current) {
    const begun = this.all.filter(({ image, turns }) => image || turns.length > 0);
    const victims = begun.filter(({ id }) => id !== current.id && read(IMAGE_KEY + id)).reverse();
    const url = this.urlOf(current);
    const tooLarge = url?.length > LARGEST;
    const written = () => write(LIST, JSON.stringify(begun)) && (!url || tooLarge || this.#keep(current.id, url));
    let kept = written();
    const complete = kept && !tooLarge;
    while (!kept && victims.length > 0) {
      drop(IMAGE_KEY + victims.shift().id);
      kept = written();
    }
    return complete;
  }

  #keep(id, url) {
    return read(IMAGE_KEY + id) === url || write(IMAGE_KEY + id, url);
  }
}

/** The messages of the API for a question after `turns`: the image (a data URI, or null) goes with the first. */
export function messagesFor(turns, url, question) {
  const answered = turns.filter(({ outcome, answer }) => outcome !== "failed" && answer);
  const said = answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  const messages = [...said, { role: "user", content: question }];
  if (url) messages[0].content = [{ type: "image_url", image_url: { url } }, { type: "text", text: messages[0].content }];
  return messages;
}

/** What a conversation is called in the list. */
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
    turn.failure = { title: "The page was left", words: "The answer had not ended when this page was closed or reloaded." };
  }
  return all;
}

// Storage may be full, or forbidden by the browser's settings: then this page's memory is all there is.
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
    // nothing was kept
  }
}
