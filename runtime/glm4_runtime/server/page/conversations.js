// Conversations, kept in the browser.
"use strict";

const STORE = "glm4-deploy " + location.pathname, MOST = 100;
let kept = [], chat = null, running = null, model = null;

function load() {
  try { kept = JSON.parse(localStorage.getItem(STORE)) || []; } catch { kept = []; }
  kept = kept.filter(one => one && Array.isArray(one.messages) && one.messages.every(message => message && typeof message.role === "string"));
}

function save() {
  if (chat.messages.length && !kept.includes(chat)) kept.unshift(chat);
  kept.length = Math.min(kept.length, MOST);
  for (let count = kept.length; count > 0; count = count >> 1) {  // as many of the newest as the browser has room for
    try { localStorage.setItem(STORE, JSON.stringify(kept.slice(0, count))); break; } catch { continue; }
  }
  drawList();
}

const title = one => (one.messages.find(message => message.role === "user")?.content || "New chat").slice(0, 80);

function drawList() {
  at("list").replaceChildren(...kept.map(one => {
    const open = button(title(one), () => choose(one), "open");
    open.disabled = running !== null;
    if (one === chat) open.setAttribute("aria-current", "true");
    const remove = button("✕", () => forget(one));
    remove.setAttribute("aria-label", "Delete “" + title(one) + "”");
    remove.disabled = running !== null;
    return make("li", {}, open, remove);
  }));
}

const narrow = matchMedia("(max-width: 45rem)");

function showSide(shown) {
  at("side").hidden = !shown || Boolean(model && model.task !== "causal-lm");
  at("fold").setAttribute("aria-expanded", String(!at("side").hidden));
}

function choose(one) {
  chat = one;
  if (narrow.matches) showSide(false);
  draw();
  drawList();
  at("scroll").scrollTop = at("scroll").scrollHeight;
  at("say").focus();
}

function forget(one) {
  kept = kept.filter(other => other !== one);
  if (one === chat) chat = {messages: []};
  try { localStorage.setItem(STORE, JSON.stringify(kept)); } catch { /* nothing was kept either */ }
  choose(chat);
}

// Calls of the last answer that have no result yet.
function openCalls() {
  const last = chat.messages.findLastIndex(message => message.role === "assistant");
  const answered = chat.messages.length - 1 - last;
  return last < 0 ? [] : (chat.messages[last].tool_calls || []).slice(answered);
}
