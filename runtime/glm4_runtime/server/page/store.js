// Conversations, kept in the browser: {id, title, messages}, the newest first. All open pages of a server share them.
"use strict";

const STORE = "glm4-deploy " + location.pathname;
const MOST = 100;  // conversations
const ROLES = ["user", "assistant", "tool"];
const OPTIONAL_TEXTS = ["thought", "note", "figures", "tool_call_id"];
let kept = [];
let storing = true;  // false: the browser stores nothing, so that this page alone remembers

const newConversation = () => ({id: Date.now().toString(36) + Math.random().toString(36).slice(2), messages: []});

// What the store holds may be spoilt, or of another version.
const isText = value => typeof value === "string";
const isCall = call => isText(call?.id) && isText(call.function?.name) && isText(call.function.arguments);
const isMessage = message => ROLES.includes(message?.role) && isText(message.content)
  && OPTIONAL_TEXTS.every(name => message[name] === undefined || isText(message[name]))
  && (message.tool_calls === undefined || (Array.isArray(message.tool_calls) && message.tool_calls.every(isCall)));
const isConversation = one => Array.isArray(one?.messages) && one.messages.length > 0 && one.messages.every(isMessage)
  && (one.title === undefined || isText(one.title));

function readStore() {
  if (!storing) return kept;
  let found;
  try { found = JSON.parse(localStorage.getItem(STORE)); } catch { return kept; }
  const sound = Array.isArray(found) ? found.filter(isConversation) : [];
  return sound.map(one => ({...one, id: isText(one.id) && /^\w+$/.test(one.id) ? one.id : newConversation().id}));
}

// Write as many of the newest conversations as the browser has room for.
function writeStore(conversations) {
  kept = conversations.slice(0, MOST);
  const texts = kept.map(one => JSON.stringify(one));
  for (let count = texts.length; count >= Math.min(1, texts.length); count--) {
    try {
      localStorage.setItem(STORE, "[" + texts.slice(0, count).join() + "]");
      kept.length = count;
      storing = true;
      return;
    } catch { continue; }
  }
  storing = false;
}

const titleOf = one => (one.title || one.messages.find(message => message.role === "user")?.content || "New chat").slice(0, 80);
const without = (conversations, gone) => conversations.filter(one => one.id !== gone.id);
