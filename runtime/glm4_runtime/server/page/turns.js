// Turns on the screen. A message of the conversation is {role, content}, as in the API, and what the page adds:
// `thought`, `note` (how an answer ended) and `figures` (how fast it came).
"use strict";

const ADDED = ["thought", "note", "figures"];

function draw() {
  const turns = chat.messages.map((message, index) => TURNS[message.role](message, index));
  at("talk").replaceChildren(...turns.length ? turns : [make("p", {kind: "soft", text: "Nothing is said yet."})]);
  askForInput();
}

const TURNS = {
  user(message, index) {
    const box = make("article", {kind: "turn user", "aria-label": "You"}, make("div", {kind: "text", text: message.content}));
    box.append(make("div", {kind: "acts"}, copyButton(() => message.content), button("Edit", () => edit(box, message, index))));
    return box;
  },
  tool(message, index) {
    const name = "Result of " + titleOfCall(callOf(message, index));
    return make("article", {kind: "turn", "aria-label": name}, folded("call result", name, message.content));
  },
  assistant(message, index) {
    const box = make("article", {kind: "turn assistant", "aria-label": "Answer"});
    if (message.thought) box.append(folded("thought", "Thought", message.thought));
    const text = make("div", {kind: "text"});
    new Markdown(text).show(message.content);
    box.append(text, ...(message.tool_calls || []).map(call => folded("call", "Calls " + titleOfCall(call), call.function.arguments)));
    for (const name of ["note", "figures"]) if (message[name]) box.append(make("p", {kind: "figures", text: message[name]}));
    const copies = message.content ? [copyButton(() => message.content)] : [];
    box.append(make("div", {kind: "acts"}, ...copies, button("Regenerate", () => again(index))));
    return box;
  },
};

// Calls of the last answer that have no result yet.
function openCalls() {
  const last = chat.messages.findLastIndex(message => message.role === "assistant");
  const answered = chat.messages.length - 1 - last;
  return last < 0 ? [] : (chat.messages[last].tool_calls || []).slice(answered);
}

function callOf(message, index) {
  const calls = chat.messages.slice(0, index).flatMap(one => one.tool_calls || []);
  return calls.findLast(call => call.id === message.tool_call_id);
}

function titleOfCall(call) {
  if (!call) return "a call";
  const given = call.function.arguments.replace(/\s+/g, " ");
  return call.function.name + " " + (given.length > 60 ? given.slice(0, 60) + "…" : given);
}

function edit(box, message, index) {
  if (running) return;
  const text = make("textarea", {rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Edit the message"});
  const close = () => { draw(); at("talk").children[index].querySelector(".acts").lastChild.focus(); };
  const form = make("form", {}, text, make("div", {kind: "row"}, make("button", {kind: "main", text: "Send", type: "submit"}), button("Cancel", close, "")));
  text.value = message.content;
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (text.value.trim() && !running) ask([...chat.messages.slice(0, index), {role: "user", content: text.value}]);
  });
  form.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
  box.replaceChildren(form);
  text.focus();
}

function editLast() {
  const index = chat.messages.findLastIndex(message => message.role === "user");
  if (index >= 0) edit(at("talk").children[index], chat.messages[index], index);
}

function again(index) { if (!running) ask(chat.messages.slice(0, index)); }
