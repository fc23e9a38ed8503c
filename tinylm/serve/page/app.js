// The page of `tinylm serve`: a chat with one model or with two side by side, the tokens of an answer,
// and the reports of runs.
//
//   composer -> exchanges -> api.js, once for each side -> pieces -> the answer, drawn again
//
// It uses the same API as every other client. Text of a model is never markup: it is shown as plain
// text, or as Markdown that DOMPurify has cleaned.

import { getJson, getResponse, isBase, messagesOf, pieces, setKey, textOf } from "/api.js";
import { marked } from "/vendor/marked.js";
import DOMPurify from "/vendor/purify.js";

// Tags in the text of a model stay text; DOMPurify has to clean only what Markdown makes.
marked.use({ renderer: { html: ({ text }) => element("span", "", text).innerHTML } });

const get = (id) => document.getElementById(id);
const RELOAD_MS = 10000;

// The conversation: {question, answers}, and of each side an answer {model, text, tokens}, or none.
// Both sides have the same questions, and each model sees its own answers to them. Tokens are kept if
// "look inside" was on.
let exchanges = [];
// Of each side, the answer that is being written: {abort, done, isWaiting}.
const running = [null, null];

const modelOf = (side) => get(side ? "second" : "model").value;
const sides = () => (get("second").value ? [0, 1] : [0]);
const isBusy = () => running.some(Boolean);

// --- asking ---

function settings() {
  const number = (id) => (get(id).value === "" ? undefined : Number(get(id).value));
  const names = ["temperature", "top_p", "max_tokens", "seed"];
  return Object.fromEntries(names.map((name) => [name, number(name)]));
}

// What one side has answered before exchange `end`. A question without an answer is left out, since a
// chat has an answer to each question.
function conversation(end, side) {
  const found = exchanges.slice(0, end).map(({ question, answers }) => ({
    question,
    answer: answers[side]?.text,
  }));
  return {
    system: get("system").value.trim(),
    exchanges: found.filter(({ answer }) => answer),
  };
}

// Writes the answer of one side to question `index`; `tokens` are its first ones, if any. What follows
// it is forgotten.
async function answer(index, side, tokens = []) {
  exchanges = exchanges.slice(0, index + 1);
  const { question, answers } = exchanges[index];
  const written = { model: modelOf(side), text: textOf(tokens), tokens: [...tokens] };
  answers[side] = written;
  const ask = {
    ...conversation(index, side),
    model: written.model,
    settings: settings(),
    question,
    begun: written.text,
    inside: get("inside").checked,
  };
  const run = { abort: new AbortController(), isWaiting: false };
  running[side] = run;
  run.done = write(ask, written, run, index, side);
  draw();
  await run.done;
  running[side] = null;
  if (!written.text && answers[side] === written) answers[side] = null;
  draw();
}

async function write(ask, written, run, index, side) {
  try {
    for await (const piece of pieces(ask, run.abort.signal)) {
      if (run.abort.signal.aborted) return;
      written.text += piece.text;
      written.tokens.push(...piece.tokens);
      drawAnswer(index, side);
    }
  } catch (error) {
    const other = running[1 - side];
    const isOneOfTwo = sides().length > 1 && !run.isWaiting && !other?.isWaiting;
    if (error.status === 503 && isOneOfTwo) {
      // The server may have room for one of the two models only.
      run.isWaiting = true;
      await other?.done;
      await write(ask, written, run, index, side);
    } else if (error.name !== "AbortError") {
      addError(sides().length > 1 ? `${ask.model}: ${error.message}` : error.message);
    }
  }
}

// Asks question `index` again, or for the first time, on all sides.
function askAll(index) {
  exchanges = exchanges.slice(0, index + 1);
  exchanges[index].answers = [null, null];
  showError("");
  for (const side of sides()) answer(index, side);
}

function regenerate(index, side, tokens) {
  showError("");
  answer(index, side, tokens);
}

function stop() {
  for (const run of running) run?.abort.abort();
}

// A second model continues the conversation of the first.
function chooseSecond() {
  const isTwo = sides().length > 1;
  for (const { answers } of exchanges) answers[1] = isTwo ? answers[1] || answers[0] : null;
  draw();
}

// --- drawing ---

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(label, action) {
  const made = element("button", "", label);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function draw() {
  const items = exchanges.flatMap((_, index) => [
    questionItem(index),
    ...sides().map((side) => answerItem(index, side)),
  ]);
  get("turns").replaceChildren(...items);
  document.body.classList.toggle("two", sides().length > 1);
  const busy = isBusy();
  get("send").hidden = busy;
  get("stop").hidden = !busy;
  get("model").disabled = busy;
  get("second").disabled = busy;
  get("export").disabled = busy || !exportRows();
  get("turns").lastElementChild?.scrollIntoView({ block: "nearest" });
}

function drawAnswer(index, side) {
  const place = index * (1 + sides().length) + 1 + side;
  get("turns").children[place].replaceWith(answerItem(index, side));
  get("turns").lastElementChild.scrollIntoView({ block: "nearest" });
}

function questionItem(index) {
  const { question } = exchanges[index];
  const item = element("li", "turn user");
  item.append(element("div", "who", "you"), element("div", "content plain", question));
  const save = (text) => {
    exchanges[index].question = text;
    askAll(index);
  };
  if (!isBusy()) {
    item.append(actions(
      button("Copy", () => copy(question)),
      button("Edit", () => edit(item, question, "Send", save)),
    ));
  }
  return item;
}

function answerItem(index, side) {
  const found = exchanges[index].answers[side];
  const item = element("li", `turn assistant side-${side}`);
  item.append(element("div", "who", found?.model || modelOf(side)));
  item.append(found ? content(found, index, side) : element("div", "content soft", "No answer."));
  if (isBusy()) return item;
  const again = button("Regenerate", () => regenerate(index, side));
  if (!found) {
    item.append(actions(again));
    return item;
  }
  // An answer is only corrected, for the export and for what follows.
  const save = (text) => {
    exchanges[index].answers[side] = { ...found, text, tokens: [] };
    draw();
  };
  item.append(actions(
    button("Copy", () => copy(found.text)),
    button("Edit", () => edit(item, found.text, "Save", save)),
    again,
  ));
  return item;
}

function content(found, index, side) {
  if (found.tokens.length && get("inside").checked) return tokenView(found, index, side);
  if (isBase(found.model)) return element("div", "content plain", found.text);
  const made = element("div", "content");
  // No image and no form: neither may make the browser ask another site.
  const html = marked.parse(found.text, { async: false });
  made.append(DOMPurify.sanitize(html, {
    RETURN_DOM_FRAGMENT: true,
    FORBID_TAGS: ["img", "picture", "audio", "video", "svg", "math", "form", "input", "style"],
    FORBID_ATTR: ["style"],
  }));
  for (const link of made.querySelectorAll("a")) {
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
  return made;
}

// Each token as a button; the less probable it was, the darker.
function tokenView(found, index, side) {
  const made = element("div", "content tokens");
  found.tokens.forEach((token, position) => {
    const probability = Math.exp(token.logprob);
    const level = [0.01, 0.05, 0.2, 0.5].findIndex((limit) => probability < limit);
    const shown = button(token.text, () => showAlternatives(found, index, side, position));
    shown.className = level < 0 ? "token" : `token p${level}`;
    shown.title = `${percent(token.logprob)}; click for what it was chosen from`;
    made.append(shown);
  });
  return made;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

function showAlternatives({ tokens }, index, side, position) {
  const dialog = get("alternatives");
  const items = tokens[position].top.map((other) => {
    const item = element("li");
    const begun = [...tokens.slice(0, position), { ...other, top: tokens[position].top }];
    const choice = button("", () => {
      dialog.close();
      regenerate(index, side, begun);
    });
    choice.append(element("code", "", JSON.stringify(other.text)));
    choice.append(element("span", "", percent(other.logprob)));
    // The server is given text: neither half a character nor a special token.
    choice.disabled = isBusy() || other.special || textOf(begun) === null;
    item.append(choice);
    return item;
  });
  dialog.querySelector("ul").replaceChildren(...items);
  dialog.showModal();
}

function actions(...buttons) {
  const row = element("div", "actions");
  row.append(...buttons);
  return row;
}

function copy(text) {
  navigator.clipboard?.writeText(text);
}

function edit(item, text, label, save) {
  const area = element("textarea");
  area.value = text;
  area.rows = Math.min(12, text.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the turn");
  item.replaceChildren(area, actions(
    button(label, () => save(area.value)),
    button("Cancel", draw),
  ));
  area.focus();
}

function showError(text) {
  get("error").textContent = text;
  get("error").hidden = !text;
}

function addError(text) {
  showError([get("error").textContent, text].filter(Boolean).join("\n"));
}

// A row for finetune.py of each side's conversation, in the form of OpenAI's chats.
function exportRows() {
  const rows = sides().map((side) => conversation(exchanges.length, side));
  const written = rows.filter((row) => row.exchanges.length);
  return written.map((row) => `${JSON.stringify({ messages: messagesOf(row) })}\n`).join("");
}

function download() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([exportRows()], { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

// --- runs ---

let runs = [];

async function loadRuns() {
  try {
    runs = (await getJson("/runs")).data;
  } catch (error) {
    showError(error.message);
    return;
  }
  const chosen = get("run").value;
  get("run").replaceChildren(...runs.map((run) => {
    const option = element("option", "", `${run.name}: ${run.stage}, ${run.status}, step ${run.step}`);
    option.value = run.name;
    return option;
  }));
  if (runs.some((run) => run.name === chosen)) get("run").value = chosen;
  get("no-runs").hidden = runs.length > 0;
  showReport();
}

// The report is fetched, so that the key is sent with it, and shown in a frame without scripts.
let shown = "";

async function showReport() {
  const run = runs.find((found) => found.name === get("run").value);
  get("report").hidden = !run;
  if (!run || shown === `${run.name} ${run.updated}`) return;
  try {
    const response = await getResponse(`/runs/${encodeURIComponent(run.name)}`);
    get("report").srcdoc = await response.text();
    shown = `${run.name} ${run.updated}`;
  } catch (error) {
    get("report").hidden = true;
    showError(error.message);
  }
}

function show(view) {
  for (const name of ["chat", "runs"]) {
    get(name).hidden = name !== view;
    get(`show-${name}`).setAttribute("aria-pressed", String(name === view));
  }
  if (view === "runs") loadRuns();
}

// --- events ---

async function loadModels() {
  try {
    const { data } = await getJson("/v1/models");
    const options = () => data.map((model) => element("option", "", model.id));
    const none = element("option", "", "none");
    none.value = "";
    get("model").replaceChildren(...options());
    get("second").replaceChildren(none, ...options());
    showError("");
  } catch (error) {
    showError(error.message);
  }
  draw();
}

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = get("text").value;
  if (!text.trim() || isBusy()) return;
  get("text").value = "";
  exchanges.push({ question: text, answers: [null, null] });
  askAll(exchanges.length - 1);
});
get("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  get("composer").requestSubmit();
});
get("stop").addEventListener("click", stop);
get("new").addEventListener("click", () => {
  stop();
  exchanges = [];
  showError("");
  draw();
});
get("inside").addEventListener("change", draw);
get("second").addEventListener("change", chooseSecond);
get("export").addEventListener("click", download);
get("key").addEventListener("change", () => {
  setKey(get("key").value);
  loadModels();
});
get("show-chat").addEventListener("click", () => show("chat"));
get("show-runs").addEventListener("click", () => show("runs"));
get("run").addEventListener("change", showReport);
setInterval(() => get("runs").hidden || loadRuns(), RELOAD_MS);
loadModels();
