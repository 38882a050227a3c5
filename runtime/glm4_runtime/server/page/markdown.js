// Markdown.
"use strict";

// A text becomes elements. Nothing of the text is ever read as HTML. Formulas stay as they were written.
const LONGEST_INLINE = 8000;  // characters; a longer paragraph is shown as it is
const DEEPEST = 16;  // quotes and lists within each other; deeper ones are shown as paragraphs
// What may stand within a line. A formula's $ touches what is inside, and no digit follows: "$5 or $6" is no formula.
const INLINE = new RegExp([
  /(?<!`)(?<ticks>`+)(?<code>[^`]|[^`][^]*?[^`])\k<ticks>(?!`)/u,
  /(?<formula>\$\$[^$]+\$\$|\\\([^]+?\\\)|\\\[[^]+?\\\]|\$(?![\s$])[^$\n]*[^\s$\\]\$(?!\d))/u,
  /\*\*(?=\S)(?<strong>[^]*?[^\s*]\**)\*\*/u,
  /\*(?![\s*])(?<em>[^*]*[^\s*])\*(?!\*)/u,
  /(?<![\p{L}\p{N}_])__(?=\S)(?<strong2>[^_]*[^\s_])__(?![\p{L}\p{N}_])/u,
  /(?<![\p{L}\p{N}_])_(?![\s_])(?<em2>[^_]*[^\s_])_(?![\p{L}\p{N}_])/u,
  /~~(?=\S)(?<struck>[^~]*[^\s~])~~/u,
  /!?\[(?<label>[^\[\]]*)\]\((?<to>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"]*")?\)/u,
  /<(?<auto>https?:\/\/[^\s<>]+)>/u,
  /(?<bare>https?:\/\/[^\s<>]*[^\s<>.,;:!?'")\]])/u,
  /\\(?<escaped>[!-\/:-@\[-`{-~])/u,
  /(?<line> {2,}\n|\\\n|\n)/u,
].map(part => part.source).join("|"), "gu");

function link(to, ...children) {
  if (!/^(https?:|mailto:)/i.test(to)) return make("span", {}, ...children);
  return make("a", {href: to, target: "_blank", rel: "noopener noreferrer"}, ...children);
}

function inline(text) {
  if (text.length > LONGEST_INLINE) return [text];
  const parts = [];
  let done = 0;
  for (const found of text.matchAll(INLINE)) {
    const g = found.groups;
    if (found.index > done) parts.push(text.slice(done, found.index));
    done = found.index + found[0].length;
    if (g.code !== undefined) parts.push(make("code", {text: g.code.replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " ")}));
    else if (g.formula) parts.push(make("span", {kind: "formula", text: g.formula}));
    else if (g.strong ?? g.strong2) parts.push(make("strong", {}, ...inline(g.strong ?? g.strong2)));
    else if (g.em ?? g.em2) parts.push(make("em", {}, ...inline(g.em ?? g.em2)));
    else if (g.struck) parts.push(make("s", {}, ...inline(g.struck)));
    else if (g.label !== undefined) parts.push(link(g.to, ...inline(g.label || g.to)));
    else if (g.auto ?? g.bare) parts.push(link(g.auto ?? g.bare, g.auto ?? g.bare));
    else if (g.escaped) parts.push(g.escaped);
    else parts.push(make("br"));
  }
  if (done < text.length) parts.push(text.slice(done));
  return parts;
}

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ROW_OF_DASHES = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const QUOTE = /^ {0,3}> ?/;
const DISPLAY = /^ *(\$\$|\\\[)/;

const cells = line => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
const startsTable = (lines, i) => lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-")
  && ROW_OF_DASHES.test(lines[i + 1]) && cells(lines[i]).length === cells(lines[i + 1]).length;
const startsBlock = (lines, i) => FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || QUOTE.test(lines[i])
  || DISPLAY.test(lines[i]) || /^ *([-*+]|1[.)]) +\S/.test(lines[i]) || startsTable(lines, i);

// Each reader takes lines from i on (and how deep they lie), and gives [index behind the block, function that makes its element].
const BLOCKS = [
  function fence(lines, i) {
    const opened = FENCE.exec(lines[i]);
    if (!opened) return null;
    const end = lines.findIndex((line, k) => k > i && FENCE.exec(line)?.[2].startsWith(opened[2]) && !FENCE.exec(line)[3]);
    const last = end < 0 ? lines.length : end;
    const indent = new RegExp("^ {0," + opened[1].length + "}");
    const code = lines.slice(i + 1, last).map(line => line.replace(indent, "")).join("\n");
    return [last + 1, () => codeBox(opened[3].trim() || "text", code)];
  },
  function display(lines, i) {
    const opened = DISPLAY.exec(lines[i])?.[1];
    if (!opened) return null;
    const close = opened === "$$" ? "$$" : "\\]";
    const from = lines[i].indexOf(opened) + 2;
    let end = i;
    if (!lines[i].includes(close, from)) do end++; while (end < lines.length && !lines[end].includes(close));
    if (end >= lines.length || !lines[end].trimEnd().endsWith(close)) return null;  // text follows: a paragraph with a formula in it
    return [end + 1, () => make("div", {kind: "formula", text: lines.slice(i, end + 1).join("\n").trim()})];
  },
  function heading(lines, i) {
    const found = HEADING.exec(lines[i]);
    return found && [i + 1, () => make("h" + Math.min(5, found[1].length + 2), {}, ...inline(found[2]))];
  },
  function rule(lines, i) { return RULE.test(lines[i]) ? [i + 1, () => make("hr")] : null; },
  function quote(lines, i, depth) {
    if (!QUOTE.test(lines[i])) return null;
    let end = i;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inner = lines.slice(i, end).map(line => line.replace(QUOTE, ""));
    return [end, () => make("blockquote", {}, ...elements(inner, depth + 1))];
  },
  function table(lines, i) {
    if (!startsTable(lines, i)) return null;
    let end = i + 2;
    while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
    const sides = cells(lines[i + 1]).map(dashes => dashes.endsWith(":") ? dashes.startsWith(":") ? "center" : "right" : "");
    const row = (tag, line) => { const given = cells(line); return make("tr", {}, ...sides.map((kind, k) => make(tag, {kind}, ...inline(given[k] || "")))); };
    return [end, () => make("div", {kind: "wide"}, make("table", {}, make("thead", {}, row("th", lines[i])), make("tbody", {}, ...lines.slice(i + 2, end).map(line => row("td", line)))))];
  },
  function list(lines, i, depth) {
    const first = ITEM.exec(lines[i]);
    if (!first || RULE.test(lines[i])) return null;
    const numbered = /\d/.test(first[2]), items = [];
    let end = i, width = 0;
    for (; end < lines.length; end++) {
      const found = ITEM.exec(lines[end]);
      const own = found && found[1].length < first[1].length + 2 && /\d/.test(found[2]) === numbered && !(items.length && found[1].length >= width);
      if (own) {
        width = found[1].length + found[2].length + Math.min(found[3]?.length || 1, 4);
        items.push([found[4] || ""]);
      } else if (!lines[end].trim()) {
        const next = lines[end + 1];
        if (next === undefined || !next.trim() || !(/^ */.exec(next)[0].length >= Math.min(width, 2) || ITEM.test(next))) break;
        items.at(-1).push("");
      } else if (found || /^ */.exec(lines[end])[0].length >= Math.min(width, 2)) {
        if (found && found[1].length < 2) break;  // another kind of list begins
        items.at(-1).push(lines[end].replace(new RegExp("^ {0," + width + "}"), ""));
      } else if (startsBlock(lines, end) || !items.at(-1).at(-1)) break;
      else items.at(-1).push(lines[end]);
    }
    return [end, () => make(numbered ? "ol" : "ul", numbered ? {start: parseInt(first[2])} : {}, ...items.map(item => listItem(item, depth + 1)))];
  },
  function paragraph(lines, i) {
    let end = i + 1;
    while (end < lines.length && lines[end].trim() && !startsBlock(lines, end)) end++;
    return [end, () => make("p", {}, ...inline(lines.slice(i, end).join("\n").trim()))];
  },
];

function codeBox(language, code) {
  const head = make("div", {kind: "head"}, make("span", {text: language}), copyButton(() => code));
  return make("div", {kind: "code"}, head, make("pre", {tabindex: 0, role: "region", "aria-label": "Code: " + language}, make("code", {text: code})));
}

function listItem(lines, depth) {
  const box = /^\[([ xX])\] +/.exec(lines[0]);
  const made = make("li", {}, ...elements(box ? [lines[0].slice(box[0].length), ...lines.slice(1)] : lines, depth));
  if (made.firstChild?.tagName === "P") made.firstChild.replaceWith(...made.firstChild.childNodes);
  if (box) made.prepend(box[1] === " " ? "☐ " : "☑ ");
  return made;
}

function* blocks(lines, depth) {
  const readers = depth < DEEPEST ? BLOCKS : BLOCKS.slice(-1);
  for (let i = 0; i < lines.length;) {
    if (!lines[i].trim()) { i++; continue; }
    for (const read of readers) {
      const found = read(lines, i, depth);
      if (!found) continue;
      yield {source: lines.slice(i, found[0]).join("\n"), element: found[1]};
      i = found[0];
      break;
    }
  }
}

const elements = (lines, depth) => [...blocks(lines, depth)].map(block => block.element());

// A growing text: blocks that are as they were keep their elements, and so their selection.
class Markdown {
  constructor(box) { this.box = box; this.sources = []; }
  show(text) {
    const now = [...blocks(text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n"), 0)];
    let same = 0;
    while (same < now.length && this.sources[same] === now[same].source) same++;
    while (this.box.childNodes.length > same) this.box.lastChild.remove();
    this.box.append(...now.slice(same).map(block => block.element()));
    this.sources = now.map(block => block.source);
  }
}
