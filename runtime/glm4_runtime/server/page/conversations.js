// The list of conversations, and the open one.
"use strict";

const narrow = matchMedia("(max-width: 45rem)");
const touched = matchMedia("(pointer: coarse)");
let chat = newConversation(), running = null, deleted = null;

function save() {
  const others = without(readStore(), chat);
  writeStore(chat.messages.length ? [chat, ...others] : others);
  drawList();
}

function drawList() {
  const named = document.activeElement?.closest("#list") && document.activeElement.dataset.name;
  at("list").replaceChildren(...kept.map(rowOf));
  at("kept").textContent = storing ? "Kept in this browser only." : "This browser keeps no conversations: its store is full or forbidden.";
  at("undo").hidden = !deleted;
  if (named) [...at("list").querySelectorAll("button")].find(one => one.dataset.name === named)?.focus();
}

function rowOf(one) {
  const open = button(titleOf(one), () => choose(one), "open");
  if (one.id === chat.id) open.setAttribute("aria-current", "true");
  const row = make("li", {}, open, rowButton("✎", "Rename", one, () => rename(row, one)), rowButton("✕", "Delete", one, () => forget(one)));
  for (const part of row.children) {
    part.disabled = running !== null;
    part.dataset.name = one.id + part.textContent;
  }
  return row;
}

function rowButton(sign, word, one, act) {
  const made = button(sign, act);
  made.setAttribute("aria-label", word + " “" + titleOf(one) + "”");
  made.title = word;
  return made;
}

function choose(one) {
  chat = one;
  if (narrow.matches) showSide(false);
  at("spoken").replaceChildren();
  draw();
  drawList();
  at("scroll").scrollTop = at("scroll").scrollHeight;
  focusMessage();
}

// A touch keyboard would hide half of the conversation.
function focusMessage() { if (!touched.matches) at("say").focus(); }

function rename(row, one) {
  const name = make("input", {"aria-label": "Name of the conversation", maxlength: 80, value: titleOf(one)});
  let open = true;
  const end = title => {
    if (!open) return;
    open = false;
    if (title && title !== titleOf(one)) setTitle(one, title); else drawList();
    at("list").querySelector(`[data-name="${one.id}✎"]`)?.focus();
  };
  name.addEventListener("keydown", event => {
    if (!["Enter", "Escape"].includes(event.key) || event.isComposing) return;
    event.preventDefault();  // else Enter presses the button that gets the focus
    event.stopPropagation();
    end(event.key === "Enter" ? name.value.trim() : "");
  });
  name.addEventListener("blur", () => end(name.value.trim()));
  row.replaceChildren(name);
  name.select();
}

function setTitle(one, title) {
  if (one.id === chat.id) chat.title = title;
  writeStore(readStore().map(other => other.id === one.id ? {...other, title} : other));
  drawList();
}

function forget(one) {
  deleted = {one, place: kept.findIndex(other => other.id === one.id)};
  writeStore(without(readStore(), one));
  if (one.id === chat.id) chat = newConversation();
  draw();
  drawList();
  at("undo").focus();
}

function bringBack() {
  const others = readStore();
  writeStore([...others.slice(0, deleted.place), deleted.one, ...others.slice(deleted.place)]);
  const {one} = deleted;
  deleted = null;
  choose(one);
}

function showSide(shown) {
  at("side").hidden = !shown || Boolean(model && model.task !== "causal-lm");
  at("fold").setAttribute("aria-expanded", String(!at("side").hidden));
}

// Another page of this server has written.
function takeOver() {
  kept = readStore();
  if (running || at("list").querySelector("input") || at("talk").querySelector("form")) return;
  const now = kept.find(one => one.id === chat.id);
  if (now && now.messages.length !== chat.messages.length) { chat = now; draw(); }
  drawList();
}
