// The server.
"use strict";

const headers = () => ({"Content-Type": "application/json", ...(at("key").value ? {Authorization: "Bearer " + at("key").value} : {})});

async function call(path, options = {}) {
  let response;
  try { response = await fetch(path, {headers: headers(), ...options}); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `glm4-deploy serve` still running at " + location.host + "?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message || "The server answered with status " + response.status + ".");
}

const post = (path, body, signal) => call(path, {method: "POST", body: JSON.stringify(body), signal});

async function findModel() {
  if (model) return;
  model = (await (await call("v1/models")).json()).data[0];
  document.title = at("model").textContent = model.id;
  for (const box of document.querySelectorAll("[data-for]")) box.hidden = box.dataset.for !== model.task;
  showSide(!at("side").hidden);
  at("fold").hidden = model.task !== "causal-lm";
  if (model.task === "encoder") at("form").querySelector(".row").hidden = true;
  askForInput();
}

function body() {
  const system = at("system").value.trim(), tools = at("tools").value.trim();
  const said = chat.messages.map(({thought, note, figures, ...message}) => message);
  const asked = {model: model.id, stream: true, stream_options: {include_usage: true, include_timings: true}, messages: [...(system ? [{role: "system", content: system}] : []), ...said]};
  for (const name of ["temperature", "top_p", "max_tokens"]) if (at(name).value !== "") asked[name] = Number(at(name).value);
  if (tools) try { asked.tools = JSON.parse(tools); } catch (error) { throw new Error("The tools are not JSON: " + error.message); }
  return asked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    let read;
    try { read = await reader.read(); } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection to the server broke before the answer ended.");
    }
    if (read.done) throw new Error("The connection ended before the answer did.");
    const lines = (rest + read.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

// Answer `messages`. Where nothing comes of it, the conversation is as before, and the message is back in its box.
async function ask(messages) {
  const before = chat.messages;
  chat.messages = messages;
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
  if (failed && answer.empty) {
    chat.messages = before;
    const last = messages.at(-1);
    if (!at("say").value && last !== before.at(-1)) at("say").value = last.content;
    problem(failed.name === "AbortError" ? "" : failed.message);
  } else {
    chat.messages.push(answer.end(failed));
    at("spoken").textContent = answer.message.content;
  }
  save();
  keepInView(draw);
}

function busy(controller) {
  running = controller;
  at("send").textContent = running ? "Stop" : at("send").dataset.word;
  at("state").textContent = running ? "answering…" : "";
  at("new").disabled = running !== null;
  at("talk").toggleAttribute("aria-busy", running !== null);
  if (running) problem("");
  drawList();
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function classify(text) {
  busy(new AbortController());
  try {
    const [found] = (await (await post("v1/classify", {model: model.id, input: text}, running.signal)).json()).data;
    const parts = found.tokens ? found.tokens.map(token => make("tr", {}, make("td", {}, make("code", {text: token.token})), make("td", {text: token.label}), make("td", {kind: "right", text: token.scores[token.label].toFixed(3)}))) : null;
    const labels = parts ? [make("div", {kind: "wide"}, make("table", {}, ...parts))] : Object.entries(found.scores).sort((a, b) => b[1] - a[1]).map(([label, score]) =>
      make("div", {kind: "label"}, make("span", {text: label}), make("meter", {value: score, max: 1, "aria-label": label}), make("span", {text: (100 * score).toFixed(1) + " %"})));
    at("talk").append(make("article", {kind: "turn user"}, make("div", {kind: "text", text})), make("article", {kind: "turn assistant"}, make("div", {kind: "text"}, ...labels)));
    at("say").value = "";
    at("scroll").scrollTop = at("scroll").scrollHeight;
  } catch (error) { problem(error.name === "AbortError" ? "" : error.message); }
  busy(null);
}
