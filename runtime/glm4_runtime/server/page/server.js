// Requests to the server, and its failures in plain words.
"use strict";

const STATUS = {
  401: "The server asks for an API key: enter it under Settings.",
  404: "At this address is no server of glm4-deploy. Is the path right?",
  413: "The conversation is too long for the server.",
  429: "The server has too much to do. Try again in a moment.",
  502: "The proxy does not reach the server. Is `glm4-deploy serve` still running?",
  503: "The server takes no requests now. Try again in a moment.",
  504: "The server did not answer its proxy in time. Try again in a moment.",
};
const BROKEN = "The connection to the server broke before the answer ended.";
const FOREIGN = "What answers at " + location.host + " is no server of glm4-deploy.";
let model = null, models = [];

const key = () => at("key").value.trim();
const headers = () => ({"Content-Type": "application/json", ...(key() ? {Authorization: "Bearer " + key()} : {})});

async function call(path, options = {}) {
  let response;
  try { response = await fetch(path, {headers: headers(), ...options}); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `glm4-deploy serve` still running at " + location.host + "?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message || STATUS[response.status] || "The server answered with status " + response.status + ".");
}

const post = (path, body, signal) => call(path, {method: "POST", body: JSON.stringify(body), signal});

async function read(response) {
  try { return await response.json(); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(FOREIGN);
  }
}

async function findModel() {
  if (model) return;
  models = (await read(await call("v1/models"))).data;
  if (!models?.[0]?.id) throw new Error(FOREIGN);
  at("models").replaceChildren(...models.map(one => make("option", {text: one.id, value: one.id})));
  at("models").parentElement.hidden = models.length < 2;
  useModel(models[0]);
}

function useModel(one) {
  model = one;
  document.title = at("model").textContent = model.id;
  for (const box of document.querySelectorAll("[data-for]")) box.hidden = box.dataset.for !== model.task;
  showSide(!at("side").hidden);
  at("fold").hidden = model.task !== "causal-lm";
  if (model.task === "encoder") at("form").querySelector(".row").hidden = true;
  askForInput();
}

function body() {
  const system = at("system").value.trim(), tools = at("tools").value.trim();
  const said = chat.messages.map(message => Object.fromEntries(Object.entries(message).filter(([name]) => !ADDED.includes(name))));
  const asked = {model: model.id, stream: true, stream_options: {include_usage: true, include_timings: true}};
  asked.messages = [...(system ? [{role: "system", content: system}] : []), ...said];
  for (const name of ["temperature", "top_p", "max_tokens"]) if (at(name).value !== "") asked[name] = Number(at(name).value);
  if (tools) try { asked.tools = JSON.parse(tools); } catch (error) { throw new Error("The tools are not JSON: " + error.message); }
  return asked;
}

// The data of a stream's events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {done, value} = await reader.read().catch(error => { throw error.name === "AbortError" ? error : new Error(BROKEN); });
    if (done) throw new Error(BROKEN);
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield dataOf(line);
    }
  }
}

function dataOf(line) {
  let data;
  try { data = JSON.parse(line.slice(6)); } catch { throw new Error(BROKEN); }
  if (data.error) throw new Error(data.error.message);
  return data;
}
