// Elements.
"use strict";

const at = id => document.getElementById(id);

function make(tag, {kind, text, ...attributes} = {}, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function button(text, act, kind = "plain") {
  const made = make("button", {kind, text, type: "button"});
  made.addEventListener("click", act);
  return made;
}

function folded(kind, title, text = "") {
  return make("details", {kind}, make("summary", {text: title}), make("div", {text}));
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch { from.textContent = "The browser does not allow copying"; }
  setTimeout(() => { from.textContent = "Copy"; }, 1500);
}

const copyButton = text => { const made = button("Copy", () => copy(text(), made)); return made; };

function keepInView(work) {
  const view = at("scroll"), following = view.scrollHeight - view.scrollTop - view.clientHeight < 60;
  work();
  if (following) view.scrollTop = view.scrollHeight;
}
