/* Talking to the server: what is asked, how an answer arrives, what can go wrong. Knows nothing of the page's elements.

Owns: EventReader, ask, listModels, countTokens, messagesOf, readPicture, and Problem, the only error that people are told.
Invariants: an answer is whole only after [DONE]; the key goes into the header of a request and nowhere else. */

const MOST_SIDE = 2048;
const MOST_PNG_BYTES = 2 << 20; // eight such pictures fit into a request, as the server counts

/** What went wrong, as a sentence for people; status is that of the response, 0 where there was none. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Server-sent events from bytes that are split anywhere, also inside a character or between CR and LF. */
export class EventReader {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];
  #isAfterCr = false;

  /** Take bytes; return the data of the events that they complete. */
  push(bytes) {
    const text = this.#decoder.decode(bytes, { stream: true });
    if (!text) return [];
    const lines = (this.#rest + (this.#isAfterCr && text[0] === "\n" ? text.slice(1) : text)).split(/\r\n|\n|\r/);
    this.#isAfterCr = text.endsWith("\r");
    this.#rest = lines.pop();
    const found = [];
    for (const line of lines) {
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line === "" && this.#data.length) found.push(this.#data.splice(0).join("\n"));
    }
    return found;
  }
}

/** Ask for an answer; yields the server's chunks as they come. Throws Problem, and AbortError once signal is aborted. */
export async function* ask(body, key, signal) {
  const response = await call("v1/chat/completions", key, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.getReader();
  const events = new EventReader();
  let isDone = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal.aborted ? error : new Problem("The answer was cut off: the connection broke.");
      });
      if (done && isDone) return;
      if (done) throw new Problem("The answer was cut off.");
      for (const data of events.push(value)) {
        isDone ||= data === "[DONE]";
        if (!isDone) yield readChunk(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves early has the server stop, too
  }
}

/** List the names of the models. */
export async function listModels(key) {
  const response = await call("v1/models", key);
  return (await response.json()).data.map((model) => model.id);
}

/** Tell how many tokens of the prompt a picture takes. */
export async function countTokens(picture, model, key) {
  const content = [await imagePart(picture)];
  const response = await call("v1/tokenize", key, { model, messages: [{ role: "user", content }] });
  return (await response.json()).images[0].tokens;
}

/** Write turns as the API has them, the last one as the question; what got no answer is left out, since roles must alternate. */
export async function messagesOf(turns, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { question, pictures, reply } of turns.filter((turn) => turn === turns.at(-1) || turn.reply.text.trim())) {
    const images = await Promise.all(pictures.map(imagePart));
    messages.push({ role: "user", content: question.trim() ? [...images, { type: "text", text: question }] : images });
    messages.push({ role: "assistant", content: reply.text });
  }
  return messages.slice(0, -1);
}

/** Read a file as a picture: drawn anew on white, so that nothing but its pixels is sent, and scaled down where it is large. */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem(`${file.name} is no picture that this browser can read.`);
  });
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const exact = await canvas.convertToBlob({ type: "image/png" });
  const blob = exact.size <= MOST_PNG_BYTES ? exact : await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return { name: file.name, blob, url: URL.createObjectURL(blob), width, height, tokens: null };
}

async function call(path, key, body, signal) {
  if (!/^[!-~]*$/.test(key)) throw new Problem("An API key has no spaces and no letters beyond ASCII.", 401);
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Problem("The server cannot be reached. Is it running?");
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const told = await response.json().then((body) => String(body.error.message).replace(/\.$/, ""), () => "it did not say why");
  const wait = Number.parseInt(response.headers.get("retry-after"), 10);
  const again = wait > 0 ? ` Try again in ${wait} s.` : "";
  if (status === 401) return new Problem("The server wants a valid API key.", status);
  if (status === 429 || status === 503) return new Problem(`The server is busy: ${told}.${again}`, status);
  return new Problem(`The server ${status < 500 ? "refused this" : "failed"} (${status}): ${told}.${again}`, status);
}

function readChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Problem("The answer was cut off: the server sent something else.");
  }
  if (chunk.error) throw new Problem(`The answer was cut off: ${chunk.error.message}.`);
  return chunk;
}

async function imagePart({ blob }) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("A picture cannot be read any more."));
    reader.readAsDataURL(blob);
  });
  return { type: "image_url", image_url: { url } };
}
