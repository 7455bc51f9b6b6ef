// Texts for the metrics of an answer.

const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const tokens = (count) => `${number(count)} ${count === 1 ? "token" : "tokens"}`;

/** "180 ms" or "1.2 s", with a no-break space. */
export function duration(ms) {
  return ms < 1000 ? `${number(ms, ms < 10 ? 1 : 0)}\u00a0ms` : `${number(ms / 1000, 1)}\u00a0s`;
}

/** "23 tokens · 41 tokens/s · first token after 180 ms", as far as known. */
export function metricsText({ usage, extension }) {
  const parts = [];
  if (usage) parts.push(tokens(usage.completion_tokens));
  if (extension?.tpot_ms) parts.push(`${number(1000 / extension.tpot_ms, extension.tpot_ms > 100 ? 1 : 0)} tokens/s`);
  if (extension?.ttft_ms != null) parts.push(`first token after ${duration(extension.ttft_ms)}`);
  if (extension?.queue_ms >= 100) parts.push(`queued for ${duration(extension.queue_ms)}`);
  return parts.join(" · ");
}

/** The cached prefix: {words, share of the prompt 0..1}, or null if unknown. */
export function cacheText({ usage, extension }) {
  if (!usage?.prompt_tokens_details || !extension?.remembered) return null;
  const { cached_tokens: cached = 0, image_tokens: imageTokens = 0 } = usage.prompt_tokens_details;
  const share = cached / Math.max(1, usage.prompt_tokens);
  if (extension.remembered === "nothing" || cached === 0) {
    const ofImage = imageTokens > 0 ? `, ${number(imageTokens)} of the image` : "";
    return { words: `Not cached: ${number(usage.prompt_tokens)} prompt tokens read${ofImage}.`, share: 0 };
  }
  const what = extension.remembered === "image" ? "image" : "conversation";
  return { words: `Cached ${what}: ${number(cached)} of ${number(usage.prompt_tokens)} prompt tokens.`, share };
}

/** How an answer ended, unless it is complete. */
export function endingText({ outcome, finish, usage }) {
  if (outcome === "stopped") return "Stopped.";
  return finish === "length" ? `Cut at the limit of ${usage ? tokens(usage.completion_tokens) : "its length"}.` : "";
}

/** A conversation as plain text. */
export function transcript({ image, turns }, model) {
  const head = image ? [`Image: ${image.name} (${image.width} × ${image.height})`] : [];
  return [...head, ...turns.flatMap(({ question, answer }) => [`You: ${question}`, `${model}: ${answer}`])].join("\n\n") + "\n";
}
