// What the user does: ask, stop, and the keys.
"use strict";

// Answer `messages`. Where nothing comes of it, the conversation is as before, and the message is back in its box.
async function ask(messages) {
  const before = chat.messages;
  chat.messages = messages;
  save();
  draw();
  const answer = new Answer();
  busy(new AbortController());
  at("scroll").scrollTop = at("scroll").scrollHeight;
  let failed = null;
  try {
    await findModel();
    const response = await post("v1/chat/completions", body(), running.signal);
    for await (const chunk of events(response)) keepInView(() => answer.take(chunk));
  } catch (error) { failed = error; }
  busy(null);
  if (failed && answer.empty) giveBack(before, messages, failed);
  else chat.messages = [...messages, answer.end(failed)];
  save();
  keepInView(draw);
  if (document.activeElement === document.body) focusMessage();
}

function giveBack(before, messages, failed) {
  chat.messages = before;
  const last = messages.at(-1);
  if (!at("say").value && last !== before.at(-1)) at("say").value = last.content;
  problem(failed);
}

function busy(controller) {
  running = controller;
  at("send").textContent = running ? "Stop" : at("send").dataset.word;
  at("state").textContent = running ? "waiting…" : "";
  at("new").disabled = running !== null;
  if (running) problem(null);
  drawList();
}

function problem(error) {
  const text = error && error.name !== "AbortError" ? error.message : "";
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function classify(text) {
  busy(new AbortController());
  try {
    const [found] = (await read(await post("v1/classify", {model: model.id, input: text}, running.signal))).data;
    const answer = make("div", {kind: "text"}, ...(found.tokens ? [tokenTable(found.tokens)] : shares(found.scores)));
    at("talk").querySelector(".soft")?.remove();
    at("talk").append(make("article", {kind: "turn user", "aria-label": "You"}, make("div", {kind: "text", text})));
    at("talk").append(make("article", {kind: "turn assistant", "aria-label": "Answer"}, answer));
    at("spoken").textContent = answer.innerText;
    at("say").value = "";
    at("scroll").scrollTop = at("scroll").scrollHeight;
  } catch (error) { problem(error); }
  busy(null);
}

function tokenTable(tokens) {
  const row = ({token, label, scores}) => make("tr", {}, make("td", {}, make("code", {text: token})), make("td", {text: label}), make("td", {kind: "right", text: scores[label].toFixed(3)}));
  return make("div", {kind: "wide"}, make("table", {}, ...tokens.map(row)));
}

function shares(scores) {
  const sorted = Object.entries(scores).sort((a, b) => b[1] - a[1]);
  return sorted.map(([label, score]) => make("div", {kind: "label"}, make("span", {text: label}), make("meter", {value: score, max: 1, "aria-label": label}), make("span", {text: (100 * score).toFixed(1) + " %"})));
}

// ---- The message box -----------------------------------------------------------------------------
const WORDS = {
  "causal-lm": ["Send", "Message"],
  "sequence-classification": ["Classify", "A text to classify"],
  "token-classification": ["Classify", "A text whose tokens to classify"],
};
const chats = () => !model || model.task === "causal-lm";

function askForInput() {
  const [word, hint] = WORDS[model?.task] || WORDS["causal-lm"];
  const open = chats() ? openCalls() : [];
  at("send").dataset.word = word;
  if (!running) at("send").textContent = word;
  at("say").placeholder = open.length ? "Result of " + titleOfCall(open[0]) : hint;
  if (model?.task === "encoder") problem(new Error("This model makes vectors of texts: ask /v1/embeddings. It does not chat."));
}

function send() {
  const text = at("say").value;
  if (!text.trim()) return;
  if (!chats()) { classify(text); return; }
  at("say").value = "";
  const open = openCalls();
  const message = open.length ? {role: "tool", tool_call_id: open[0].id, content: text} : {role: "user", content: text};
  if (open.length < 2) { ask([...chat.messages, message]); return; }
  chat.messages.push(message);
  save();
  draw();
}

// ---- Keys ----------------------------------------------------------------------------------------
const newChat = () => { if (!running) choose(newConversation()); };
const toggleSide = () => { showSide(at("side").hidden); if (!at("side").hidden) at("new").focus(); };
const showKeys = () => { if (!at("keys").open) at("keys").showModal(); };
// Keys that work everywhere on the page; Ctrl is also the Mac's Command.
const KEYS = {
  "Escape": () => { if (at("keys").open) return; if (running) running.abort(); else if (narrow.matches) showSide(false); },
  "Shift+Escape": () => at("say").focus(),
  "Ctrl+Shift+O": newChat,
  "Ctrl+Shift+S": toggleSide,
  "Ctrl+/": showKeys,
};

function nameOfKey(event) {
  const shifted = event.shiftKey && event.key !== "/";  // some keyboards have / on a shifted key
  const held = [(event.ctrlKey || event.metaKey) && "Ctrl", shifted && "Shift"].filter(Boolean);
  return [...held, event.key.length === 1 ? event.key.toUpperCase() : event.key].join("+");
}

document.addEventListener("keydown", event => {
  const act = KEYS[nameOfKey(event)];
  if (!act || (!chats() && event.key !== "Escape")) return;
  if (event.ctrlKey || event.metaKey) event.preventDefault();
  act();
});
at("say").addEventListener("keydown", event => {
  if (event.isComposing || event.shiftKey) return;
  if (event.key === "Enter") { event.preventDefault(); if (!running) send(); }
  if (event.key === "ArrowUp" && !at("say").value) { event.preventDefault(); editLast(); }
});

// ---- Start ---------------------------------------------------------------------------------------
at("form").addEventListener("submit", event => { event.preventDefault(); if (running) running.abort(); else send(); });
at("new").addEventListener("click", newChat);
at("fold").addEventListener("click", toggleSide);
at("undo").addEventListener("click", bringBack);
at("page").addEventListener("pointerdown", () => { if (narrow.matches) showSide(false); });
at("help").addEventListener("click", showKeys);
at("close").addEventListener("click", () => at("keys").close());
at("models").addEventListener("change", () => useModel(models.find(one => one.id === at("models").value)));
at("key").addEventListener("change", () => findModel().then(() => problem(null), problem));
narrow.addEventListener("change", () => showSide(!narrow.matches));
addEventListener("storage", event => { if (event.key === STORE || event.key === null) takeOver(); });
showSide(!narrow.matches);
kept = readStore();
choose(kept[0] || newConversation());
findModel().catch(error => { problem(error); at("more").open = true; });
