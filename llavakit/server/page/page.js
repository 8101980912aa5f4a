/* The page: conversations on the screen, and everything that can be pressed, typed, pasted or dropped.

Owns: all elements. Refuses: HTTP (chat.js). Invariants: what people, models and files say becomes text nodes, never markup; an element
is made once and changed in place, so that nothing loses the focus; each attempt to answer is an object of its own, so that one which was
stopped cannot write into the next. */

import { Problem, ask, countTokens, listModels, messagesOf, readPicture } from "./chat.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const THEME = "llava-theme"; // the only thing that the page stores
const MEASURED_S = 0.1;
const NEAR_PX = 60; // so close to its end the log follows a growing answer

const at = (id) => document.getElementById(id);
const [log, box, tray, settings] = ["log", "question", "tray", "settings"].map(at);
const osDark = matchMedia("(prefers-color-scheme: dark)");
const conversations = [];
let shown; // the one of them on the screen
let reading = Promise.resolve(); // pictures are read one after the other, and a question waits for them

/** Make an element; strings among its children become text. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function button(text, press, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", press);
  return made;
}

/** Have a screen reader say something. */
const tell = (text) => at("status").replaceChildren(text);

function notice(text, ...buttons) {
  at("notice").replaceChildren(...(text ? [text, ...buttons] : []));
}

/** Change the log, and stay at its end where that is what can be seen. */
function following(change) {
  const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  change();
  if (isNear) log.scrollTop = log.scrollHeight;
}

/** Put the focus into the box, except where that would raise a phone's keyboard. */
function focusBox() {
  if (!matchMedia("(pointer: coarse)").matches) box.focus();
}

const isRunning = (conversation) => conversation.turns.at(-1)?.reply.state === "running";
const key = () => at("key").value.trim();

// Conversations

function addConversation() {
  const conversation = { turns: [], draft: { text: "", pictures: [] } };
  conversation.entry = button("", () => show(conversation));
  conversations.push(conversation);
  at("conversations").prepend(element("li", {}, conversation.entry));
  return conversation;
}

function show(conversation) {
  shown = conversation;
  log.replaceChildren(at("empty"), ...conversation.turns.map((turn) => turn.view.root));
  log.scrollTop = log.scrollHeight;
  showDraft();
  refresh();
  if (at("list").matches(":popover-open")) at("list").hidePopover();
  focusBox();
}

function showDraft() {
  box.value = shown.draft.text;
  tray.replaceChildren(...shown.draft.pictures.map((picture) => picture.item));
}

/** Bring up to date what depends on more than one turn. */
function refresh() {
  for (const conversation of conversations) {
    const { entry, turns } = conversation;
    entry.replaceChildren(turns.length ? turns[0].question || "A picture" : "Nothing asked yet", isRunning(conversation) ? " …" : "");
    entry.setAttribute("aria-current", conversation === shown);
  }
  const isBusy = isRunning(shown);
  const last = shown.turns.at(-1)?.view;
  const focused = document.activeElement;
  at("empty").hidden = shown.turns.length > 0;
  at("clear").disabled = shown.turns.length === 0;
  at("send").hidden = isBusy;
  at("stop").hidden = !isBusy;
  for (const { view } of shown.turns) view.retry.hidden = isBusy || view !== last;
  // A button that is hidden now hands on its focus.
  if (focused === at("send") && isBusy) box.focus();
  if (focused === last?.retry && isBusy) at("stop").focus();
  if (focused === at("stop") && !isBusy) (last?.retry ?? box).focus();
}

function clear() {
  stop(shown);
  forget(shown.turns.splice(0).flatMap((turn) => turn.pictures));
  show(shown);
  tell("Cleared.");
}

/** Free the memory of pictures that nothing shows any more. */
function forget(pictures) {
  for (const { url } of pictures) URL.revokeObjectURL(url);
}

// Questions

async function send() {
  const conversation = shown;
  await reading;
  const { text, pictures } = conversation.draft;
  if (isRunning(conversation) || !(text.trim() || pictures.length)) return;
  conversation.draft = { text: "", pictures: [] };
  if (conversation === shown) showDraft();
  const turn = { question: text.trim(), pictures };
  turn.view = turnView(conversation, turn);
  conversation.turns.push(turn);
  if (conversation === shown) log.append(turn.view.root);
  await answer(conversation, turn);
}

function turnView(conversation, turn) {
  const view = {
    answer: element("p", { class: "answer" }),
    problem: element("p", { class: "problem" }),
    facts: element("span", { class: "facts" }),
    retry: button("Retry", () => answer(conversation, turn)),
  };
  const pictures = turn.pictures.map(({ url, name }) => element("img", { src: url, alt: `Picture: ${name}`, title: name }));
  const asked = element("div", { class: "asked" }, element("h2", { class: "unseen" }, "You asked"), ...pictures);
  const question = turn.question ? [element("p", { class: "question" }, turn.question)] : [];
  const editing = button("Edit", () => edit(conversation, turn), { class: "small", "aria-label": "Edit this question" });
  asked.append(element("div", { class: "said" }, ...question, editing));
  const foot = element("p", { class: "foot" }, view.facts, view.retry);
  const told = element("div", { class: "told" }, element("h2", { class: "unseen" }, "Answer"), view.answer, view.problem, foot);
  view.root = element("article", {}, asked, told);
  return view;
}

/** Take a question back into the box, and drop what came after it. */
function edit(conversation, turn) {
  stop(conversation);
  const dropped = conversation.turns.splice(conversation.turns.indexOf(turn));
  for (const { view } of dropped) view.root.remove();
  forget([...conversation.draft.pictures, ...dropped.slice(1).flatMap((later) => later.pictures)]);
  conversation.draft = { text: turn.question, pictures: turn.pictures };
  showDraft();
  refresh();
  box.focus();
}

// Answers

async function answer(conversation, turn) {
  const times = { began: performance.now(), first: null, last: null };
  const reply = { text: "", state: "running", problem: "", numPieces: 0, usage: null, finish: "", times, stopper: new AbortController() };
  turn.reply = reply;
  draw(turn);
  refresh();
  log.scrollTop = log.scrollHeight;
  tell("Answering.");
  try {
    if (!at("model").value) await fillModels();
    const body = { model: at("model").value, messages: await messagesOf(conversation.turns, at("system").value), ...sampling() };
    for await (const chunk of ask(body, key(), reply.stopper.signal)) {
      if (reply.state !== "running") return;
      take(chunk, reply);
      draw(turn);
    }
    reply.state = "done";
  } catch (error) {
    if (reply.state !== "running") return; // it was stopped, and stop has told so
    reply.state = "failed";
    reply.problem = error instanceof Problem ? error.message : `Something went wrong in this page: ${error.message}`;
    turn.isLocked = error.status === 401;
    if (turn.isLocked) askForKey();
  }
  draw(turn);
  refresh();
  if (conversation === shown) tell(reply.problem || `Answer: ${reply.text}`);
}

function take(chunk, reply) {
  reply.usage = chunk.usage ?? reply.usage;
  const choice = chunk.choices?.[0];
  reply.finish = choice?.finish_reason ?? reply.finish;
  if (!choice?.delta?.content) return;
  reply.text += choice.delta.content;
  reply.numPieces += 1;
  reply.times.last = performance.now();
  reply.times.first ??= reply.times.last;
}

function stop(conversation) {
  if (!isRunning(conversation)) return;
  const turn = conversation.turns.at(-1);
  turn.reply.state = "stopped";
  turn.reply.stopper.abort();
  draw(turn);
  refresh();
  tell("Stopped.");
}

function draw({ reply, view }) {
  following(() => {
    view.root.dataset.state = reply.state;
    view.answer.textContent = reply.text;
    view.answer.setAttribute("aria-busy", reply.state === "running");
    view.problem.textContent = reply.problem;
    view.facts.textContent = reply.state === "running" ? "" : factsOf(reply).join(" · ");
  });
}

/** Say what an answer took. A stopped one comes without the server's count; each of its pieces is about a token. */
function factsOf({ state, finish, usage, numPieces, times }) {
  const numTokens = usage?.completion_tokens ?? numPieces;
  const [first_s, whole_s] = [times.first, times.last].map((time) => (time - times.began) / 1000);
  const facts = state === "stopped" ? ["stopped"] : finish === "length" ? ["ended at max tokens"] : [];
  if (!numTokens) return facts;
  facts.push(`${usage ? "" : "about "}${numTokens} token${numTokens === 1 ? "" : "s"}`);
  if (numPieces) facts.push(`${Number(speed(numTokens, first_s, whole_s).toPrecision(3))} tokens/s`, `first after ${first_s.toFixed(2)} s`);
  if (usage) facts.push(`${usage.prompt_tokens} prompt tokens`);
  return facts;
}

/** Tokens in a second after the first one; of answers that come nearly at once, the waiting counts too, or chance would be measured. */
function speed(numTokens, first_s, whole_s) {
  const decode_s = whole_s - first_s;
  return decode_s > MEASURED_S ? (numTokens - 1) / decode_s : numTokens / whole_s;
}

// Pictures

function addPictures(files) {
  const conversation = shown;
  notice("");
  for (const file of files) reading = reading.then(() => addPicture(conversation, file));
}

async function addPicture(conversation, file) {
  try {
    const picture = await readPicture(file);
    picture.caption = element("span", {}, `${picture.width} × ${picture.height}`);
    const remove = button("×", () => removePicture(conversation, picture), { "aria-label": `Remove ${picture.name}`, title: "Remove" });
    picture.item = element("li", {}, element("img", { src: picture.url, alt: `Picture: ${picture.name}` }), picture.caption, remove);
    conversation.draft.pictures.push(picture);
    if (conversation === shown) tray.append(picture.item);
    tell(`${picture.name} added.`);
    price(picture);
  } catch (error) {
    notice(error instanceof Problem ? error.message : `${file.name} cannot be read: ${error.message}`);
  }
}

function removePicture(conversation, picture) {
  conversation.draft.pictures = conversation.draft.pictures.filter((other) => other !== picture);
  picture.item.remove();
  forget([picture]);
  tell(`${picture.name} removed.`);
  box.focus();
}

/** Say what a picture costs; where that fails the question will fail too, and tell why. */
async function price(picture) {
  const tokens = at("model").value ? await countTokens(picture, at("model").value, key()).catch(() => null) : null;
  if (tokens !== null) picture.caption.append(` · ${tokens} tokens`);
}

// Settings

function sampling() {
  const given = NUMBERS.map((name) => [name, at(name).valueAsNumber]);
  return Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
}

async function fillModels() {
  const names = await listModels(key());
  const chosen = at("model").value;
  at("model").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) at("model").value = chosen;
}

async function loadModels() {
  try {
    await fillModels();
    notice("");
    return true;
  } catch (error) {
    notice(error.message, button("Try again", loadModels));
    if (error.status === 401) askForKey();
    return false;
  }
}

function askForKey() {
  at("key-hint").textContent = "This server wants a valid key. It is kept in this page’s memory.";
  at("key").setAttribute("aria-invalid", "true");
  settings.showPopover();
  at("key").focus();
}

/** Go on with a new key where the lack of one stopped us. */
async function useKey() {
  at("key").removeAttribute("aria-invalid");
  settings.hidePopover();
  focusBox();
  const turn = shown.turns.at(-1);
  if (await loadModels() && turn?.isLocked && turn.reply.state === "failed") await answer(shown, turn);
}

function theme() {
  return document.documentElement.dataset.theme ?? (osDark.matches ? "dark" : "light");
}

function nameTheme() {
  const label = `Switch to ${theme() === "dark" ? "light" : "dark"}`;
  for (const name of ["aria-label", "title"]) at("theme").setAttribute(name, label);
}

function switchTheme() {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  withStorage((storage) => storage.setItem(THEME, theme()));
  nameTheme();
}

function restoreTheme() {
  const kept = withStorage((storage) => storage.getItem(THEME));
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  nameTheme();
}

/** Use the browser's storage; where it is forbidden the choice of a theme lasts as long as the page. */
function withStorage(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

// Events

function listen() {
  document.addEventListener("submit", (event) => event.preventDefault());
  at("ask").addEventListener("submit", send);
  at("key-form").addEventListener("submit", useKey);
  at("new").addEventListener("click", () => show(conversations.find(({ turns }) => !turns.length) ?? addConversation()));
  at("clear").addEventListener("click", clear);
  at("stop").addEventListener("click", () => stop(shown));
  at("theme").addEventListener("click", switchTheme);
  at("pick").addEventListener("click", () => at("files").click());
  at("files").addEventListener("change", () => {
    addPictures([...at("files").files]);
    at("files").value = ""; // the same file may be chosen again
  });
  at("examples").addEventListener("click", ({ target }) => {
    if (target.matches("button")) box.value = shown.draft.text = target.textContent;
    box.focus();
  });
  box.addEventListener("input", () => (shown.draft.text = box.value));
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector(":popover-open")) stop(shown);
  });
  osDark.addEventListener("change", nameTheme);
}

function listenToPictures() {
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    addPictures(files);
  });
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    addPictures([...event.dataTransfer.files]);
  });
}

restoreTheme();
listen();
listenToPictures();
show(addConversation());
loadModels();
