// The server's API as the page needs it: the answer of one model to a conversation, as it is written.
//
//   ask -> POST /v1/chat/completions or /v1/completions (stream) -> pieces {text, tokens}
//
// An ask: {model, settings, system, exchanges, question, begun, inside}. `exchanges` are the questions
// before, each with this model's answer; `begun` is the beginning of an answer to be continued.
// A token: {text, logprob, special, top}; a special token has a name and no text.

const N_ALTERNATIVES = 8;

const baseModels = new Set(); // models without a chat template: they continue the text
const specialNames = new Map(); // of a model: the names of its special tokens
let key = "";

export function setKey(text) {
  key = text;
}

export const isBase = (model) => baseModels.has(model);

function headers() {
  const auth = key ? { authorization: `Bearer ${key}` } : {};
  return { "content-type": "application/json", ...auth };
}

export async function getResponse(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response;
}

export async function getJson(path) {
  return (await getResponse(path)).json();
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error;
  } catch {
    // not JSON: a proxy between us and the server
  }
  const problem = new Error(error.message || `The server answered ${response.status}.`);
  problem.param = error.param;
  problem.status = response.status;
  return problem;
}

// The events of a stream, until [DONE].
async function* stream(path, body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch(path, options);
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The conversation in the form of OpenAI's chats.
export function messagesOf({ system, exchanges }) {
  const messages = exchanges.flatMap(({ question, answer }) => [
    { role: "user", content: question },
    { role: "assistant", content: answer },
  ]);
  if (system) messages.unshift({ role: "system", content: system });
  return messages;
}

function chatToken({ token, logprob, bytes }) {
  return { text: token, logprob, special: bytes?.length === 0 };
}

async function* chatPieces(ask, signal) {
  const messages = [...messagesOf(ask), { role: "user", content: ask.question }];
  const body = { ...ask.settings, model: ask.model, stream: true, messages };
  if (ask.begun) {
    messages.push({ role: "assistant", content: ask.begun });
    body.continue_final_message = true;
  }
  if (ask.inside) Object.assign(body, { logprobs: true, top_logprobs: N_ALTERNATIVES });
  for await (const event of stream("/v1/chat/completions", body, signal)) {
    const choice = event.choices[0];
    if (!choice) continue;
    const tokens = (choice.logprobs?.content || []).map((token) => ({
      ...chatToken(token),
      top: token.top_logprobs.map(chatToken),
    }));
    yield { text: choice.delta?.content || "", tokens };
  }
}

// A plain completion has special tokens by name, like text.
async function specialOf(model) {
  if (!specialNames.has(model)) {
    const info = await getJson(`/tokenizer_info?model=${encodeURIComponent(model)}`);
    specialNames.set(model, new Set(info.special_tokens));
  }
  return specialNames.get(model);
}

async function* textPieces(ask, signal) {
  const before = ask.exchanges.map(({ question, answer }) => question + answer).join("");
  const prompt = before + ask.question + ask.begun;
  const body = { ...ask.settings, model: ask.model, stream: true, prompt };
  if (ask.inside) body.logprobs = N_ALTERNATIVES;
  const names = ask.inside ? await specialOf(ask.model) : new Set();
  const token = (text, logprob) => ({ text, logprob, special: names.has(text) });
  for await (const event of stream("/v1/completions", body, signal)) {
    const choice = event.choices[0];
    if (!choice) continue;
    const found = choice.logprobs;
    const tokens = (found?.tokens || []).map((text, i) => ({
      ...token(text, found.token_logprobs[i]),
      top: Object.entries(found.top_logprobs[i] || {})
        .map(([other, logprob]) => token(other, logprob))
        .sort((a, b) => b.logprob - a.logprob),
    }));
    yield { text: choice.text || "", tokens };
  }
}

// The pieces of an answer.
export async function* pieces(ask, signal) {
  if (!baseModels.has(ask.model)) {
    try {
      yield* chatPieces(ask, signal);
      return;
    } catch (error) {
      // Only a base model refuses its own name.
      if (error.status !== 400 || error.param !== "model") throw error;
      baseModels.add(ask.model);
    }
  }
  yield* textPieces(ask, signal);
}

// The bytes of a token. The API writes half a character as `bytes:\xe2`.
function bytesOf(token) {
  if (token.special) return [];
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token.text)) return [...new TextEncoder().encode(token.text)];
  return token.text.match(/\\x../g).map((byte) => parseInt(byte.slice(2), 16));
}

// The text of tokens; null if it ends within a character.
export function textOf(tokens) {
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return decoder.decode(new Uint8Array(tokens.flatMap(bytesOf)));
  } catch {
    return null;
  }
}
