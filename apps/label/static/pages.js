// The pages of the labelling app as custom elements; gradio puts one into each tab. Every change goes through /api.

import { el } from "/static/dom.js";
import { TaskView, key } from "/static/task.js";

class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function api(method, path, body) {
  const options = { method, headers: {} };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) { options.body = JSON.stringify(body); options.headers["Content-Type"] = "application/json"; }
  const answer = await fetch(`/api/${path}`, options);
  if (answer.status === 401) { location.replace("/sign-in"); await new Promise(() => {}); }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new ApiError(answer.status, typeof content.detail === "string" ? content.detail : JSON.stringify(content.detail));
  return content;
}

let who;
const me = () => (who ??= api("GET", "me"));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function newRequestId() { // randomUUID is there on https and localhost only
  return [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

// Sends an answer until the server has said what became of it. The id makes sending twice harmless; the copy in
// localStorage outlives a closed tab, and goes as soon as the server has answered.
async function send(account, assignment, answer, requestId, tell) {
  const slot = `plumbline.outbox.${account}`;
  localStorage.setItem(slot, JSON.stringify({ assignment, answer, requestId }));
  for (let wait = 1000; ; wait = Math.min(wait * 2, 15000)) {
    try {
      const receipt = await api("POST", `assignments/${assignment}/submit`, { request_id: requestId, answer });
      localStorage.removeItem(slot);
      return receipt;
    } catch (error) {
      if (error instanceof ApiError && error.status < 500 && error.status !== 429) { localStorage.removeItem(slot); throw error; }
      tell("Not saved yet: the server does not answer. Trying again…", "problem");
      await pause(wait);
    }
  }
}

class Page extends HTMLElement {
  async connectedCallback() {
    if (this.started) return;
    this.started = true;
    this.className = "pl";
    this.status = el("div", { class: "pl-status", role: "status", "aria-live": "polite" });
    this.body = el("div");
    this.replaceChildren(this.body, this.status);
    this.account = await me();
    await this.attempt(() => this.start());
  }

  tell(message, kind = "") {
    this.status.textContent = message;
    this.status.className = `pl-status ${kind && `pl-${kind}`}`;
  }

  async attempt(act) {
    try { return await act(); } catch (error) { this.tell(error.message, "problem"); return undefined; }
  }

  button(label, act, primary = false) {
    return el("button", { class: `pl-button ${primary ? "pl-primary" : ""}`, type: "button", onclick: () => this.attempt(act) }, label);
  }

  // A task with its view; `done` is called with the receipt once the answer is stored.
  show(task, into, { undo = null, done }) {
    this.view?.close();
    const requestId = newRequestId();
    let drafting;
    this.sending = false;
    this.current = task;
    this.view = new TaskView(task, {
      choices: this.account.choices,
      busy: () => this.sending,
      onUndo: undo,
      onMessage: (text) => this.tell(text),
      onGuidelines: () => openTab("Guidelines"),
      onHelp: () => this.tell("Keys: 1 2 choose, 3 tie, 4 both bad, q w e r how much, Enter submit, s skip, f flag, u undo, m mark, v show, g guidelines."),
      onDraft: (state) => {
        clearTimeout(drafting);
        drafting = setTimeout(() => api("PUT", `assignments/${task.assignment}/draft`, state).catch(() => {}), 500);
      },
      onSubmit: async (answer) => {
        if (this.sending) return; // the second press of a double click
        this.sending = true;
        clearTimeout(drafting);
        this.view.root.querySelectorAll("button").forEach((button) => { button.disabled = true; });
        this.tell("Saving…");
        try {
          const receipt = await send(this.account.name, task.assignment, answer, requestId, (...said) => this.tell(...said));
          this.tell("Saved ✓", "ok");
          await done(receipt);
        } catch (error) {
          this.tell(error.message, "problem");
          this.sending = false;
          this.view.draw();
        }
      },
    });
    into.replaceChildren(this.view.root);
  }
}

const openTab = (name) => [...document.querySelectorAll("[role=tab]")].find((tab) => tab.textContent.trim() === name)?.click();

class LabelPage extends Page {
  async start() {
    const left = localStorage.getItem(`plumbline.outbox.${this.account.name}`);
    if (left) { // a tab was closed, or the session ran out, before the server had answered
      const { assignment, answer, requestId } = JSON.parse(left);
      await this.attempt(() => send(this.account.name, assignment, answer, requestId, (...said) => this.tell(...said)));
    }
    this.progress = el("div");
    this.place = el("div");
    this.body.replaceChildren(this.progress, this.place);
    setInterval(() => {
      if (!document.hidden && this.current && this.offsetParent) api("POST", `assignments/${this.current.assignment}/heartbeat`).catch(() => {});
    }, 60000);
    await this.next();
  }

  async next() {
    for (;;) {
      try { this.take(await api("POST", "claim")); return; } catch (error) {
        if (error instanceof ApiError && error.status < 500) { this.view?.close(); this.place.replaceChildren(el("p", {}, error.message)); return; }
        this.tell("The server does not answer. Trying again…", "problem");
        await pause(1500);
      }
    }
  }

  take({ task, progress }) {
    const share = progress.items ? (100 * progress.complete) / progress.items : 0;
    const meter = el("div");
    meter.style.width = `${share}%`;
    this.progress.replaceChildren(
      el("div", { class: "pl-bar pl-soft" }, el("span", {}, `${progress.done} labelled by you`), el("span", {}, `${progress.hour} in the last hour`),
        el("span", { class: "pl-grow" }), el("span", {}, `${progress.complete} of ${progress.items} items complete`)),
      el("div", { class: "pl-meter", role: "progressbar", "aria-label": "Items complete", "aria-valuenow": Math.round(share), "aria-valuemin": 0, "aria-valuemax": 100 }, meter));
    if (task) {
      this.show(task, this.place, { undo: () => this.undo(), done: () => this.next() });
      return;
    }
    this.current = null;
    this.view?.close();
    this.place.replaceChildren(el("div", { class: "pl-card" }, el("h3", {}, progress.items ? "Nothing left for you" : "No items yet"),
      el("p", {}, progress.items ? "Every item has its labels, or you have seen it. Thank you." :
        "An admin can import pairs, or the ones that ship with Plumbline, in the Admin tab."),
      el("div", { class: "pl-bar" }, this.button("Look again", () => this.next()),
        progress.done ? this.button("Undo last", () => this.undo()) : "",
        this.account.role === "admin" && !progress.items ? this.button("Import the starter pairs", async () => {
          const { added } = await api("POST", "import/starter");
          this.tell(`${added} pairs imported`, "ok");
          await this.next();
        }, true) : "")));
  }

  async undo() {
    await this.attempt(async () => {
      this.take(await api("POST", "undo"));
      this.tell("Your last answer. It counts as it is until you submit another.");
    });
  }
}

class ArenaPage extends Page {
  start() {
    if (!this.account.choices.policies) {
      this.body.replaceChildren(el("div", { class: "pl-card" }, el("h3", {}, "No policies to compare"),
        el("p", {}, "Start with: plumbline label --arena old=runs/sft/model --arena new=runs/ppo/policy")));
      return;
    }
    this.prompt = el("textarea", { id: "pl-arena-prompt", maxlength: "20000" });
    this.go = this.button("Ask both", () => this.ask(), true);
    this.halt = this.button("Stop", async () => {
      this.halt.disabled = true; // both have ended already where there is no such run any more
      await api("POST", `arena/${this.run}/stop`).catch((error) => { if (error.status !== 404) throw error; });
    });
    this.halt.disabled = true;
    this.place = el("div");
    this.body.replaceChildren(el("label", {}, "Your prompt", this.prompt), el("div", { class: "pl-bar" }, this.go, this.halt,
      el("span", { class: "pl-soft" }, "Two policies answer, blind. You can vote once both have ended, or you have stopped them.")), this.place);
  }

  async ask() {
    this.go.disabled = true;
    this.view?.close();
    this.tell("Both are writing…");
    const texts = [0, 1].map((slot) => el("div", { class: "pl-text", tabindex: "0", role: "region", "aria-label": `Text of answer ${"AB"[slot]}` }));
    this.place.replaceChildren(el("div", { class: "pl-answers" }, texts.map((text, slot) =>
      el("section", { class: "pl-card pl-answer" }, el("header", {}, el("span", { class: "pl-letter" }, "AB"[slot])), text))));
    try {
      const answer = await fetch("/api/arena", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt: this.prompt.value }) });
      if (!answer.ok) throw new Error((await answer.json()).detail || `the server said ${answer.status}`);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "", ended = false;
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const event = JSON.parse(line);
          if (event.run) { this.run = event.run; this.halt.disabled = false; }
          if (event.text) texts[event.slot].append(event.text);
          if (event.error) throw new Error(event.error);
          if (event.task) { this.vote(event.task); ended = true; }
        }
      }
      if (!ended) throw new Error("the connection was lost; nothing was stored");
    } catch (error) { this.tell(error.message, "problem"); }
    this.halt.disabled = true;
    this.go.disabled = false;
  }

  vote(task) {
    this.tell("Both have ended. Your vote?");
    this.show(task, this.place, { done: async () => {
      const { names } = await api("GET", `assignments/${task.assignment}/names`);
      this.view.close();
      this.place.append(el("div", { class: "pl-card" }, el("p", {}, `A was ${names[0]}, B was ${names[1]}.`)));
    } });
  }
}

class ReviewPage extends Page {
  async start() {
    const items = await api("GET", "review");
    const place = el("div");
    this.body.replaceChildren(
      el("div", { class: "pl-bar" }, el("h2", {}, items.length ? `${items.length} to look at` : "Nothing to review"), el("span", { class: "pl-grow" }), this.button("Refresh", () => this.start())),
      items.length ? el("div", { class: "pl-scroll pl-stack" }, el("table", {}, el("thead", {}, el("tr", {}, ["Item", "Why", "Prompt", "What to do"].map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, items.map((item) => el("tr", {}, el("td", { class: "pl-soft" }, `#${item.id}`),
          el("td", {}, item.status === "flagged" ? `flagged: ${item.reasons.join(", ")}` : `annotators disagree: ${item.votes}`),
          el("td", {}, item.prompt.slice(0, 140)),
          el("td", {}, el("div", { class: "pl-bar" },
            this.button("Decide", async () => {
              const { task } = await api("POST", `review/${item.id}`);
              this.show(task, place, { done: () => this.start() });
              place.scrollIntoView({ block: "start" });
            }),
            item.status === "flagged" ? this.button("Put back", async () => { await api("PUT", `items/${item.id}/status`, { status: "open" }); await this.start(); }) : "",
            this.button("Retire", async () => { await api("PUT", `items/${item.id}/status`, { status: "retired" }); await this.start(); })))))))) : "",
      place);
  }
}

const number = (value, digits = 2) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));

// An estimate with its interval on a line from `low` to `high`.
function interval(value, low, high) {
  if (!value) return "–";
  const at = (x) => `${(100 * (Math.min(high, Math.max(low, x)) - low)) / (high - low)}%`;
  const bar = el("i"), dot = el("b");
  if (value.low !== null) { bar.style.left = at(value.low); bar.style.right = `calc(100% - ${at(value.high)})`; }
  dot.style.left = `calc(${at(value.mean)} - 1px)`;
  const range = value.low === null ? "" : ` (${number(value.low)} to ${number(value.high)})`;
  return el("span", {}, el("span", { class: "pl-interval", "aria-hidden": "true" }, bar, dot), `${number(value.mean)}${range}`);
}

const table = (heads, rows) => el("div", { class: "pl-scroll", tabindex: "0", role: "region", "aria-label": heads.join(", ") }, el("table", {},
  el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
  el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell)))))));

class StatisticsPage extends Page {
  async start() {
    const s = await api("GET", "statistics");
    const tile = (value, label) => el("div", { class: "pl-card pl-tile" }, el("b", {}, value), el("span", { class: "pl-soft" }, label));
    const agreement = Object.entries(s.agreement).map(([name, value]) => [name, interval(value, -0.2, 1), s.agreement_control[name] ? interval(s.agreement_control[name], -0.2, 1) : "–"]);
    const outcomes = Object.entries(s.outcomes).map(([name, n]) => `${name.replaceAll("_", " ")} ${n}`).join(" · ");
    const models = s.models ? Object.entries(s.models.strength).sort((a, b) => b[1].mean - a[1].mean) : [];
    this.body.replaceChildren(
      el("div", { class: "pl-bar" }, el("span", { class: "pl-soft pl-grow" }, outcomes || "No labels yet."), this.button("Refresh", () => this.start()),
        el("a", { class: "pl-button", href: "/api/statistics", download: "label-statistics.json" }, "Download JSON"),
        s.judgements ? el("a", { class: "pl-button", href: "/api/statistics.png", download: "label-statistics.png" }, "Download plots") : ""),
      el("div", { class: "pl-tiles" }, tile(s.judgements, "labels"), tile(s.items, "items labelled"), tile(number(s.raw_agreement), "raw agreement"),
        tile(s.left_share ? number(s.left_share.mean) : "–", s.left_share ? `left chosen (${number(s.left_share.low)} to ${number(s.left_share.high)})` : "left chosen"), tile(s.late, "came late")),
      el("h2", {}, "Agreement"), agreement.length ? table(["Krippendorff's alpha", "All labels", "Random slice only"], agreement) : el("p", { class: "pl-soft" }, "Needs items with two labels that differ somewhere."),
      el("p", { class: "pl-soft" }, "0.3 to 0.5 is usual for open-ended answers. Actively chosen items are harder than most: compare rates on the random slice."),
      el("h2", {}, "Annotators"),
      table(["Annotator", "Labels", "Skipped", "Gold passed", "Left chosen", "Estimated accuracy", "Same again", "Seconds"], s.annotators.map((a) => [
        a.annotator + (a.paused ? " (paused)" : ""), a.labels, a.skipped, interval(a.gold_pass, 0, 1), interval(a.left_share, 0, 1), interval(a.accuracy, 0.4, 1), interval(a.same_again, 0, 1), number(a.median_seconds, 0)])),
      s.kappas.length ? el("details", {}, el("summary", {}, "Cohen's kappa of each two annotators"), table(["One", "Other", "Items", "Kappa"], s.kappas.map((k) => [k.a, k.b, k.items, number(k.kappa)]))) : "",
      models.length ? el("div", {}, el("h2", {}, `Models, from ${s.models.votes} votes`), table(["Model", "Strength (log-odds)"], [
        ...models.map(([name, value]) => [name, interval(value, -2, 2)]), ["being on the left", interval(s.models.position, -2, 2)]])) : "",
      s.reward_model.length ? el("div", {}, el("h2", {}, "Reward model against people"), table(["The model was", "Pairs", "Agrees"], s.reward_model.map((r) => [r.model_was, r.pairs, interval(r.agrees, 0, 1)]))) : "");
  }
}

class GuidelinesPage extends Page { // the text itself is drawn by gradio; this is the editor below it
  async start() {
    if (this.account.role === "annotator") return;
    const { text, version } = await api("GET", "guidelines");
    const area = el("textarea", { rows: "14", maxlength: "200000" });
    area.value = text;
    this.body.replaceChildren(el("details", {}, el("summary", {}, `Edit (version ${version})`), el("label", {}, "Guidelines in Markdown", area),
      this.button("Save as the next version", async () => {
        const saved = await api("PUT", "guidelines", { text: area.value });
        this.tell(`Saved as version ${saved.version}; annotators see it from their next visit to this tab.`, "ok");
      }, true)));
  }
}

class AdminPage extends Page {
  async start() {
    const [accounts, settings] = [await api("GET", "accounts"), await api("GET", "settings")];
    const input = (name, type = "text") => el("input", { name, type, autocomplete: "off" });
    const file = el("input", { type: "file", accept: ".jsonl,.json" });
    const name = input("name"), password = input("password", "password");
    const role = el("select", {}, ["annotator", "reviewer", "admin"].map((one) => el("option", {}, one)));
    const format = el("select", {}, ["preference", "plain", "kto", "sft", "full"].map((one) => el("option", {}, one)));
    const did = async (message) => { await this.start(); this.tell(message, "ok"); };
    this.body.replaceChildren(
      el("h2", {}, "Import"), el("div", { class: "pl-form" }, el("label", {}, "JSON Lines file", file),
        this.button("Import", async () => {
          if (!file.files.length) throw new Error("Choose a file first.");
          const form = new FormData();
          form.append("file", file.files[0]);
          const { added, doubles } = await api("POST", "import", form);
          await did(`${added} items imported, ${doubles} were there already`);
        }, true),
        this.button("Import the starter pairs", async () => { const { added, doubles } = await api("POST", "import/starter"); await did(`${added} pairs imported, ${doubles} were there already`); })),
      el("h2", {}, "Export"), el("div", { class: "pl-form" }, el("label", {}, "Format", format),
        this.button("Download", () => { el("a", { href: `/api/export/${format.value}`, download: `labels-${format.value}.jsonl` }).click(); this.tell("Exported", "ok"); }, true)),
      el("p", { class: "pl-soft" }, "preference, plain, kto and sft are TRL's formats, without gold, flagged and paused; full is every judgement. Splits and a data card: plumbline label export."),
      el("h2", {}, "Accounts"), table(["Name", "Role", "State", "Change"], accounts.map((a) => [el("span", {}, a.name, el("br"), el("span", { class: "pl-soft" }, a.pseudonym)), a.role, !a.active ? "closed" : a.paused ? "paused: gold" : "active",
        el("div", { class: "pl-bar" },
          a.paused ? this.button("Resume", async () => { await api("PATCH", `accounts/${a.id}`, { paused: false }); await did(`${a.name} may label again`); }) : "",
          this.button(a.active ? "Close" : "Open", async () => { await api("PATCH", `accounts/${a.id}`, { active: !a.active }); await did(`${a.name} is ${a.active ? "closed" : "open"}`); }))])),
      el("div", { class: "pl-form" }, el("label", {}, "Name", name), el("label", {}, "Password (8 or more)", password), el("label", {}, "Role", role),
        this.button("Add account", async () => { await api("POST", "accounts", { name: name.value, password: password.value, role: role.value }); await did(`${name.value} added`); }, true)),
      el("h2", {}, "Settings"), table(["Setting", "Value", "Change"], Object.entries(settings).map(([key, value]) => {
        const field = el("input", { value: JSON.stringify(value), "aria-label": key.replaceAll("_", " ") });
        return [key, JSON.stringify(value), el("div", { class: "pl-bar" }, field, this.button("Set", async () => { await api("PATCH", "settings", { [key]: JSON.parse(field.value) }); await did(`${key} changed`); }))];
      })));
  }
}

class AccountBar extends Page {
  start() {
    this.body.replaceChildren(el("div", { class: "pl-bar pl-account" }, el("img", { src: "/static/icon.svg", alt: "", width: "26", height: "26" }), el("b", {}, "Plumbline labels"), el("span", { class: "pl-grow" }),
      el("span", { class: "pl-soft" }, `${this.account.name} (${this.account.role})`),
      this.button("Sign out", async () => { await api("POST", "sign-out"); location.replace("/sign-in"); })));
  }
}

const pages = { label: LabelPage, arena: ArenaPage, review: ReviewPage, statistics: StatisticsPage, guidelines: GuidelinesPage, admin: AdminPage, account: AccountBar };
for (const [name, page] of Object.entries(pages)) customElements.get(`plumbline-${name}`) || customElements.define(`plumbline-${name}`, page);
