// The sampled text: tokens coloured by their share of big, and one token's route by layer under one or two policies.
// The address keeps the choice: #token=3&policy=BBss&versus=big&text=0 (token counts from 1).
function explore(texts) {
  const find = (id) => document.getElementById(id);
  const chosen = { text: 0, a: 0, b: -1, token: 0 };
  const lists = { text: find("choose-text"), a: find("choose-a"), b: find("choose-b") };
  const select = (name) => lists[name].querySelector("select");
  let buttons = [];

  function element(tag, text, className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  }

  function options(name, labels) {
    select(name).replaceChildren(...labels.map(([value, label]) => Object.assign(element("option", label), { value })));
    select(name).value = chosen[name];
  }

  const policy = (name) => texts[chosen.text].policies[chosen[name]];
  const differs = (index) => chosen.b >= 0 && policy("a").patterns[index] !== policy("b").patterns[index];
  const visible = (token) => (token.trim() ? token : token || "∅").replace(/\n/g, "↵").replace(/^ +$/, "␣");
  const figure = (value) => (Number.isFinite(value) ? value.toFixed(3) : "unknown");

  function render() {
    const text = texts[chosen.text];
    options("text", texts.map((each, index) => [index, each.label]));
    const names = text.policies.map((each, index) => [index, each.name]);
    options("a", names);
    options("b", [[-1, "none"], ...names]);
    lists.text.hidden = texts.length < 2;
    buttons = text.tokens.map((token, index) => {
      const button = element("button", visible(token), "token");
      const pattern = policy("a").patterns[index] ?? "";
      button.type = "button";
      button.tabIndex = -1;
      button.style.setProperty("--share", pattern ? pattern.split("B").length / pattern.length - 1 / pattern.length : 0);
      button.classList.toggle("differs", differs(index));
      button.addEventListener("mouseenter", () => show(index));
      button.addEventListener("focus", () => choose(index));
      button.addEventListener("click", () => choose(index));
      return button;
    });
    const line = text.tokens.flatMap((token, index) => (/\n/.test(token) ? [buttons[index], element("br", "")] : [buttons[index]]));
    find("tokens").replaceChildren(...line);
    const count = buttons.filter((_, index) => differs(index)).length;
    find("difference").textContent =
      chosen.b < 0 ? "" : `${policy("a").name} and ${policy("b").name} differ in ${count} of ${buttons.length} tokens.`;
    chosen.token = Math.max(0, Math.min(chosen.token, buttons.length - 1));
    show(chosen.token);
    if (buttons.length) buttons[chosen.token].tabIndex = 0;
  }

  function choose(index) {
    buttons[chosen.token].tabIndex = -1;
    chosen.token = index;
    buttons[index].tabIndex = 0;
    show(index);
    remember();
  }

  function remember() {
    const kept = new URLSearchParams({ token: chosen.token + 1, policy: policy("a").name });
    if (chosen.b >= 0) kept.set("versus", policy("b").name);
    if (texts.length > 1) kept.set("text", chosen.text);
    history.replaceState(null, "", `#${kept}`);
  }

  function show(index) {
    const text = texts[chosen.text];
    if (!text.tokens.length) return;
    buttons.forEach((button, at) => button.classList.toggle("current", at === index));
    const heading = element("h3", `Token ${index + 1} of ${text.tokens.length}: `);
    heading.append(element("code", visible(text.tokens[index])));
    const compared = [policy("a"), ...(chosen.b < 0 ? [] : [policy("b")])];
    const facts = document.createElement("dl");
    const fact = (key, value) => {
      const pair = document.createElement("div");
      pair.append(element("dt", key), element("dd", value));
      facts.append(pair);
    };
    const losses = compared.map((each) => each.loss[index]);
    compared.forEach((each, at) => fact(`Loss, ${each.name}`, index ? figure(losses[at]) : "none: it is the first"));
    if (losses.length > 1 && losses.every(Number.isFinite)) fact("B less A", figure(losses[1] - losses[0]));
    if (text.difficulty) fact("Difficulty", `${figure(text.difficulty[index])} (the oracle's, of predicting it)`);
    const routes = compared.flatMap((each, at) => [
      element("div", `${"AB"[at]}: ${each.name}`), route(each.patterns[index] ?? "", index, compared),
    ]);
    find("panel").replaceChildren(heading, facts, ...routes);
  }

  function route(pattern, index, compared) {
    const row = element("div", "", "route");
    row.setAttribute("role", "img");
    row.setAttribute("aria-label", `route by layer: ${[...pattern].join(" ")}`);
    [...pattern].forEach((letter, layer) => {
      const cell = element("span", letter, `layer ${letter === "-" ? "skip" : letter}`);
      cell.title = `layer ${layer + 1}: ${{ B: "big", s: "small", "-": "skip" }[letter]}`;
      cell.classList.toggle("differs", new Set(compared.map((each) => each.patterns[index]?.[layer])).size > 1);
      row.append(cell);
    });
    return row;
  }

  function recall() {
    const kept = new URLSearchParams(location.hash.slice(1));
    if (!kept.has("token") && !kept.has("policy")) return;
    const within = (value, count) => (value >= 0 && value < count ? Math.floor(value) : 0);
    chosen.text = within(Number(kept.get("text")), texts.length);
    const names = texts[chosen.text].policies.map((each) => each.name);
    chosen.a = Math.max(0, names.indexOf(kept.get("policy")));
    chosen.b = names.indexOf(kept.get("versus"));
    chosen.token = within(Number(kept.get("token")) - 1, texts[chosen.text].tokens.length);
    render();
    find("explorer").scrollIntoView();
  }

  for (const name of ["text", "a", "b"]) {
    select(name).addEventListener("change", (event) => {
      chosen[name] = Number(event.target.value);
      if (name === "text") Object.assign(chosen, { a: 0, b: -1, token: 0 });
      render();
      remember();
    });
  }
  const keys = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  find("tokens").addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(chosen.token + keys[event.key], buttons.length - 1))].focus();
  });
  find("tokens").addEventListener("mouseleave", () => show(chosen.token));
  find("explorer-none").remove();
  find("explorer-app").hidden = false;
  render();
  recall();
  addEventListener("hashchange", recall);
}
if (report.texts.length) explore(report.texts);
