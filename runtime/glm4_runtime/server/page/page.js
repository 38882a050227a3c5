// The input.
"use strict";

const WORDS = {"causal-lm": ["Send", "Message (Enter sends, Shift+Enter breaks the line, Esc stops)"], "sequence-classification": ["Classify", "A text to classify"], "token-classification": ["Classify", "A text whose tokens to classify"]};

function askForInput() {
  const [word, hint] = WORDS[model?.task] || WORDS["causal-lm"];
  const open = model && model.task !== "causal-lm" ? [] : openCalls();
  at("send").dataset.word = word;
  if (!running) at("send").textContent = word;
  at("say").placeholder = open.length ? "Result of " + open[0].function.name : hint;
  if (model?.task === "encoder") problem("This model makes vectors of texts: ask /v1/embeddings. It does not chat.");
}

function send() {
  const text = at("say").value;
  if (!text.trim()) return;
  if (model && model.task !== "causal-lm") { classify(text); return; }
  at("say").value = "";
  const open = openCalls();
  const message = open.length ? {role: "tool", tool_call_id: open[0].id, content: text} : {role: "user", content: text};
  if (open.length < 2) { ask([...chat.messages, message]); return; }
  chat.messages.push(message);
  save();
  draw();
}

at("form").addEventListener("submit", event => { event.preventDefault(); if (running) running.abort(); else send(); });
at("say").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(); }
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && running) running.abort(); });
at("new").addEventListener("click", () => choose({messages: []}));
at("fold").addEventListener("click", () => showSide(at("side").hidden));
narrow.addEventListener("change", () => showSide(!narrow.matches));
at("key").addEventListener("change", () => findModel().then(() => problem("")).catch(error => problem(error.message)));
showSide(!narrow.matches);
load();
choose(kept[0] || {messages: []});
findModel().catch(error => { problem(error.message); at("more").open = true; });
