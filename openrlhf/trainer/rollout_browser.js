"use strict";
(() => {
  const MOST_SHOWN = 300;
  const samples = JSON.parse(document.getElementById("samples").textContent);
  const at = (id) => document.getElementById(id);
  const state = { search: "", show: "all", order: "number", colour: "none", prompt: "" };

  function make(tag, text, name) {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = String(text);
    if (name) node.className = name;
    return node;
  }
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const short = (value) => (isNumber(value) ? String(Number(value.toPrecision(4))) : String(value));
  const listOf = (value) => (Array.isArray(value) ? value : []);
  const kindOf = (sample) => (["before", "during", "after"].includes(sample.when) ? "eval" : "train");

  // Prompts of training and of evaluation are numbered apart.
  function gathered() {
    const found = new Map();
    const seen = new Set();
    for (const sample of samples) {
      const kind = kindOf(sample);
      const key = kind + ":" + (sample.uid ?? sample.prompt ?? "");
      const same = JSON.stringify([key, sample.step, sample.temperature, sample.sample ?? seen.size]);
      if (seen.has(same)) continue;
      seen.add(same);
      if (!found.has(key)) {
        const asked = String(sample.prompt ?? "");
        found.set(key, { key, kind, uid: sample.uid, asked, label: sample.label, samples: [], words: [asked] });
      }
      const prompt = found.get(key);
      prompt.samples.push(sample);
      prompt.words.push(String(sample.response ?? ""));
    }
    for (const prompt of found.values()) {
      const rewards = prompt.samples.map((sample) => sample.reward).filter(isNumber);
      prompt.low = rewards.length ? Math.min(...rewards) : NaN;
      prompt.high = rewards.length ? Math.max(...rewards) : NaN;
      prompt.mean = rewards.reduce((sum, value) => sum + value, 0) / (rewards.length || 1);
      prompt.spread = Math.max(0, ...groupsOf(prompt).map((group) => spreadOf(group.samples)));
      prompt.steps = new Set(prompt.samples.map((sample) => sample.step)).size;
      prompt.text = [prompt.uid, prompt.label, ...prompt.words].join("\n").toLowerCase();
    }
    return [...found.values()];
  }
  function spreadOf(group) {
    const rewards = group.map((sample) => sample.reward).filter(isNumber);
    return rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0;
  }
  function groupsOf(prompt) {
    const groups = new Map();
    for (const sample of prompt.samples) {
      const key = JSON.stringify([sample.step, sample.temperature]);
      if (!groups.has(key)) {
        groups.set(key, { step: sample.step, temperature: sample.temperature, samples: [] });
      }
      groups.get(key).samples.push(sample);
    }
    return [...groups.values()].sort((a, b) => a.step - b.step || (b.temperature ?? 0) - (a.temperature ?? 0));
  }
  const prompts = gathered();

  const orders = {
    number: (a, b) => (a.kind === b.kind ? 0 : a.kind < b.kind ? -1 : 1) ||
      String(a.uid).localeCompare(String(b.uid), "en", { numeric: true }),
    low: (a, b) => a.mean - b.mean,
    high: (a, b) => b.mean - a.mean,
    spread: (a, b) => b.spread - a.spread,
  };
  function matching() {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    return prompts
      .filter((prompt) => state.show === "all" || prompt.kind === state.show)
      .filter((prompt) => words.every((word) => prompt.text.includes(word)))
      .sort(orders[state.order]);
  }

  // A figure of a token is a number that is 0 where there is nothing to see; scale is what is coloured fully.
  const difference = (tokens, name) => {
    const other = listOf(tokens[name]);
    return listOf(tokens.log_prob).map((value, index) => value - other[index]);
  };
  const figures = {
    none: { of: () => [] },
    log_prob: {
      of: (tokens) => listOf(tokens.log_prob ?? tokens.engine_log_prob), least: 5, most: 5,
      says: ["certain", "log-prob -5 or less"],
    },
    advantage: { of: (tokens) => listOf(tokens.advantage), least: 1e-3, says: ["worse", "better"] },
    engine: {
      of: (tokens) => (tokens.engine_log_prob ? difference(tokens, "engine_log_prob") : []), least: 0.01,
      says: ["policy less sure", "more sure"],
    },
    reference: {
      of: (tokens) => (tokens.ref_log_prob ? difference(tokens, "ref_log_prob") : []), least: 0.1,
      says: ["less likely than before", "likelier"],
    },
    mask: { of: (tokens) => listOf(tokens.mask), least: 1, most: 1, says: ["only read", "learned from"] },
  };
  function scaleOf(groups) {
    const figure = figures[state.colour];
    if (figure.most) return figure.most;
    let most = figure.least ?? 1;
    for (const sample of groups.flatMap((group) => group.samples)) {
      for (const value of figure.of(sample.tokens ?? {})) if (isNumber(value)) most = Math.max(most, Math.abs(value));
    }
    return most;
  }
  const one = { log_prob: "221, 119, 51", mask: "54, 150, 106" };
  const two = ["204, 75, 92", "58, 126, 191"];
  function colourOf(value, scale) {
    if (!isNumber(value) || !value) return "";
    const strength = 0.75 * Math.sqrt(Math.min(1, Math.abs(value) / scale));
    return "rgba(" + (one[state.colour] ?? two[value < 0 ? 0 : 1]) + ", " + strength.toFixed(3) + ")";
  }
  function drawLegend(scale) {
    const legend = at("legend");
    legend.replaceChildren();
    if (state.colour === "none") return;
    const bar = make("i");
    const hue = one[state.colour];
    const ends = hue ? ["rgba(" + hue + ", 0)", "rgba(" + hue + ", .75)"]
      : ["rgba(" + two[0] + ", .75)", "transparent", "rgba(" + two[1] + ", .75)"];
    bar.style.background = "linear-gradient(to right, " + ends.join(", ") + ")";
    const [left, right] = figures[state.colour].says;
    const size = figures[state.colour].most ? "" : " (" + short(scale) + ")";
    legend.append(make("span", left), bar, make("span", right + size));
  }

  function figuresOf(tokens, index) {
    const said = [];
    const tell = (name, value) => isNumber(value) && said.push(name + " " + short(value));
    const policy = listOf(tokens.log_prob)[index];
    const engine = listOf(tokens.engine_log_prob)[index];
    const reference = listOf(tokens.ref_log_prob)[index];
    tell("log-prob", policy ?? engine);
    tell("advantage", listOf(tokens.advantage)[index]);
    if (isNumber(policy) && isNumber(engine)) tell("ratio to the engine", Math.exp(policy - engine));
    if (isNumber(policy) && isNumber(reference)) tell("ratio to the reference", Math.exp(policy - reference));
    if (listOf(tokens.mask)[index] === 0) said.push("not learned from");
    return said.join("\n");
  }
  function answerText(sample, scale) {
    const text = make("pre", null, "tokens");
    const tokens = sample.tokens ?? {};
    const pieces = listOf(tokens.text);
    if (!pieces.length) {
      text.textContent = String(sample.response ?? "");
      return text;
    }
    const values = figures[state.colour].of(tokens);
    pieces.forEach((piece, index) => {
      const token = make("span", piece);
      token.title = figuresOf(tokens, index);
      const colour = colourOf(values[index], scale);
      if (colour) token.style.backgroundColor = colour;
      text.append(token);
    });
    const left = (sample.length ?? pieces.length) - pieces.length;
    if (left > 0) text.append(make("span", " \u2026 " + left + " more tokens", "soft"));
    return text;
  }
  function answerCard(sample, scale) {
    const card = make("div", null, "card answer");
    const facts = make("div", null, "facts");
    if (isNumber(sample.reward)) facts.append(make("b", "reward " + short(sample.reward)));
    if (isNumber(sample.true_score)) facts.append(make("b", "true score " + short(sample.true_score)));
    for (const [name, value] of Object.entries(sample.parts ?? {})) {
      facts.append(make("span", name.replaceAll("_", " ") + " " + short(value)));
    }
    if (isNumber(sample.length)) facts.append(make("span", sample.length + " tokens"));
    if (sample.finish_reason === "length") facts.append(make("span", "cut at the limit", "cut"));
    card.append(facts, answerText(sample, scale));
    return card;
  }
  function drawGroups(prompt) {
    const place = at("groups");
    place.replaceChildren();
    if (!prompt) {
      drawLegend(1);
      place.append(make("p", "No prompt has these words.", "soft"));
      return;
    }
    const asked = make("div", null, "card");
    asked.append(make("pre", prompt.asked));
    if (prompt.label) asked.append(make("p", "expected: " + prompt.label, "soft"));
    place.append(asked);
    const groups = groupsOf(prompt);
    const scale = scaleOf(groups);
    drawLegend(scale);
    for (const group of groups) {
      const when = prompt.kind === "eval" ? ", evaluation" : "";
      const heat = isNumber(group.temperature) ? " at T=" + short(group.temperature) : "";
      place.append(make("h3", "step " + (group.step ?? "?") + when + heat));
      const cards = make("div", null, "answers");
      for (const sample of group.samples) cards.append(answerCard(sample, scale));
      place.append(cards);
    }
  }
  function drawList(found, chosen) {
    const list = at("prompts");
    list.replaceChildren();
    for (const prompt of found.slice(0, MOST_SHOWN)) {
      const button = make("button");
      button.type = "button";
      const line = prompt.asked.replace(/<\|[^|]*\|>/g, " ").replace(/\s+/g, " ").trim();
      button.append(make("span", line.slice(0, 200) || "(empty prompt)", "line"));
      const range = prompt.low === prompt.high ? short(prompt.low) : short(prompt.low) + " to " + short(prompt.high);
      const facts = [(prompt.kind === "eval" ? "evaluation " : "prompt ") + (prompt.uid ?? ""),
        prompt.samples.length + (prompt.samples.length === 1 ? " answer" : " answers"),
        prompt.steps + (prompt.steps === 1 ? " step" : " steps")];
      if (isNumber(prompt.low)) facts.push("reward " + range);
      button.append(make("span", facts.join(" \u00b7 "), "soft"));
      button.setAttribute("aria-current", String(prompt === chosen));
      button.addEventListener("click", () => change({ prompt: prompt.key }));
      list.append(button);
    }
    const left = found.length - MOST_SHOWN;
    if (left > 0) list.append(make("p", left + " more: search for them", "soft"));
  }
  function draw() {
    const found = matching();
    const chosen = found.find((prompt) => prompt.key === state.prompt) ?? found[0];
    drawList(found, chosen);
    drawGroups(chosen);
  }
  function change(values) {
    Object.assign(state, values);
    const told = Object.entries(state).filter(([, value]) => value);
    history.replaceState(null, "", "#" + new URLSearchParams(told));
    draw();
  }

  function readAddress() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      const control = name in state && name !== "prompt" ? at(name) : null;
      const known = !control || !control.options || [...control.options].some((option) => option.value === value);
      if (name in state && known) state[name] = value;
      if (control && known) control.value = value;
    }
  }
  readAddress();
  for (const name of ["show", "order", "colour"]) {
    at(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  at("search").addEventListener("input", (event) => change({ search: event.target.value }));
  addEventListener("hashchange", () => { readAddress(); draw(); });
  draw();
})();
