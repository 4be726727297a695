// One task on the screen: prompt, answers, what one can say about them, by mouse and by keyboard.
// Model text only ever becomes a text node; nothing here builds HTML from it.

import { el } from "/static/dom.js";
import { formatted } from "/static/markdown.js";

export const key = (name) => el("kbd", { "aria-hidden": "true" }, name);
const letter = (slot) => "ABCDEF"[slot];
const points = (text, utf16) => [...text.slice(0, utf16)].length; // the server counts code points, the browser UTF-16

// Words of `text` that `other` does not have in that order: a longest common subsequence, on at most 600 words each.
export function differing(text, other) {
  const split = (t) => t.split(/(\s+)/).slice(0, 1200);
  const a = split(text), b = split(other).filter((w) => w.trim());
  const words = a.map((w, at) => [w, at]).filter(([w]) => w.trim());
  const table = Array.from({ length: words.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i][j] = words[i][0] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const own = new Set();
  for (let i = 0, j = 0; i < words.length; ) {
    if (j < b.length && words[i][0] === b[j]) { i++; j++; }
    else if (j >= b.length || table[i + 1][j] >= table[i][j + 1]) own.add(words[i++][1]);
    else j++;
  }
  return a.map((word, at) => [word, own.has(at)]);
}

const preferences = { // of this browser; answers are never kept here
  get: (name, otherwise) => localStorage.getItem(`plumbline.${name}`) ?? otherwise,
  set: (name, value) => localStorage.setItem(`plumbline.${name}`, value),
};

export class TaskView {
  // options: choices (words of /api/me), onSubmit(answer), onDraft(state), onUndo() or null
  constructor(task, options) {
    this.task = task;
    this.options = options;
    this.pair = task.kind === "pair";
    this.single = task.kind === "single";
    this.revealed = !task.warning;
    this.shownAt = performance.now();
    this.active = 0;
    this.activeSince = document.hidden ? null : this.shownAt;
    const empty = { outcome: null, winner: null, strength: null, order: [], ratings: task.answers.map(() => ({})),
      rationale: "", reason: "", edit_slot: null, edit_text: "", spans: [] };
    this.state = { ...empty, ...this.fromSaid(task.said), ...(task.draft || {}) };
    this.root = el("div", { class: "pl-task" });
    this.draw();
    this.keydown = (event) => this.onKey(event);
    this.visibility = () => this.countActive();
    document.addEventListener("keydown", this.keydown);
    document.addEventListener("visibilitychange", this.visibility);
  }

  fromSaid(said) {
    if (!said) return {};
    const order = said.ranking ? said.ranking.map((tier) => [...tier]) : [];
    const ratings = said.ratings.length ? said.ratings : this.task.answers.map(() => ({}));
    return { ...said, order, ratings };
  }

  close() {
    document.removeEventListener("keydown", this.keydown);
    document.removeEventListener("visibilitychange", this.visibility);
  }

  countActive() {
    const now = performance.now();
    if (this.activeSince !== null) this.active += now - this.activeSince;
    this.activeSince = document.hidden ? null : now;
  }

  change(values, redraw = true) {
    Object.assign(this.state, values);
    this.options.onDraft?.(this.state);
    if (redraw) this.update();
  }

  // Drawing

  draw() {
    const { task } = this;
    this.answers = task.answers.map((answer, slot) => this.drawAnswer(answer, slot));
    this.controls = el("div");
    this.root.replaceChildren(
      el("section", { class: "pl-card", "aria-label": "Prompt" }, task.prompt.map((turn) =>
        el("div", { class: "pl-turn" }, el("span", { class: "pl-who" }, turn.role), turn.content))),
      task.warning && !this.revealed ? el("div", { class: "pl-warning" },
        el("p", {}, `Content warning: ${task.warning}`),
        el("button", { class: "pl-button", type: "button", onclick: () => { this.revealed = true; this.draw(); } },
          "Show the answers", key("v")), " ",
        el("span", { class: "pl-soft" }, "You can skip it instead; nothing is held against you.")) : "",
      el("div", { class: "pl-answers" }, this.answers.map((one) => one.root)),
      this.controls, this.drawMore());
    this.drawControls();
    this.update();
  }

  drawAnswer(answer, slot) {
    const text = el("div", { class: "pl-text" + (this.revealed ? "" : " pl-hidden"), tabindex: "0", role: "region",
      "aria-label": `Text of answer ${letter(slot)}`, onscroll: () => this.syncScroll(slot) });
    const marks = el("div"), edit = el("div");
    const root = el("section", { class: "pl-card pl-answer", "aria-label": `Answer ${letter(slot)}` },
      el("header", {}, el("span", { class: "pl-letter" }, letter(slot)),
        answer.cut ? el("span", { class: "pl-badge" }, "cut off") : "", el("span", { class: "pl-grow" }),
        el("button", { class: "pl-button pl-small", type: "button", "aria-label": `Mark the selected passage of answer ${letter(slot)}`,
          onmousedown: (event) => event.preventDefault(), onclick: () => this.mark(slot) }, "Mark"),
        el("button", { class: "pl-button pl-small", type: "button", "aria-label": `Correct answer ${letter(slot)}`,
          onclick: () => this.startEdit(slot) }, "Correct")),
      text, marks, edit);
    return { root, text, marks, edit };
  }

  fillText(slot) {
    const { text } = this.answers[slot], full = this.task.answers[slot].text;
    const spans = this.state.spans.filter((span) => span.slot === slot).sort((a, b) => a.start - b.start);
    const diff = this.pair && preferences.get("diff", "") === "1";
    const asMarkdown = preferences.get("formatted", "") === "1" && !spans.length && !diff; // marks and differences need the text as it is
    text.classList.toggle("pl-formatted", asMarkdown);
    if (spans.length) {
      const chars = [...full], parts = [];
      let at = 0;
      for (const span of spans) {
        if (span.start < at) continue; // overlaps are kept, and listed below, but drawn once
        parts.push(chars.slice(at, span.start).join(""), el("mark", { title: span.label }, chars.slice(span.start, span.end).join("")));
        at = span.end;
      }
      text.replaceChildren(...parts, chars.slice(at).join(""));
    } else if (diff) {
      const words = differing(full, this.task.answers[1 - slot].text);
      text.replaceChildren(...words.map(([word, own]) => (own ? el("ins", {}, word) : word)));
    } else text.replaceChildren(...(asMarkdown ? formatted(full) : [full]));
  }

  choice(label, shortcut, pressed, onclick, disabled = false) {
    return el("button", { class: "pl-button pl-choice", type: "button", "aria-pressed": String(pressed), disabled, onclick },
      label, key(shortcut));
  }

  drawControls() {
    const s = this.state, { choices } = this.options;
    const focused = this.controls.contains(document.activeElement) ? document.activeElement.textContent : null;
    const rows = [];
    if (this.single) {
      rows.push(el("fieldset", {}, el("legend", {}, "Is this a good answer?"), el("div", { class: "pl-choices" },
        this.choice("Good", "1", s.outcome === "good", () => this.outcome("good")),
        this.choice("Bad", "2", s.outcome === "bad", () => this.outcome("bad")))));
    } else if (this.pair) {
      rows.push(el("fieldset", {}, el("legend", {}, "Which answer is better?"), el("div", { class: "pl-choices" },
        this.choice("A is better", "1", s.winner === 0, () => this.prefer(0)),
        this.choice("B is better", "2", s.winner === 1, () => this.prefer(1)),
        this.choice("Tie", "3", s.outcome === "tie", () => this.outcome("tie")),
        this.choice("Both bad", "4", s.outcome === "both_bad", () => this.outcome("both_bad")))));
      rows.push(el("fieldset", {}, el("legend", {}, "By how much?"), el("div", { class: "pl-choices" },
        Object.entries(choices.strengths).map(([value, label], at) => this.choice(label, "qwer"[at],
          s.outcome === "prefer" && s.strength === Number(value), () => this.change({ strength: Number(value) }),
          s.outcome !== "prefer")))));
    } else {
      const places = this.task.answers.map((_, slot) => s.order.findIndex((tier) => tier.includes(slot)));
      rows.push(el("fieldset", {}, el("legend", {}, "Order, best first. Press the answers' numbers in order; = puts the last two in one place."),
        el("div", { class: "pl-form" }, this.task.answers.map((_, slot) => el("label", {}, `Place of ${letter(slot)} (${slot + 1})`,
          el("select", { onchange: (event) => this.place(slot, Number(event.target.value)) },
            [-1, ...this.task.answers.keys()].map((at) =>
              el("option", { value: at, selected: places[slot] === at }, at < 0 ? "not placed" : `${at + 1}`)))))),
        el("div", { class: "pl-bar" },
          el("button", { class: "pl-button pl-small", type: "button", onclick: () => this.change({ order: [], outcome: null }) }, "Clear the order", key("⌫")),
          this.choice("All bad", "0", s.outcome === "both_bad", () => this.outcome("both_bad")))));
    }
    const asks = s.outcome === "skip" || s.outcome === "flag";
    rows.push(el("div", { class: "pl-bar" },
      el("button", { class: "pl-button pl-primary", type: "button", id: "pl-submit", disabled: !this.complete(), onclick: () => this.submit() }, "Submit", key("⏎")),
      this.choice("Skip", "s", s.outcome === "skip", () => this.outcome("skip")),
      this.choice("Flag", "f", s.outcome === "flag", () => this.outcome("flag")),
      asks ? el("label", { class: "pl-inline" }, "Reason", el("select", { id: "pl-reason", onchange: (event) => this.change({ reason: event.target.value }) },
        el("option", { value: "" }, "choose…"),
        choices[s.outcome].map((reason) => el("option", { value: reason, selected: s.reason === reason }, reason)))) : "",
      el("span", { class: "pl-grow" }),
      this.options.onUndo ? el("button", { class: "pl-button", type: "button", onclick: () => this.options.onUndo() }, "Undo last", key("u")) : ""));
    this.controls.replaceChildren(...rows);
    if (focused) [...this.controls.querySelectorAll("button")].find((b) => b.textContent === focused && !b.disabled)?.focus();
  }

  drawMore() {
    const s = this.state, { choices } = this.options;
    const toggle = (name, label) => el("label", { class: "pl-inline" }, el("input", { type: "checkbox",
      checked: preferences.get(name, name === "keys" ? "1" : "") === "1",
      onchange: (event) => { preferences.set(name, event.target.checked ? "1" : ""); this.update(); } }), label);
    const opened = s.rationale || s.ratings.some((rated) => Object.keys(rated).length);
    return el("div", {},
      el("details", { open: Boolean(opened) }, el("summary", {}, "Ratings and reasons (optional)"),
        el("div", { class: "pl-answers" }, this.task.answers.map((_, slot) => el("fieldset", { class: "pl-form" },
          el("legend", {}, `Answer ${letter(slot)}, 1 to 5`),
          choices.criteria.map((criterion) => el("label", {}, criterion + (criterion === "toxicity" ? " (5 is worst)" : ""),
            el("select", { onchange: (event) => this.rate(slot, criterion, Number(event.target.value)) },
              [0, 1, 2, 3, 4, 5].map((n) => el("option", { value: n, selected: (s.ratings[slot][criterion] || 0) === n }, n || "–")))))))),
        el("label", {}, "Why?", (() => {
          const area = el("textarea", { id: "pl-rationale", maxlength: "20000", oninput: (event) => this.change({ rationale: event.target.value }, false) });
          area.value = s.rationale;
          return area;
        })())),
      el("div", { class: "pl-bar pl-soft" },
        toggle("formatted", "Formatted"), this.pair ? toggle("diff", "Highlight differences") : "",
        this.single ? "" : toggle("sync", "Scroll together"), toggle("keys", "Keyboard shortcuts"),
        el("span", { class: "pl-keys" }, this.single ? "1 good · 2 bad · Enter submit · s skip · f flag · u undo · m mark · g guidelines · ? help" : this.pair
          ? "1 2 or ← → choose · 3 tie · 4 both bad · q w e r how much · Enter submit · s skip · f flag · u undo · m mark · g guidelines · ? help"
          : "1 to 6 next place · = same place · ⌫ clear · 0 all bad · Enter submit · s skip · f flag · u undo · m mark · g guidelines")));
  }

  update() {
    const s = this.state;
    this.answers.forEach(({ root, marks, edit }, slot) => {
      this.fillText(slot);
      root.classList.toggle("pl-won", s.outcome === "prefer" && s.winner === slot);
      marks.replaceChildren(...s.spans.map((span, at) => [span, at]).filter(([span]) => span.slot === slot).map(([span, at]) =>
        el("div", { class: "pl-bar" },
          el("select", { "aria-label": `Label of the marked passage ${span.quote.slice(0, 30)}`,
            onchange: (event) => { span.label = event.target.value; this.change({}); } },
            this.options.choices.span_labels.map((label) => el("option", { value: label, selected: span.label === label }, label))),
          el("span", { class: "pl-soft pl-grow" }, `“${span.quote.slice(0, 60)}”`),
          el("button", { class: "pl-button pl-small", type: "button", "aria-label": `Remove the mark ${span.quote.slice(0, 30)}`,
            onclick: () => this.change({ spans: s.spans.filter((_, other) => other !== at) }) }, "Remove"))));
      const editing = s.edit_slot === slot;
      if (editing && !edit.firstChild) {
        const area = el("textarea", { "aria-label": `Corrected answer ${letter(slot)}`, maxlength: "20000",
          oninput: (event) => this.change({ edit_text: event.target.value }, false) });
        area.value = s.edit_text;
        edit.replaceChildren(area, el("button", { class: "pl-button pl-small", type: "button",
          onclick: () => { edit.replaceChildren(); this.change({ edit_slot: null, edit_text: "" }); } }, "Drop the correction"));
      } else if (!editing) edit.replaceChildren();
    });
    this.drawControls();
  }

  syncScroll(slot) {
    if (preferences.get("sync", "") !== "1" || this.scrolling) return;
    const from = this.answers[slot].text, share = from.scrollTop / Math.max(1, from.scrollHeight - from.clientHeight);
    this.scrolling = true;
    this.answers.forEach(({ text }, other) => { if (other !== slot) text.scrollTop = share * (text.scrollHeight - text.clientHeight); });
    requestAnimationFrame(() => { this.scrolling = false; });
  }

  // Saying

  prefer(slot) { this.change({ outcome: "prefer", winner: slot, strength: this.state.strength || 3, reason: "" }); }

  outcome(name) {
    this.change({ outcome: name, winner: null, strength: null, order: [], reason: "" });
    if (name === "skip" || name === "flag") this.controls.querySelector("#pl-reason")?.focus();
  }

  place(slot, at) {
    const order = this.task.answers.map(() => []);
    this.state.order.forEach((tier, place) => tier.forEach((other) => { if (other !== slot) order[place].push(other); }));
    if (at >= 0) order[at].push(slot);
    const placed = order.flat().length;
    this.change({ order: placed === this.task.answers.length ? order.filter((tier) => tier.length) : order, outcome: "rank" });
  }

  placeNext(slot) {
    const order = this.state.order.map((tier) => tier.filter((other) => other !== slot)).filter((tier) => tier.length);
    this.change({ order: [...order, [slot]], outcome: "rank" });
  }

  joinLast() {
    const order = this.state.order.filter((tier) => tier.length);
    if (order.length >= 2) this.change({ order: [...order.slice(0, -2), [...order.at(-2), ...order.at(-1)]] });
  }

  rate(slot, criterion, value) {
    if (value) this.state.ratings[slot][criterion] = value; else delete this.state.ratings[slot][criterion];
    this.change({}, false);
  }

  mark(slot) {
    if (this.answers[slot].text.classList.contains("pl-formatted")) {
      this.options.onMessage?.("Passages are marked in the text as it is: switch Formatted off first.");
      return;
    }
    const selection = getSelection(), { text } = this.answers[slot], full = this.task.answers[slot].text;
    if (!selection.rangeCount || selection.isCollapsed || !text.contains(selection.anchorNode) || !text.contains(selection.focusNode)) {
      this.options.onMessage?.(`Select a passage of answer ${letter(slot)} first, then press Mark or m.`);
      return;
    }
    const range = selection.getRangeAt(0), before = document.createRange();
    before.setStart(text, 0);
    before.setEnd(range.startContainer, range.startOffset);
    const from = before.toString().length, start = points(full, from), end = points(full, from + range.toString().length);
    this.change({ spans: [...this.state.spans, { slot, start, end, quote: [...full].slice(start, end).join(""), label: this.options.choices.span_labels[0], comment: "" }] });
    selection.removeAllRanges();
  }

  startEdit(slot) {
    this.answers.forEach(({ edit }) => edit.replaceChildren());
    this.change({ edit_slot: slot, edit_text: this.task.answers[slot].text });
    this.answers[slot].edit.querySelector("textarea").focus();
  }

  complete() {
    const s = this.state;
    if (s.outcome === "prefer") return s.winner !== null && s.strength !== null;
    if (s.outcome === "rank") return s.order.flat().length === this.task.answers.length;
    if (s.outcome === "skip" || s.outcome === "flag") return Boolean(s.reason);
    return ["tie", "both_bad", "good", "bad"].includes(s.outcome);
  }

  submit() {
    if (!this.complete()) return;
    this.countActive();
    const s = this.state, rated = s.ratings.some((one) => Object.keys(one).length);
    const edited = s.edit_slot !== null && s.edit_text.trim() && s.edit_text !== this.task.answers[s.edit_slot].text;
    this.options.onSubmit({
      outcome: s.outcome, winner: s.outcome === "prefer" ? s.winner : null, strength: s.outcome === "prefer" ? s.strength : null,
      ranking: s.outcome === "rank" ? s.order.filter((tier) => tier.length) : null, ratings: rated ? s.ratings : [],
      rationale: s.rationale, reason: s.reason, edit_slot: edited ? s.edit_slot : null, edit_text: edited ? s.edit_text : "",
      spans: s.spans, elapsed_ms: Math.round(performance.now() - this.shownAt), active_ms: Math.round(this.active),
    });
  }

  onKey(event) {
    const target = event.target;
    if (event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey || this.root.offsetParent === null) return;
    if (preferences.get("keys", "1") !== "1" || this.options.busy?.()) return;
    if (target.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]")) return;
    if (target.closest?.("[role=tab]") && /^(Arrow|Enter)/.test(event.key)) return; // these move between tabs
    const pressed = target.closest?.("button, a, summary");
    if (event.key === "Enter" && pressed && !(pressed.classList.contains("pl-choice") && pressed.getAttribute("aria-pressed") === "true")) return;
    const number = Number(event.key) - 1, strengths = "qwer".indexOf(event.key);
    const acts = {
      Enter: () => this.submit(), s: () => this.outcome("skip"), f: () => this.outcome("flag"), u: () => this.options.onUndo?.(),
      v: () => { this.revealed = true; this.draw(); }, g: () => this.options.onGuidelines?.(), "?": () => this.options.onHelp?.(),
      m: () => this.mark(Math.max(0, this.answers.findIndex(({ text }) => text.contains(getSelection().anchorNode)))),
    };
    if (this.single) Object.assign(acts, { 1: () => this.outcome("good"), 2: () => this.outcome("bad") });
    else if (this.pair) Object.assign(acts, { 1: () => this.prefer(0), 2: () => this.prefer(1), ArrowLeft: () => this.prefer(0),
      ArrowRight: () => this.prefer(1), 3: () => this.outcome("tie"), 4: () => this.outcome("both_bad") });
    else Object.assign(acts, { "=": () => this.joinLast(), Backspace: () => this.change({ order: [], outcome: null }), 0: () => this.outcome("both_bad") });
    if (!this.pair && !this.single && number >= 0 && number < this.task.answers.length) acts[event.key] = () => this.placeNext(number);
    if (this.pair && strengths >= 0 && this.state.outcome === "prefer") acts[event.key] = () => this.change({ strength: strengths + 1 });
    if (acts[event.key]) { event.preventDefault(); acts[event.key](); }
  }
}
