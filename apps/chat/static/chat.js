// The chat page: a conversation, and under each answer what the layers saw, took out, steered and verified.
// Model text becomes text nodes only (markdown.js).

import { formatted } from "/static/markdown.js";
import { el } from "/static/dom.js";

const at = (id) => document.getElementById(id);
const messages = []; // what has been said, as the page shows it; an answer that failed is not in it
let running = null;

const tell = (text, kind = "") => { at("status").textContent = text; at("status").className = `pl-status ${kind && `pl-${kind}`}`; };
const pill = (text, kind = "") => el("span", { class: `pl-verdict ${kind && `pl-${kind}`}` }, text);
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

async function post(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const { detail } = await answer.json().catch(() => ({}));
  throw new Error(typeof detail === "string" ? detail : `the server said ${answer.status}`);
}

// Layers: each gives [name, pill, one line, details]

function verdict(name, layer) {
  const kind = layer.blocked ? "alarm" : layer.action === "allow" ? "fine" : "";
  const ms = layer.scanners.reduce((sum, one) => sum + one.ms, 0), failed = layer.scanners.filter((one) => !["ok", "skipped"].includes(one.status));
  const seen = layer.findings.slice(0, 8).map((one) =>
    el("li", {}, `${one.what}, ${one.score.toFixed(2)}, by ${one.scanner}${one.view === "raw" ? "" : ` in the ${one.view} text`}${one.reason ? `: ${one.reason}` : ""}`));
  return [name, pill(layer.action, kind), layer.rules.map((one) => one.rule).join(", ") || (layer.findings.length ? "seen, below every rule" : "nothing seen"), [
    ...layer.rules.map((one) => el("p", {}, `Rule “${one.rule}”: ${one.action}. ${one.why}`)),
    layer.passed_on === null || layer.blocked ? "" : el("div", {}, name === "Input" ? "The model saw:" : "Passed on:", el("div", { class: "pl-saw" }, layer.passed_on)),
    seen.length ? el("ul", {}, seen) : "",
    failed.length ? el("p", {}, `Failed: ${failed.map((one) => `${one.name} (${one.status})`).join(", ")}`) : "",
    el("p", { class: "pl-soft" }, `${layer.scanners.length} scanners, ${ms.toFixed(0)} ms`)]];
}

function steered(layer, about) {
  if (!about.steering.length) return ["Steered", pill("off"), "decoding was free", [el("p", {}, "Start with --ban or --expert and a model on this machine to steer it.")]];
  const parts = [];
  if (layer.backtracks !== undefined) parts.push(`went back ${layer.backtracks} times for banned phrases (${layer.checks} checks, ${layer.outcome})`);
  if (layer.divergence) parts.push(`safety expert: ${layer.divergence.map((kl) => kl.toFixed(2)).join(", ")} nats from the model at the first tokens`);
  const did = layer.backtracks > 0 || (layer.divergence || []).some((kl) => kl > 1);
  return ["Steered", pill(did ? "steered" : "on", did ? "" : "fine"), about.steering.join(", "), parts.map((part) => el("p", {}, part))];
}

function facts(layer) {
  const { counts } = layer, wrong = counts.refuted + counts.conflicting;
  const kinds = { supported: "fine", refuted: "alarm", conflicting: "alarm" };
  const line = Object.entries(counts).filter(([, n]) => n).map(([name, n]) => `${n} ${name.replaceAll("_", " ")}`).join(", ") || "no claims";
  return ["Verified", pill(wrong ? "refuted" : counts.supported ? "supported" : "unconfirmed", wrong ? "alarm" : counts.supported ? "fine" : ""), line, [
    ...layer.claims.map((claim) => el("div", {}, el("p", {}, pill(claim.verdict.replaceAll("_", " "), kinds[claim.verdict] || ""), " ", claim.text),
      claim.reason ? el("p", { class: "pl-soft" }, claim.reason) : "",
      claim.evidence.slice(0, 3).map((one) => el("blockquote", {}, `“${one.quote}”`, el("br"), el("cite", { class: "pl-soft" }, `${one.doc_id}, characters ${one.start} to ${one.end}, ${one.stance}`))))),
    el("p", { class: "pl-soft" }, layer.tier)]];
}

const drawLayer = ([name, mark, line, inside], open) => el("details", { open }, el("summary", {}, el("b", {}, name), mark, el("span", { class: "pl-soft" }, line)),
  el("div", { class: "pl-inside" }, inside));

// Turns

function addTurn(role, ...inside) {
  const turn = el("section", { class: `pl-said pl-${role}`, "aria-label": role === "user" ? "You" : "Answer" }, inside);
  at("turns").append(turn);
  return turn;
}

function thumbs(answerId) {
  const said = el("span", { class: "pl-soft" });
  const button = (good, label) => el("button", { class: "pl-button pl-small", type: "button", "aria-pressed": "false", onclick: async (event) => {
    try {
      await post("/api/thumb", { answer: answerId, good, request_id: newId() });
      for (const one of event.target.parentElement.querySelectorAll("button")) one.setAttribute("aria-pressed", String(one === event.target));
      said.textContent = "kept as a label";
    } catch (error) { said.textContent = error.message; }
  } }, label);
  return el("div", { class: "pl-bar" }, button(true, "Good answer"), button(false, "Bad answer"), said);
}

async function ask(about, text) {
  const history = [...messages, { role: "user", content: text }];
  addTurn("user", el("div", { class: "pl-card" }, text));
  const box = el("div", { class: "pl-card", "aria-busy": "true" }, "…"), layers = el("div", { class: "pl-layers" });
  const turn = addTurn("answer", box, layers);
  let said = "", rest = "", ended = false;
  running = new AbortController();
  tell("Writing; text shows once it was checked.");
  try {
    const answer = await post("/api/chat", { messages: history }, running.signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const event of lines.map((line) => JSON.parse(line))) {
        if (event.error) throw new Error(event.error);
        if (event.text) box.replaceChildren(said += event.text);
        if (event.layer === "input" || event.layer === "output") layers.append(drawLayer(verdict(event.layer === "input" ? "Input" : "Output", event), event.action !== "allow"));
        if (event.layer === "steered") layers.append(drawLayer(steered(event, about), false));
        if (event.layer === "facts") layers.append(drawLayer(facts(event), true));
        if ("done" in event) {
          ended = true;
          tell(`${event.seconds.toFixed(1)} s`);
          if (about.thumbs && event.done) turn.append(thumbs(event.done));
        }
        turn.scrollIntoView({ block: "end" });
      }
    }
    if (!ended) throw new Error("the connection was lost in the middle of the answer");
    box.classList.add("pl-formatted");
    box.replaceChildren(...(said.trim() ? formatted(said) : ["(no text)"]));
    messages.push({ role: "user", content: text }, { role: "assistant", content: said });
  } catch (error) {
    const stopped = error.name === "AbortError";
    box.replaceChildren(said || (stopped ? "Stopped." : "No answer."));
    tell(stopped ? "Stopped. This answer is not part of the conversation." : error.message, stopped ? "" : "problem");
  }
  box.removeAttribute("aria-busy");
  running = null;
}

async function start() {
  const about = await (await fetch("/api/about")).json();
  at("about").textContent = `${about.model} · policy ${about.policy}${about.facts ? ` · facts: ${about.facts}` : ""}`;
  const submit = async () => {
    const text = at("prompt").value;
    if (running || !text.trim()) return;
    at("prompt").value = "";
    at("send").disabled = true;
    at("stop").disabled = false;
    await ask(about, text);
    at("send").disabled = false;
    at("stop").disabled = true;
    at("prompt").focus();
  };
  at("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("again").addEventListener("click", () => { running?.abort(); messages.length = 0; at("turns").replaceChildren(); tell(""); at("prompt").focus(); });
  at("prompt").focus();
}

start();
