"use strict";
// The table of problems and the traces side by side. What is chosen stands in the address after #, so that a link leads to it.

const PAGE = 100; // rows that are drawn at a time
const DEFAULTS = {
  benchmark: "", a: "", b: "", level: "", subject: "", outcome: "", text: "", sort: "difference", order: "down",
  every: "", problem: "", sample_a: "", sample_b: "",
};
const VERDICTS = {
  ok: "right", wrong: "wrong", unparsed: "no answer could be read", timeout: "wrong: out of time", error: "wrong: an error",
};
const MINUS = "\u2212";
const $ = (id) => document.getElementById(id);
const view = { ...DEFAULTS };
const loaded = {}; // blobs by id
let shown = []; // places of the problems that pass the filters, in order
let drawn = 0; // how many of them are in the table
let of = ""; // the choices that the table shows
let turn = 0; // the newest call of show; older ones stop

function blob(id) {
  // Plain data that the page carries as base64 of gzipped JSON; null if it does not.
  const found = $(id);
  loaded[id] ??= found
    ? new Response(
        new Blob([Uint8Array.from(atob(found.textContent.trim()), (c) => c.charCodeAt(0))])
          .stream()
          .pipeThrough(new DecompressionStream("gzip")),
      ).json()
    : Promise.resolve(null);
  return loaded[id];
}

const benchmarks = () => [...$("benchmark").options].map((option) => option.value);
const percent = (x) => (Number.isFinite(x) ? `${(100 * x).toFixed(0)} %` : "–");
function signed(x) {
  if (!Number.isFinite(x)) return "–";
  const text = Math.abs(100 * x).toFixed(1);
  return text === "0.0" ? text : (x > 0 ? "+" : MINUS) + text;
}

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => element("option", text, { value })));
  select.value = options.some(([value]) => value === chosen) ? chosen : (options[0]?.[0] ?? "");
  return select.value;
}

// --- the table -----------------------------------------------------------------------------------

function columns(data) {
  // What each column shows of a problem, and what it sorts by.
  const [a, b] = [view.a, view.b].map((arm) => data.arms.indexOf(arm));
  const share = (arm) => (p) => data.right[arm][p] / data.drawn[arm][p];
  const mean = (p) => {
    const known = data.arms.map((_, arm) => share(arm)(p)).filter(Number.isFinite);
    return known.reduce((sum, x) => sum + x, 0) / known.length;
  };
  const made = { problem: { head: "problem", of: (p) => data.problems[p] } };
  made.difference = { head: "difference", of: (p) => share(a)(p) - share(b)(p), say: signed };
  made.a = { head: view.a, of: share(a), say: percent };
  made.b = { head: view.b, of: share(b), say: percent };
  if (data.levels.some((x) => x !== null)) made.level = { head: "level", of: (p) => data.levels[p] };
  if (data.subjects.some((x) => x !== null)) made.subject = { head: "subject", of: (p) => data.subjects[p], left: true };
  made.mean = { head: "all arms", of: mean, say: percent };
  if (view.every)
    data.arms.forEach((arm, i) => {
      if (i !== a && i !== b) made[`arm ${arm}`] = { head: arm, of: share(i), say: percent };
    });
  return made;
}

function passes(data, difference, p) {
  if (view.level && String(data.levels[p]) !== view.level) return false;
  if (view.subject && data.subjects[p] !== view.subject) return false;
  const outcome = difference > 0 ? "won" : difference < 0 ? "lost" : difference === 0 ? "tied" : "";
  if (view.outcome && outcome !== view.outcome) return false;
  const wanted = view.text.toLowerCase();
  return !wanted || `${data.problems[p]} ${data.starts[p]}`.toLowerCase().includes(wanted);
}

function compared(x, y) {
  // Missing values come last, whatever the direction.
  const none = (v) => v === null || v === undefined || Number.isNaN(v);
  if (none(x) || none(y)) return none(x) - none(y);
  const sign = view.order === "down" ? -1 : 1;
  return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
}

function table(data) {
  const made = columns(data);
  if (!(view.sort in made)) view.sort = "difference";
  const difference = data.problems.map((_, p) => made.difference.of(p));
  const keys = data.problems.map((_, p) => made[view.sort].of(p));
  shown = data.problems.map((_, p) => p).filter((p) => passes(data, difference[p], p));
  shown.sort((p, q) => compared(keys[p], keys[q]) || p - q);
  const heads = Object.entries(made).map(([name, column]) => {
    const head = element("th", "", { scope: "col" });
    if (column.left) head.className = "left";
    const down = view.order === "down";
    const sorted = name === view.sort;
    if (sorted) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const button = element("button", column.head + (sorted ? (down ? " ▼" : " ▲") : ""), { type: "button", "data-sort": name });
    head.append(button);
    return head;
  });
  const row = element("tr");
  row.append(...heads);
  $("problem-head").replaceChildren(row);
  $("problem-rows").replaceChildren();
  drawn = 0;
  more(data, made, difference);
  const count = (test) => shown.filter((p) => test(difference[p])).length;
  $("counts").textContent =
    `${shown.length} of ${data.problems.length} problems: ${view.a} solves ${count((d) => d > 0)} more often than ${view.b}, ` +
    `${count((d) => d < 0)} less often, ${count((d) => d === 0)} as often.`;
  $("more").onclick = () => more(data, made, difference);
}

function more(data, made, difference) {
  // Draw the next rows.
  const rows = shown.slice(drawn, drawn + PAGE).map((p) => {
    const row = element("tr");
    row.dataset.place = p;
    if (data.problems[p] === view.problem) row.className = "chosen";
    for (const [name, column] of Object.entries(made)) {
      const value = column.of(p);
      const cell = element("td", column.say ? column.say(value) : (value ?? "–"));
      if (column.left) cell.className = "left";
      if (name === "difference") cell.className = difference[p] > 0 ? "better" : difference[p] < 0 ? "worse" : "";
      if (name === "problem") {
        cell.replaceChildren(element("button", value, { type: "button", "data-problem": value }));
        if (data.starts[p]) cell.append(element("small", data.starts[p]));
      }
      row.append(cell);
    }
    return row;
  });
  $("problem-rows").append(...rows);
  drawn += rows.length;
  $("more").hidden = drawn >= shown.length;
  $("more").textContent = `Show ${Math.min(PAGE, shown.length - drawn)} more of ${shown.length - drawn}`;
}

// --- two traces ----------------------------------------------------------------------------------

function traces(data, written) {
  const place = data.problems.indexOf(view.problem);
  $("traces").hidden = place < 0;
  if (place < 0) return;
  $("trace-title").textContent = view.problem;
  const at = shown.indexOf(place);
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === shown.length - 1;
  const samples = written ? written.problem.flatMap((p, i) => (p === place ? [i] : [])) : [];
  $("no-texts").hidden = samples.length > 0;
  $("prompt").textContent = written?.prompts[place] ?? data.starts[place] ?? "";
  $("prompt-part").hidden = !$("prompt").textContent;
  const gold = written?.golds[place] ?? null;
  $("gold").textContent = gold ?? "";
  $("gold-part").hidden = gold === null;
  const texts = ["a", "b"].map((side) => trace(side, data, written, samples));
  $("equal").hidden = texts[0] === null || texts[0] !== texts[1];
}

function trace(side, data, written, samples) {
  const arm = data.arms.indexOf(view[side]);
  const mine = samples.filter((i) => written.arm[i] === arm);
  const seeds = new Set(mine.map((i) => written.data_seed[i]));
  const name = (i) =>
    (seeds.size > 1 ? `data seed ${written.data_seed[i]}, ` : "") + `seed ${written.seed[i]}, sample ${written.sample[i]}`;
  const value = (i) => [written.data_seed[i], written.seed[i], written.sample[i]].join(".");
  const options = mine.map((i) => [value(i), `${name(i)}: ${VERDICTS[written.status[i]] ?? written.status[i]}`]);
  const chosen = fill($(`sample_${side}`), options, view[`sample_${side}`]);
  const i = mine.find((each) => value(each) === chosen);
  $(`name_${side}`).textContent = view[side];
  $(`written_${side}`).hidden = i === undefined;
  $(`none_${side}`).hidden = i !== undefined;
  if (i === undefined) return null;
  const status = $(`verdict_${side}`);
  status.textContent = VERDICTS[written.status[i]] ?? written.status[i];
  status.className = written.status[i] === "ok" ? "better" : "worse";
  $(`extracted_${side}`).textContent = written.texts[written.extracted[i]] ?? "none";
  $(`tokens_${side}`).textContent = `${written.tokens[i] ?? "?"}${written.truncated[i] ? ", cut off" : ""}`;
  const text = written.texts[written.text[i]];
  $(`text_${side}`).textContent = text;
  return text;
}

// --- what is chosen --------------------------------------------------------------------------------

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) view[name] = given.get(name) ?? DEFAULTS[name];
  if (!benchmarks().includes(view.benchmark)) view.benchmark = benchmarks()[0];
  return given.size > 0 && [...given.keys()].every((name) => name in DEFAULTS);
}

function write() {
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) if (value !== DEFAULTS[name]) said.set(name, value);
  try {
    history.replaceState(null, "", `#${said}`);
  } catch {
    // A frame may forbid it; then there is no link.
  }
}

async function show() {
  const mine = ++turn;
  const index = benchmarks().indexOf(view.benchmark);
  const data = await blob(`problems-${index}`);
  if (mine !== turn) return;
  const option = $("benchmark").options[index];
  $("benchmark").value = view.benchmark;
  const arms = data.arms.map((arm) => [arm, arm]);
  view.a = fill($("a"), arms, view.a || option.dataset.a);
  view.b = fill($("b"), arms, view.b || option.dataset.b);
  for (const [name, values] of [["level", data.levels], ["subject", data.subjects]]) {
    const known = [...new Set(values.filter((x) => x !== null))].sort((x, y) => (typeof x === "number" ? x - y : x < y ? -1 : 1));
    view[name] = fill($(name), [["", "all"], ...known.map((x) => [String(x), String(x)])], view[name]);
    $(`${name}-part`).hidden = known.length === 0;
  }
  $("outcome").value = view.outcome;
  view.outcome = $("outcome").value;
  if ($("text").value !== view.text) $("text").value = view.text;
  $("every").checked = Boolean(view.every);
  $("held").textContent = option.dataset.held;
  const { problem, sample_a, sample_b, ...wanted } = view;
  if (JSON.stringify(wanted) !== of) table(data);
  of = JSON.stringify({ ...wanted, sort: view.sort });
  const place = String(data.problems.indexOf(problem));
  for (const row of $("problem-rows").rows) row.className = row.dataset.place === place ? "chosen" : "";
  const written = view.problem ? await blob(`traces-${index}`) : null;
  if (mine !== turn) return;
  traces(data, written);
  document.documentElement.dataset.shown = String(mine);
  performance.mark("shown");
}

function choose(changes) {
  Object.assign(view, changes);
  write();
  return show();
}

function open(problem) {
  choose({ problem, sample_a: "", sample_b: "" }).then(() => {
    $("traces").scrollIntoView({ block: "start" });
    $("trace-title").focus({ preventScroll: true });
  });
}

async function follow() {
  if (!read()) return show();
  await show();
  (view.problem ? $("traces") : $("problems")).scrollIntoView({ block: "start" });
}

function start() {
  document.documentElement.classList.add("live");
  for (const name of ["benchmark", "a", "b", "level", "subject", "outcome"])
    $(name).addEventListener("change", (event) =>
      choose({ [name]: event.target.value, ...(name === "benchmark" ? { level: "", subject: "", problem: "" } : {}) }),
    );
  for (const side of ["a", "b"])
    $(`sample_${side}`).addEventListener("change", (event) => choose({ [`sample_${side}`]: event.target.value }));
  $("text").addEventListener("input", (event) => choose({ text: event.target.value }));
  $("every").addEventListener("change", (event) => choose({ every: event.target.checked ? "1" : "" }));
  $("swap").addEventListener("click", () => choose({ a: view.b, b: view.a, sample_a: view.sample_b, sample_b: view.sample_a }));
  $("problem-head").addEventListener("click", (event) => {
    const name = event.target.dataset.sort;
    if (!name) return;
    const turned = view.order === "down" ? "up" : "down";
    choose({ sort: name, order: name === view.sort ? turned : name === "problem" ? "up" : "down" }).then(() =>
      $("problem-head").querySelector(`[data-sort="${CSS.escape(name)}"]`).focus(),
    );
  });
  $("problem-rows").addEventListener("click", (event) => {
    const button = event.target.closest("[data-problem]");
    if (button) open(button.dataset.problem);
  });
  for (const [id, by] of [["previous", -1], ["next", 1]])
    $(id).addEventListener("click", async () => {
      const data = await blob(`problems-${benchmarks().indexOf(view.benchmark)}`);
      const at = shown.indexOf(data.problems.indexOf(view.problem));
      open(data.problems[shown[at + by]]);
    });
  $("close").addEventListener("click", () => choose({ problem: "" }));
  addEventListener("hashchange", follow);
  if (location.hash.length > 1) return follow();
  // Nothing is unpacked before it is looked at.
  new IntersectionObserver((seen, observer) => {
    if (!seen.some((each) => each.isIntersecting)) return;
    observer.disconnect();
    read();
    show();
  }, { rootMargin: "600px" }).observe($("problems"));
}

if ($("problems") && "DecompressionStream" in window) start();
