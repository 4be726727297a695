// Markdown of an answer as DOM nodes, for the "Formatted" view. Text becomes text nodes only, addresses are shown and
// never linked or loaded: whatever an answer holds, nothing is fetched and nothing runs. HTML in it stays text.
// Known: headings, lists, quotes, tables, rules, fenced code; bold, italic, struck, code, links, pictures.

function node(tag, children, className = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Runs are bounded, so that thousands of unclosed marks stay cheap.
const INLINE = new RegExp([
  "\\\\([!-/:-@[-`{-~])", // 1 escaped sign
  "(`+)(?!`)([^\\n]{1,2000}?)(?<!`)\\2(?!`)", // 3 code
  "(!?)\\[([^\\[\\]\\n]{0,500})\\]\\(([^()\\s]{0,2000})\\)", // 4 picture or link, 5 text, 6 address
  "(\\*\\*|__)(?=\\S)([^\\n]{0,2000}?\\S)\\7(?!\\*)", // 8 bold
  "(?:\\*(?=\\S)([^\\n]{0,2000}?\\S)\\*|(?<!\\w)_(?=\\S)([^\\n]{0,2000}?\\S)_(?!\\w))", // 9 or 10 italic
  "~~(?=\\S)([^\\n]{0,2000}?\\S)~~", // 11 struck
].join("|"), "g");

function inline(text, depth = 0) {
  if (depth > 4) return [text];
  const parts = [];
  let at = 0;
  for (const m of text.matchAll(INLINE)) {
    parts.push(text.slice(at, m.index));
    at = m.index + m[0].length;
    if (m[1] !== undefined) parts.push(m[1]);
    else if (m[3] !== undefined) parts.push(node("code", [m[3].replace(/^ (.*) $/, "$1")]));
    else if (m[5] !== undefined) parts.push(...address(m[4], m[5], m[6], depth));
    else if (m[8] !== undefined) parts.push(node("strong", inline(m[8], depth + 1)));
    else if (m[11] !== undefined) parts.push(node("s", inline(m[11], depth + 1)));
    else parts.push(node("em", inline(m[9] ?? m[10], depth + 1)));
  }
  return [...parts, text.slice(at)];
}

const address = (picture, text, url, depth) => [
  ...(picture ? [node("em", [`picture: ${text}`])] : inline(text, depth + 1)), " ", node("span", [`<${url}>`], "pl-address")];

const FENCE = /^ {0,3}(`{3,}|~{3,})/, HEADING = /^ {0,3}(#{1,6})\s+(.*)$/, RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/, ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/, TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const isRule = (line) => line.length < 1000 && TABLE_RULE.test(line);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));

// Lines from `at` on while `goes(line)`; returns them and where they end.
function take(lines, at, goes) {
  let end = at;
  while (end < lines.length && goes(lines[end])) end++;
  return [lines.slice(at, end), end];
}

function blocks(lines, depth) {
  if (depth > 6) return [node("p", [lines.join("\n")])];
  const out = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at], heading = HEADING.exec(line), fence = FENCE.exec(line), item = ITEM.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const [code, end] = take(lines, at + 1, (one) => !one.trimStart().startsWith(fence[1]));
      out.push(node("pre", [node("code", [code.join("\n")])]));
      at = end + 1;
    } else if (heading) {
      out.push(node("p", inline(heading[2].trim().replace(/\s#+$/, "")), `pl-heading pl-heading-${heading[1].length}`));
      at++;
    } else if (RULE.test(line)) {
      out.push(node("hr", []));
      at++;
    } else if (QUOTE.test(line)) {
      const [quoted, end] = take(lines, at, (one) => QUOTE.test(one));
      out.push(node("blockquote", blocks(quoted.map((one) => one.replace(QUOTE, "")), depth + 1)));
      at = end;
    } else if (item) {
      const [list, end] = readList(lines, at, item, depth);
      out.push(list);
      at = end;
    } else if (line.includes("|") && isRule(lines[at + 1] ?? "")) {
      const [rows, end] = take(lines, at + 2, (one) => one.trim() && one.includes("|"));
      out.push(node("table", [node("thead", [node("tr", cells(line).map((cell) => node("th", cell)))]),
        node("tbody", rows.map((row) => node("tr", cells(row).map((cell) => node("td", cell)))))]));
      at = end;
    } else {
      const [first, ...rest] = take(lines, at + 1, (one) => one.trim() && ![FENCE, HEADING, QUOTE, ITEM, RULE].some((start) => start.test(one)));
      out.push(node("p", inline([line, ...first].join("\n"))));
      at = rest[0];
    }
  }
  return out;
}

// A list whose items start at the indent of the first; deeper lines belong to the item above them.
function readList(lines, at, first, depth) {
  const indent = first[1].length, ordered = /\d/.test(first[2]), items = [];
  const deeper = (line) => !line.trim() || line.length - line.trimStart().length > indent;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const [inner, end] = take(lines, at + 1, deeper);
    const shift = Math.min(...inner.filter((line) => line.trim()).map((line) => line.length - line.trimStart().length), indent + 4);
    const [text, ...rest] = blocks([item[3], ...inner.map((line) => line.slice(shift))], depth + 1);
    items.push(node("li", text?.tagName === "P" && !text.className ? [...text.childNodes, ...rest] : [text ?? "", ...rest]));
    at = end;
  }
  const list = node(ordered ? "ol" : "ul", items);
  if (ordered) list.start = Number.parseInt(first[2], 10);
  return [list, at];
}

export const formatted = (text) => blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
