// The server's API: JSON requests and server-sent events. Every failure is an Error whose message is one sentence.

// Relative to the page, so that it works behind a path prefix; fetch refuses URLs that carry a password.
const base = new URL(".", document.baseURI);
base.username = "";
base.password = "";

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(path, options) {
  try {
    return await fetch(new URL(path, base), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

/** The sentence of an error response in OpenAI's shape, or one made from its status. */
async function refusal(response) {
  let message = null;
  try {
    message = (await response.json())?.error?.message;
  } catch {
    // Not JSON: a proxy's page, say. Its status is what there is to tell.
  }
  if (typeof message !== "string" || !message)
    message = `The server answered ${response.status} ${response.statusText}`.trimEnd() + ".";
  return new ApiError(message, response.status);
}

/** The JSON of a GET; statuses in `accept` count as answers too. */
export async function getJson(path, { signal, accept = [] } = {}) {
  const response = await request(path, { signal });
  if (!response.ok && !accept.includes(response.status)) throw await refusal(response);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const reason =
      error instanceof SyntaxError ? `The server's answer to ${path} is not JSON.` : "The server cannot be reached.";
    throw new ApiError(reason, response.status);
  }
}

/** The lines of a byte stream, whatever the places where it was cut. */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.endsWith("\r") ? part.slice(0, -1) : part;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of a streamed chat completion; throws ApiError where the server sends an error or breaks off. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const line of lines(response.body)) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error)
        throw new ApiError(chunk.error.message ?? "The server reported an error without a reason.", response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent a chunk that is not JSON.", response.status);
    throw new ApiError("The connection broke before the answer ended.");
  }
  throw new ApiError("The server closed the stream before the answer ended.");
}
