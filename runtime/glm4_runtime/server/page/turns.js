// Turns on the screen.
"use strict";

const nameOfCall = (message, at) => chat.messages.slice(0, at).flatMap(one => one.tool_calls || []).findLast(call => call.id === message.tool_call_id)?.function.name || "a call";

function draw() {
  at("talk").replaceChildren(...chat.messages.map((message, index) => TURNS[message.role](message, index)));
  askForInput();
}

const TURNS = {
  user(message, index) {
    const box = make("article", {kind: "turn user", "aria-label": "You"}, make("div", {kind: "text", text: message.content}));
    box.append(make("div", {kind: "acts"}, copyButton(() => message.content), button("Edit", () => edit(box, message, index))));
    return box;
  },
  tool(message, index) {
    return make("article", {kind: "turn"}, folded("call result", "Result of " + nameOfCall(message, index), message.content));
  },
  assistant(message, index) {
    const box = make("article", {kind: "turn assistant", "aria-label": "Answer"});
    if (message.thought) box.append(folded("thought", "Thought", message.thought));
    const text = make("div", {kind: "text"});
    new Markdown(text).show(message.content || "");
    box.append(text, ...(message.tool_calls || []).map(call => folded("call", "Calls " + call.function.name, call.function.arguments)));
    if (message.note) box.append(make("p", {kind: "figures", text: message.note}));
    if (message.figures) box.append(make("p", {kind: "figures", text: message.figures}));
    box.append(make("div", {kind: "acts"}, copyButton(() => message.content || ""), button("Regenerate", () => again(index))));
    return box;
  },
};

function edit(box, message, index) {
  if (running) return;
  const text = make("textarea", {rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Edit the message"});
  text.value = message.content;
  const form = make("form", {}, text, make("div", {kind: "row"}, make("button", {kind: "main", text: "Send", type: "submit"}), button("Cancel", draw, "")));
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (text.value.trim() && !running) ask([...chat.messages.slice(0, index), {role: "user", content: text.value}]);
  });
  form.addEventListener("keydown", event => { if (event.key === "Escape") draw(); });
  box.replaceChildren(form);
  text.focus();
}

function again(index) { if (!running) ask(chat.messages.slice(0, index)); }

// An answer while it comes: the message that it becomes, and its element.
class Answer {
  constructor() {
    this.message = {role: "assistant", content: ""};
    this.text = make("div", {kind: "text"});
    this.markdown = new Markdown(this.text);
    this.box = make("article", {kind: "turn assistant", "aria-label": "Answer", "aria-busy": "true"}, this.text);
    this.calls = [];
    this.began = performance.now();
    at("talk").append(this.box);
  }
  take(chunk) {
    this.usage = chunk.usage || this.usage;
    this.timings = chunk.timings || this.timings;
    const choice = chunk.choices[0];
    if (!choice) return;
    const {reasoning_content: thought, content, tool_calls: calls = []} = choice.delta;
    if (thought || content || calls.length) this.first ??= performance.now();
    if (thought) this.takeThought(thought);
    if (content) { this.message.content += content; this.showSoon(); }
    for (const call of calls) this.takeCall(call);
    this.reason = choice.finish_reason || this.reason;
  }
  takeThought(piece) {
    if (!this.thought) this.box.insertBefore(this.thought = folded("thought", "Thinking…"), this.text);
    this.message.thought = (this.message.thought || "") + piece;
    this.thought.lastChild.textContent = this.message.thought;
  }
  takeCall(piece) {
    if (!this.calls[piece.index]) {
      const box = folded("call", "Calls " + piece.function.name);
      this.calls[piece.index] = {box, call: {id: piece.id, type: "function", function: {name: piece.function.name, arguments: ""}}};
      this.box.append(box);
    }
    const {box, call} = this.calls[piece.index];
    call.function.arguments += piece.function.arguments || "";
    box.lastChild.textContent = call.function.arguments;
  }
  showSoon() { this.frame ??= requestAnimationFrame(() => { this.frame = null; keepInView(() => this.markdown.show(this.message.content)); }); }
  get empty() { return !this.message.content && !this.message.thought && !this.calls.length; }
  // The message to keep.
  end(error) {
    cancelAnimationFrame(this.frame);
    if (this.calls.length && !error) this.message.tool_calls = this.calls.map(one => one.call);
    if (error) this.message.note = error.name === "AbortError" ? "Stopped." : error.message;
    else if (this.reason === "length") this.message.note = "Cut off: the limit of tokens was reached.";
    if (this.usage) this.message.figures = this.figures();
    return this.message;
  }
  figures() {
    const count = this.usage.completion_tokens, cached = this.usage.prompt_tokens_details?.cached_tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = this.timings?.tokens_per_second ?? (count > 1 && seconds > 0 ? (count - 1) / seconds : null);
    const first = this.timings?.first_token_seconds != null ? this.timings.first_token_seconds * 1000 : this.first - this.began;
    return (rate ? rate.toFixed(1) + " tokens/s · " : "") + count + " tokens · first after " + Math.round(first) + " ms · prompt "
      + this.usage.prompt_tokens + (cached ? " (" + cached + " cached)" : "");
  }
}
