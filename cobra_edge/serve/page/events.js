// Parser of server-sent events; chunks may end within a line or a character.
// Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/** Yield the data of each event of a ReadableStream of bytes; an incomplete last event is dropped. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // buffers incomplete characters
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the end is kept: its \n may follow
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
    finish(reader);
  }
}

/** Read to the end, so that the connection can be reused, or cancel after a timeout. */
async function finish(reader) {
  const timeout = setTimeout(() => reader.cancel().catch(() => {}), 1000);
  try {
    while (!(await reader.read()).done);
  } catch {
    // the connection failed or was aborted
  }
  clearTimeout(timeout);
}
