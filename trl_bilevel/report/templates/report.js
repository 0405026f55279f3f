"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  /* Text is only ever set as text: rows may hold anything. */
  function make(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") node.textContent = value;
      else if (name === "on") node.addEventListener("click", value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }
  function draw(tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const themes = ["auto", "light", "dark"];
  const button = find("theme");
  function show(theme) {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  }
  let kept = "auto";
  try { kept = localStorage.getItem("trl-bilevel-theme") || "auto"; } catch { /* no storage from a file: fine */ }
  show(themes.includes(kept) ? kept : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    show(theme);
    try { localStorage.setItem("trl-bilevel-theme", theme); } catch { /* as above */ }
  });

  const source = find("data");
  if (!source) return;
  const { rows, trusted, why } = JSON.parse(source.textContent);
  const count = rows.row.length;
  const labels = Object.keys(rows.labels);
  const heaviest = Math.max(...rows.weight.filter((w) => w !== null), 1e-9);
  const hasScores = rows.score.some((s) => s !== null);
  const scores = trusted.map((row) => row.score);
  const number = (value, digits) => (value === null ? "none" : value.toFixed(digits));
  const signed = (value) => (value === null ? "none" : ((value > 0 ? "+" : "") + value.toFixed(3)).replace("-", "\u2212"));

  const columns = [
    { name: "Weight", key: rows.weight, kind: "number weight", first: "descending" },
    { name: "Rank", key: rows.rank, kind: "number secondary", first: "ascending" },
  ];
  if (hasScores) columns.push({ name: "Score", key: rows.score, kind: "number secondary", first: "descending" });
  for (const label of labels) columns.push({ name: label, key: rows.labels[label], kind: "secondary", first: "ascending" });

  const state = { query: "", part: "all", size: 25, page: 0, column: 0, order: "descending" };
  let haystack = null;
  function matches(query) {
    if (!haystack) {
      haystack = rows.question.map((text, i) =>
        [rows.row[i], text, rows.answer[i], ...labels.map((l) => rows.labels[l][i])].join("\n").toLowerCase());
    }
    return (i) => haystack[i].includes(query);
  }
  function compare(key, order) {
    const sign = order === "ascending" ? 1 : -1;
    return (a, b) => {
      const [x, y] = [key[a], key[b]];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || rows.rank[a] - rows.rank[b];
    };
  }
  function selected() {
    let index = [...Array(count).keys()];
    if (state.part === "random") index = index.filter((i) => rows.random[i]);
    if (state.part === "scored") index = index.filter((i) => rows.score[i] !== null);
    if (state.query) index = index.filter(matches(state.query));
    return index.sort(compare(columns[state.column].key, state.order));
  }

  const head = find("table").tHead;
  const body = find("table").tBodies[0];
  const headRow = make("tr");
  columns.forEach((column, position) => {
    column.cell = make("th", { scope: "col", class: column.kind.replace("weight", "") },
      make("button", { type: "button", text: column.name, on: () => {
        const same = state.column === position;
        const flipped = state.order === "ascending" ? "descending" : "ascending";
        state.order = same ? flipped : column.first;
        state.column = position;
        state.page = 0;
        fill();
      } }));
    headRow.append(column.cell);
  });
  headRow.append(make("th", { scope: "col", class: "unsorted", text: "Row" }),
    make("th", { scope: "col", class: "unsorted", text: "Why" }));
  head.append(headRow);

  function weightCell(i) {
    const cell = make("td", { class: "number weight", text: number(rows.weight[i], 3) });
    if (rows.weight[i] !== null) {
      const bar = draw("svg", { viewBox: "0 0 72 6", "aria-hidden": "true" });
      bar.append(draw("rect", { width: 72, height: 6, rx: 3 }),
        draw("rect", { width: Math.max(1.5, (72 * rows.weight[i]) / heaviest).toFixed(1), height: 6, rx: 3 }));
      cell.append(bar);
    }
    return cell;
  }
  function texts(question, answer) {
    const parts = [];
    if (question) parts.push(make("div", { class: "text asked", dir: "auto", text: question }));
    parts.push(make("div", { class: "text", dir: "auto", text: answer || (why.texts ? "(empty)" : "(text not in this report)") }));
    return parts;
  }

  function reason(i) {
    const [weight, score] = [rows.weight[i], rows.score[i]];
    if (weight === null) return "Preparation dropped this row: there was nothing to learn from within max_length.";
    if (why.given) return "The weight was given in the column data_weight.";
    const said = [];
    if (why.group && why.group in rows.labels) said.push(`All rows with ${why.group} = ${rows.labels[why.group][i]} share this weight: the mean of what they would have alone.`);
    else if (why.group) said.push(`All rows of the same ${why.group} share this weight.`);
    if (score === null) {
      said.push(why.known
        ? "This row was not scored."
        : "The scores of this run are not recorded.");
    } else if (scores.length) {
      const below = scores.filter((s) => s < score).length;
      const middle = scores[Math.floor(scores.length / 2)];
      said.push(`It scores ${signed(score)}, higher than ${below} of the ${scores.length} trusted rows that had no part in the scoring (in the middle: ${signed(middle)}).`);
      if (below === 0) said.push("No trusted row scores as low.");
      else if (below >= scores.length / 4 + 0.5) said.push("That is on the plateau, where all scores say the same.");
    }
    return said.join(" ");
  }
  function strip(score) {
    const all = [...scores, score];
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const x = (s) => 14 + (532 * (s - low)) / (high - low || 1);
    const svg = draw("svg", { viewBox: "0 0 560 46", class: "strip", role: "img",
      "aria-label": `Scores from ${signed(low)} to ${signed(high)}: trusted rows as marks, this row at ${signed(score)}` });
    svg.append(draw("line", { x1: 14, x2: 546, y1: 22, y2: 22, class: "axis" }));
    for (const s of scores) svg.append(draw("line", { x1: x(s), x2: x(s), y1: 13, y2: 31, class: "tick" }));
    svg.append(draw("path", { d: `M${x(score)} 22 m0 -8 l7 -11 h-14 z`, class: "here" }),
      draw("text", { x: 14, y: 44 }, signed(low)), draw("text", { x: 546, y: 44, "text-anchor": "end" }, signed(high)));
    return svg;
  }
  function details(i) {
    const box = make("div", {});
    const explained = make("div", {}, make("h3", { text: "Why this weight" }), make("p", { text: reason(i) }));
    const score = rows.score[i];
    if (score !== null && scores.length) explained.append(strip(score));
    box.append(explained);
    if (score !== null && scores.length) {
      const near = trusted.filter((row) => row.answer !== undefined)
        .sort((a, b) => Math.abs(a.score - score) - Math.abs(b.score - score)).slice(0, 3);
      if (near.length) {
        const list = make("ul", { class: "near" });
        for (const row of near) {
          list.append(make("li", {}, make("p", { class: "hint", text: `score ${signed(row.score)}, set ${row.set}` }),
            make("div", { class: "text asked", dir: "auto", text: row.question }),
            make("div", { class: "text", dir: "auto", text: row.answer })));
        }
        box.append(make("div", {}, make("h3", { text: "Trusted rows with the nearest scores" }), list));
      }
    }
    const whole = make("div", {}, make("h3", { text: "Text" }));
    if (rows.question[i]) whole.append(make("div", { class: "text asked", dir: "auto", text: rows.question[i] }));
    whole.append(make("div", { class: "text", dir: "auto", text: rows.answer[i] || "(none)" }));
    const facts = [`row ${rows.row[i]}`, `weight ${number(rows.weight[i], 4)}`, `rank ${rows.rank[i]}`, `score ${signed(score)}`,
      ...labels.map((l) => `${l}: ${rows.labels[l][i]}`)];
    box.append(whole, make("p", { class: "hint text", text: facts.join(", ") }));
    return make("tr", { class: "more", id: `more-${i}` }, make("td", { colspan: columns.length + 2 }, box));
  }
  function rowOf(i) {
    const line = make("tr", {});
    for (const column of columns) {
      if (column.key === rows.weight) line.append(weightCell(i));
      else if (column.key === rows.score) line.append(make("td", { class: column.kind, text: signed(rows.score[i]) }));
      else if (column.key === rows.rank) line.append(make("td", { class: column.kind, text: rows.rank[i].toLocaleString("en") }));
      else line.append(make("td", { class: column.kind }, make("bdi", { class: "label", text: column.key[i] })));
    }
    line.append(make("td", { class: "texts" }, ...texts(rows.question[i], rows.answer[i])));
    const open = make("button", { type: "button", "aria-expanded": "false", "aria-label": `Why: row ${rows.row[i]}`, text: "Why" });
    open.addEventListener("click", () => {
      const expanded = open.getAttribute("aria-expanded") === "true";
      if (expanded) line.nextElementSibling.remove();
      else line.after(details(i));
      open.setAttribute("aria-expanded", String(!expanded));
    });
    line.append(make("td", {}, open));
    return line;
  }

  function fill() {
    const index = selected();
    const pages = Math.max(1, Math.ceil(index.length / state.size));
    state.page = Math.min(state.page, pages - 1);
    columns.forEach((column, position) => {
      if (position === state.column) column.cell.setAttribute("aria-sort", state.order);
      else column.cell.removeAttribute("aria-sort");
    });
    const start = state.page * state.size;
    body.replaceChildren(...index.slice(start, start + state.size).map(rowOf));
    find("status").textContent = index.length
      ? `${index.length.toLocaleString("en")} rows found. Sorted by ${columns[state.column].name.toLowerCase()}, ${state.order}.`
      : "No row found.";
    find("page").textContent = `Page ${state.page + 1} of ${pages}`;
    find("previous").disabled = state.page === 0;
    find("next").disabled = state.page >= pages - 1;
  }

  let waiting = 0;
  find("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = event.target.value.toLowerCase().trim(); state.page = 0; fill(); }, 120);
  });
  find("part").addEventListener("change", (event) => {
    state.part = event.target.value;
    state.page = 0;
    state.column = 0;
    state.order = state.part === "low" ? "ascending" : "descending";
    fill();
  });
  find("size").addEventListener("change", (event) => { state.size = Number(event.target.value); state.page = 0; fill(); });
  find("previous").addEventListener("click", () => { state.page -= 1; fill(); });
  find("next").addEventListener("click", () => { state.page += 1; fill(); });
  find("scriptless").remove();
  find("explorer").hidden = false;
  fill();
})();
