// An answer while it comes: the message that it becomes, and its element.
"use strict";

class Answer {
  constructor() {
    this.message = {role: "assistant", content: ""};
    this.text = make("div", {kind: "text"});
    this.markdown = new Markdown(this.text);
    this.box = make("article", {kind: "turn assistant", "aria-label": "Answer", "aria-busy": "true"}, this.text);
    this.calls = [];
    this.spoken = 0;  // characters that a screen reader has been given
    this.began = performance.now();
    at("talk").append(this.box);
    at("spoken").replaceChildren();
  }

  get empty() { return !this.message.content && !this.message.thought && !this.calls.length; }

  take(chunk) {
    this.usage = chunk.usage || this.usage;
    this.timings = chunk.timings || this.timings;
    const choice = chunk.choices[0];
    if (!choice) return;
    const {reasoning_content: thought, content, tool_calls: calls = []} = choice.delta;
    if (thought || content || calls.length) this.first ??= performance.now();
    if (thought) this.takeThought(thought);
    if (content) this.takeText(content);
    for (const call of calls) this.takeCall(call);
    this.reason = choice.finish_reason || this.reason;
  }

  takeThought(piece) {
    if (!this.thought) {
      this.box.insertBefore(this.thought = folded("thought", "Thinking…"), this.text);
      at("state").textContent = "thinking…";
    }
    this.message.thought = (this.message.thought || "") + piece;
    this.thought.lastChild.textContent = this.message.thought;
  }

  takeText(piece) {
    if (!this.message.content) at("state").textContent = "answering…";
    this.message.content += piece;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      keepInView(() => this.markdown.show(this.message.content));
      this.speak(this.message.content.lastIndexOf("\n\n"));
    });
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

  // A screen reader gets each paragraph once, when it is whole.
  speak(end) {
    const piece = this.message.content.slice(this.spoken, end).trim();
    if (end <= this.spoken || !piece) return;
    at("spoken").append(make("p", {text: piece}));
    this.spoken = end;
  }

  // The message to keep.
  end(error) {
    cancelAnimationFrame(this.frame);
    const {message} = this;
    if (this.calls.length && !error) message.tool_calls = this.calls.map(one => one.call);
    if (error) message.note = error.name === "AbortError" ? "Stopped." : error.message;
    else if (this.reason === "length") message.note = "Cut off: the limit of tokens was reached.";
    if (this.usage) message.figures = this.figures();
    this.speak(message.content.length);
    for (const text of [...this.calls.map(one => "Calls " + one.call.function.name), message.note]) if (text) at("spoken").append(make("p", {text}));
    return message;
  }

  figures() {
    const {prompt_tokens: prompt, completion_tokens: count} = this.usage, cached = this.usage.prompt_tokens_details?.cached_tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = this.timings?.tokens_per_second ?? (count > 1 && seconds > 0 ? (count - 1) / seconds : null);
    const first = this.timings?.first_token_seconds != null ? this.timings.first_token_seconds * 1000 : this.first - this.began;
    return (rate ? rate.toFixed(1) + " tokens/s · " : "") + count + (count === 1 ? " token" : " tokens") + " · first after " + Math.round(first) + " ms · prompt "
      + prompt + (cached ? " (" + cached + " cached)" : "");
  }
}
