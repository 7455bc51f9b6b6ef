// Server-sent events as they come over a connection: cut anywhere, within a line or within a character.
// Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/** Yield the data of each event of a ReadableStream of bytes; one that the end cut off is dropped. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // keeps the beginning of a character until its rest has come
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the end waits: the \n that belongs to it may follow
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    leave(reader);
  }
}

/** Read what is left to its end, which is near after the last event, so that the connection can be used again; or else break it. */
async function leave(reader) {
  const late = setTimeout(() => reader.cancel().catch(() => {}), 1000);
  try {
    while (!(await reader.read()).done);
  } catch {
    // broken, or aborted
  }
  clearTimeout(late);
}
