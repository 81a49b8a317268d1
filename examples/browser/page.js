// The page: a sheet that can be changed, the workers as they write, and one worker alone beside them.

import { arrange_weights, InputError, parse_config, read_safetensors } from "./engine.js";
import { COMMON, NAMES, Run, block_of } from "./loop.js";
import { make_sheet, read_sheet } from "./sheet.js";
import { Tokenizer } from "./words.js";

const FOLDER = document.documentElement.dataset.model; // where duet's files lie
const FASTEST = 1000; // steps a second: more than there can be
const PACES = [1, 3, 7, 15, 30, 60, FASTEST];
const PIECE = 16; // tokens of the prompt in one pass: short enough that the page can be drawn between two of them
const MOST_DUE = 10; // steps that may wait, on a machine that is slower than the pace
const FRAME = 40; // milliseconds that steps may take between two drawings
const QUIET = 500; // milliseconds after the last key, before it is said what is not understood
const BETWEEN_NEWS = 2500; // milliseconds: a screen reader needs time to say one thing before the next
const MOST_LISTED = 6; // tokens that one looks at; all that it looks at with some weight are coloured
const [LEAST_LISTED, LEAST_COLOURED] = [0.005, 0.01]; // of a look's weight; all weights of a look are 1 together

const $ = id => document.getElementById(id);

/** An element. Text comes in as text: nothing is ever read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = share => `${Math.round(100 * share)} %`;
const visible = text => text.replaceAll("\n", "↵");
const NUMBERS = ["no", "one", "two", "three", "four", "five", "six"];
const in_words = names =>
  names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;

// ---- the model

let model, tokenizer, words;

async function load() {
  async function get(name) {
    const response = await fetch(FOLDER + name);
    const where = "in the repository's folder, python -m http.server serves all that it needs";
    if (!response.ok) throw new InputError(`${FOLDER}${name} is not there: ${where}`);
    return response;
  }
  const json = async name => (await get(name)).json();
  const [config, spelled, file] = await Promise.all([
    json("config.json"),
    json("tokenizer.json"),
    get("model.safetensors"),
  ]);
  words = await json("prompts.json");
  tokenizer = new Tokenizer(spelled);
  const parsed = parse_config(config);
  model = { config: parsed, weights: arrange_weights(read_safetensors(await file.arrayBuffer()), parsed) };
}

// ---- the run: what has happened so far

let sheet = []; // its lines, as read_sheet gives them
let team = null; // the Run that is shown; null: the sheet can still be changed
let solo = null; // the one worker beside it
let state = "loading"; // editing, running, paused, over
let blocks = new Map(); // of the team, by name: tokens, as note_step makes them
let solved = []; // by line: {by, value} once it is worked out
let solo_solved = []; // the same, of the one alone
let end_is_told = false;

const chosen_workers = () => Number(document.querySelector("#workers input:checked").value);
const names = () => NAMES.slice(0, chosen_workers());
const colour_of = name => `c${NAMES.indexOf(name)}`;

/** What a worker has written of its current paragraph, as far as the others can see it. */
const current_text = name =>
  blocks
    .get(block_of(name))
    .filter(token => !token.is_prefix)
    .map(token => token.text)
    .join("");

function begin() {
  clearTimeout(news_of_sheet);
  sheet = read_sheet($("written").value);
  const problem = sheet.map(line => line.text).join("\n");
  team = new Run(model, tokenizer, words, problem, chosen_workers());
  team.read_prompt_in_pieces(PIECE);
  solo = chosen_workers() > 1 ? new Run(model, tokenizer, words, problem, 1) : null;
  solo?.read_prompt_in_pieces(PIECE);
  blocks = new Map([...team.cache.blocks.keys()].map(name => [name, []]));
  solved = sheet.map(() => null);
  solo_solved = sheet.map(() => null);
  end_is_told = false;
  draw_empty("reads the sheet");
}

/** One pass of the team, and one of the worker beside it: whoever has finished waits. Prompts are read first. */
function take_step() {
  const reads = [team, solo].filter(run => run?.is_reading_prompt);
  if (reads.length) {
    for (const run of reads) {
      if (run === team) advance_team();
      else run.next();
    }
    return;
  }
  if (!team.stopped_by) advance_team();
  if (solo && !solo.stopped_by) advance_solo();
  if (team.stopped_by && (!solo || solo.stopped_by)) end();
}

function advance_team() {
  const weights = []; // by new token: of each layer and head
  const watch = (layer, t, head, row, tables) => {
    weights[t] ??= { visible: tables.visible[t], columns: tables.columns, rows: [] };
    weights[t].rows.push(new Float32Array(row));
  };
  const reads_prompt = team.is_reading_prompt;
  for (const event of team.next(reads_prompt ? null : watch))
    if (event.do === "step") note_step(event, weights);
    else if (event.do === "move") note_move(event);
    else if (event.do === "retire" && !team.stopped_by) tell(`${event.worker} has nothing left to do.`);
}

function note_step({ views, tokens }, weights) {
  for (const token of document.querySelectorAll(".t.new")) token.classList.remove("new");
  const fed = [];
  views.forEach((view, row) => {
    const block = view.at(-1);
    const worker = team.workers.find(worker => worker.block === block);
    tokens[row].forEach((id, n) => {
      const token = {
        text: tokenizer.decode([id]),
        by: worker?.name ?? null,
        block, // where it was written
        is_prefix: worker !== undefined && tokens[row].length > 1,
        chooses: n === tokens[row].length - 1, // what comes next, after the last token of those that are fed
        looks: null, // what it looked at, as looks_of tells it
        span: null, // what is drawn of it
      };
      blocks.get(block).push(token);
      fed.push(token);
      show_token(token, tokens[row].length === 1);
    });
  });
  weights.forEach((seen, t) => {
    fed[t].looks = looks_of(fed[t], seen);
  });
}

/**
 * What a token looked at: [{token, weight}], the strongest first, on average over all heads, and by the head that is
 * keenest on others.
 */
function looks_of(token, { visible, columns, rows }) {
  const tokens = columns.flatMap((name, b) => blocks.get(name).slice(0, visible[b])); // all that it saw
  const average = new Float32Array(tokens.length);
  let keenest = null; // of all heads, the one that looks hardest at a single token of another worker's
  let hardest = 0;
  for (const [number, row] of rows.entries())
    row.forEach((weight, n) => {
      average[n] += weight / rows.length;
      const is_anothers = tokens[n].by !== null && tokens[n].by !== token.by;
      if (is_anothers && weight > hardest) [keenest, hardest] = [number, weight];
    });
  if (keenest === null) return { average: strongest(tokens, average), keenest };
  const heads = model.config.num_attention_heads;
  const place = { layer: Math.floor(keenest / heads) + 1, head: (keenest % heads) + 1 };
  return { average: strongest(tokens, average), keenest: strongest(tokens, rows[keenest]), place };
}

/** Only those that can be seen are kept: else each token of a long run would keep a number for every other. */
function strongest(tokens, weights) {
  const looks = tokens.map((token, n) => ({ token, weight: weights[n] }));
  return looks.filter(({ weight }) => weight >= LEAST_LISTED).sort((a, b) => b.weight - a.weight);
}

function note_move({ from, to, worker }) {
  const moved = blocks.get(from);
  const text = moved.map(token => token.text).join("");
  blocks.get(to).push(...moved);
  blocks.set(from, []);
  moved.at(-1).chooses = false; // the line was finished: nothing came next
  show_finished(worker, moved);
  const line = note_result(text, worker, solved);
  if (line) tell(`${worker} has finished ${line.name} = ${line.value}.`);
}

/** Note the result of a finished paragraph, if it has one and the sheet has such a line; the first of a line counts. */
function note_result(text, by, noted) {
  const line = result_in(text);
  const number = sheet.findIndex(({ name }) => name === line?.name);
  if (number < 0) return null;
  noted[number] ??= { by, value: line.value };
  return line;
}

/** The result that a paragraph ends with: “…, so c = 259.” */
function result_in(text) {
  const [, name, value] = text.match(/, so (\w) = (\d+)\.\s*$/) ?? [];
  return name === undefined ? null : { name, value: Number(value) };
}

function advance_solo() {
  const [worker] = solo.workers;
  const paragraph = worker.paragraphs.at(-1);
  const events = solo.next();
  if (events.some(event => event.do === "move")) note_result(paragraph, worker.name, solo_solved);
}

// ---- who does what, read from what they have written

function status_of(worker) {
  if (!worker.active) return { words: "has nothing left to do" };
  const text = current_text(worker.name);
  if (text === "") return { words: "chooses a line" };
  if (/(?:^|\? )nothing/.test(text)) return { words: "sees that nothing is left" };
  const yielded = text.match(/(\w)\? $/)?.[1];
  if (yielded)
    return { words: `gives way: ${yielded} is ${someone_at(yielded, worker) ?? "somebody"}'s`, kind: "yields" };
  const named = text.match(/(?:^|\? )(\w)$/)?.[1];
  if (named) return { words: `names ${named}`, line: named };
  const line = line_in(text);
  if (!line) return { words: "writes" };
  if (!text.endsWith("…")) return { words: `works on ${line}`, line };
  const awaited = awaited_in(text);
  if (solved[sheet.findIndex(({ name }) => name === awaited)]) return { words: `has waited for ${awaited}`, line };
  const other = someone_at(awaited, worker);
  const who = other ? `which ${other} is working out` : "which nobody has begun";
  return { words: `waits for ${awaited}, ${who}`, line, kind: "waits" };
}

/** The line that a paragraph works out: “a? b = 254 + …” is at b. */
const line_in = text => text.match(/(?:^|\? )(\w) = /)?.[1] ?? null;

/** Whose result a paragraph waits for that ends with “…”: the first term's, unless that has been written. */
function awaited_in(text) {
  const [, first, second, so_far] = text.match(/\w = (\w) \+ (\w) = (.*)$/) ?? [];
  return so_far?.includes(" + ") ? second : first;
}

const someone_at = (line, not) =>
  team.workers.find(worker => worker !== not && line_in(current_text(worker.name)) === line)?.name;

// ---- drawing

function show_token(token, is_new) {
  const looks_new = is_new ? " new" : "";
  const author = token.by === null ? "" : ` ${colour_of(token.by)}`;
  const prefix = token.is_prefix ? " prefix" : "";
  const line_end = token.text === "\n" ? " line_end" : "";
  if (token.text === "") {
    token.span = make("span"); // the end of a worker's text: nothing that one could see, or point at
    return;
  }
  const className = `t${author}${prefix}${line_end}${looks_new}`;
  token.span = make("span", { className, tabIndex: -1 }, visible(token.text));
  token.span.token = token;
  if (token.by !== null) pane_of(token.by).querySelector(".text").append(token.span);
  else if (token.block === COMMON) show_in_sheet(token);
}

const pane_of = name => $(`pane_${NAMES.indexOf(name)}`);

/** A token of the prompt: the names, then the sheet, line after line. */
function show_in_sheet(token) {
  const place = $("read").lastElementChild;
  place.firstElementChild.append(token.span);
  if (token.text === "\n" && $("read").childElementCount <= sheet.length) add_line_to_sheet();
}

function add_line_to_sheet() {
  $("read").append(make("div", { className: "line" }, make("span"), make("span", { className: "dim" })));
}

function show_finished(worker, tokens) {
  const focused = tokens.find(token => token.span === document.activeElement);
  $("finished").append(make("li", { className: colour_of(worker) }, ...tokens.map(token => token.span)));
  focused?.span.focus({ preventScroll: true }); // what is put elsewhere loses the keyboard's focus
  $("history_text").scrollTop = $("history_text").scrollHeight;
}

/** The places for all that follows, still empty: also before the start, so one sees what will be there. */
function draw_empty(status_words) {
  chosen = held = null;
  $("panes").replaceChildren(
    ...names().map((name, n) => {
      const status = make("span", { className: "dim" }, status_words);
      const text = make("div", { className: "text", role: "group", tabIndex: 0 });
      text.ariaLabel = `${name} is writing: arrow keys go from token to token`;
      const title = make("header", {}, make("h2", { className: "by" }, name), status);
      return make("article", { className: `pane c${n}`, id: `pane_${n}` }, title, text);
    }),
  );
  $("finished").replaceChildren();
  $("read").replaceChildren();
  add_line_to_sheet();
  const runs = team !== null;
  document.body.classList.toggle("runs", runs);
  $("editor").hidden = $("rules").hidden = runs;
  $("read").hidden = $("edit").hidden = !runs;
  $("race").hidden = chosen_workers() === 1;
  const count = names().length;
  $("team_name").textContent = count < 3 ? in_words(names()) : `All ${NUMBERS[count]} together`;
  for (const bar of ["team_bar", "solo_bar"]) $(bar).replaceChildren(...sheet.map(() => make("i")));
  $("verdict").replaceChildren();
  draw_race();
  draw_looks();
}

function draw_step() {
  for (const worker of team.workers) {
    const { words, kind } = team.is_reading_prompt ? { words: "reads the sheet" } : status_of(worker);
    const pane = pane_of(worker.name);
    pane.classList.toggle("waits", kind === "waits");
    pane.classList.toggle("yields", kind === "yields");
    const status = pane.querySelector("header .dim");
    if (status.textContent !== words) status.textContent = words;
  }
  draw_sheet_notes();
  draw_race();
  if (!held && !pointed) chosen = null;
  draw_looks();
}

/** Beside each line of the sheet: who is at it, or what came out, and whether that is right. */
function draw_sheet_notes() {
  sheet.forEach((line, number) => {
    const place = $("read").children[number + 1]; // the first has the names
    if (!place) return;
    const at_it = team.workers.find(worker => worker.active && line_in(current_text(worker.name)) === line.name);
    const done = solved[number];
    const who = done?.by ?? at_it?.name;
    place.className = who ? `line ${colour_of(who)}` : "line";
    const note = place.lastElementChild;
    if (done) {
      const is_right = done.value === line.value;
      note.replaceChildren(is_right ? `= ${done.value} ✓ ` : `= ${done.value} ✗ (${line.value}) `);
      note.append(make("span", { className: "by" }, done.by));
      note.className = is_right ? "" : "wrong";
    } else note.textContent = at_it ? `${at_it.name} …` : "";
  });
}

const count = lines => lines.filter(Boolean).length;
const count_right = lines => lines.filter((line, n) => line?.value === sheet[n].value).length;

function draw_race() {
  const so_far = (lines, run) => `${count(lines)} of ${sheet.length} lines · ${run?.forward_steps ?? 0} steps`;
  $("team_count").textContent = so_far(solved, team);
  $("solo_count").textContent = so_far(solo_solved, solo);
  const by = solved
    .filter(Boolean)
    .map(line => colour_of(line.by))
    .sort();
  [...$("team_bar").children].forEach((part, n) => {
    part.className = by[n] ?? "";
  });
  [...$("solo_bar").children].forEach((part, n) => {
    part.className = n < count(solo_solved) ? "alone" : "";
  });
  $("solo_text").textContent = solo?.workers[0].paragraphs.at(-1)?.trimEnd() || " ";
}

/** The last word: “138 steps against 415”. */
function end() {
  set_state("over");
  const all = sheet.length;
  const right = count_right(solved);
  const sums = right === all ? `All ${right} sums are right.` : `${right} of ${all} sums are right.`;
  const stopped = STOPPED[team.stopped_by] ? ` ${in_words(names())} ${STOPPED[team.stopped_by]}.` : "";
  let verdict = `${team.forward_steps} steps`;
  if (solo) {
    verdict += ` against ${solo.forward_steps}`;
    $("verdict").replaceChildren(verdict, make("small", {}, ` ${share_of_steps()}`));
  }
  tell(`${verdict}. ${sums}${stopped}`, true);
}

const OF_A_STEP = "a step of more workers takes longer here; on a GPU hardly";

// What became of workers who did not end by themselves
const STOPPED = {
  steps: "came to the most steps that this page allows",
  context: "had no room left: the model reads only so many tokens",
};

/** Of the race. Who has not done all of the sheet, and done it rightly, has not come to the finish. */
function share_of_steps() {
  const team_short = falls_short(team, solved, in_words(names()));
  const solo_short = falls_short(solo, solo_solved, "One worker alone");
  if (team_short || solo_short) return `This is no fair race: ${[team_short, solo_short].filter(Boolean).join("; ")}.`;
  const share = (team.forward_steps / solo.forward_steps).toFixed(2);
  return `${share} of the steps that one worker alone takes (${OF_A_STEP}).`;
}

/** Why a run's steps can't be compared with those of another; null: they can. */
function falls_short(run, lines, who) {
  const [all, done, right] = [sheet.length, count(lines), count_right(lines)];
  if (STOPPED[run.stopped_by]) return `${who} ${STOPPED[run.stopped_by]}`;
  if (done < all) return `${who} left out ${all - done} of ${all} sums`;
  return right < all ? `${who} got ${all - right} of ${all} sums wrong` : null;
}

// ---- what a token looks at

let chosen = null; // the token whose looks are shown
let held = null; // the same, where it was clicked
let pointed = false; // is the pointer, or the keyboard, at a token?

function choose(token) {
  chosen = token;
  draw_looks();
}

function hold(token) {
  held = held === token ? null : token;
  choose(held);
}

function let_go() {
  held = null;
  pointed = false;
  choose(null);
}

const chosen_heads = () => document.querySelector("#heads input:checked").value;

function draw_looks() {
  for (const span of document.querySelectorAll(".t.hot")) {
    span.classList.remove("hot");
    span.style.removeProperty("--h");
  }
  document.querySelector(".t.looks")?.classList.remove("looks");
  document.body.classList.toggle("holds", chosen !== null);
  $("heads").hidden = !chosen?.looks?.keenest;
  $("let_go").hidden = held === null;
  if (chosen === null) {
    const how = matchMedia("(hover: none)").matches ? "Tap" : "Point at, or click,";
    $("looking").replaceChildren(
      make("p", { className: "dim small" }, `${how} any token that a worker has written.`),
    );
    return;
  }
  chosen.span.classList.add("looks");
  if (!chosen.looks) {
    const words =
      "This was given to the workers, and read before they began. Choose a token that one of them wrote.";
    $("looking").replaceChildren(make("p", { className: "dim small" }, words));
    return;
  }
  const { average, keenest, place } = chosen.looks;
  const heads = model.config.num_hidden_layers * model.config.num_attention_heads;
  const which = `of its ${heads} ways to look (heads), the one that looks hardest at another's token`;
  if (place) $("keenest_name").textContent = `${which} (layer ${place.layer}, head ${place.head})`;
  const looks = keenest && chosen_heads() === "keenest" ? keenest : average;
  for (const { token, weight } of looks) {
    if (weight < LEAST_COLOURED) break;
    token.span.classList.add("hot");
    token.span.style.setProperty("--h", `calc(var(--most) * ${Math.sqrt(weight).toFixed(3)})`);
  }
  const writer = make("span", { className: `by ${colour_of(chosen.by)}` }, chosen.by);
  const itself = make("p", { className: `snippet self ${colour_of(chosen.by)}` }, ...snippet(chosen));
  const intro = make("p", { className: "small" }, ...said_of(chosen, writer));
  const listed = looks.slice(0, MOST_LISTED).map(({ token, weight }) => {
    const meter = make("div", { className: "meter" });
    meter.style.width = `${100 * weight}%`;
    const share = make("span", { className: "percent" }, percent(weight));
    const where = make("span", { className: "where" }, place_of(token));
    return make("li", {}, make("span", { className: "snippet" }, ...snippet(token)), share, meter, where);
  });
  $("looking").replaceChildren(itself, intro, make("ol", {}, ...listed));
}

/** Where a token comes from, and what it looked for: within a name, and after a line, there is nothing to choose. */
function said_of(token, writer) {
  const origin = token.is_prefix ? ["This name was given to ", writer] : [writer, " wrote this"];
  return [...origin, token.chooses ? ". To choose what comes next, it looked at:" : ". As it was read, it looked at:"];
}

/** A token between its neighbours, in the block where it is now. */
function snippet(token) {
  const block = [...blocks.values()].find(tokens => tokens.includes(token));
  const at = block.indexOf(token);
  const text = (from, to) =>
    visible(
      block
        .slice(Math.max(from, 0), to)
        .map(other => other.text)
        .join(""),
    );
  return [text(at - 9, at), make("mark", {}, visible(token.text)), text(at + 1, at + 7)];
}

function place_of(token) {
  if (token.by === null) return token.block === COMMON ? "the sheet" : "a heading between the texts";
  const is_finished = blocks.get(COMMON).includes(token);
  if (token.by === chosen.by) return is_finished ? "its own, finished" : "its own line";
  return is_finished ? `${token.by}, finished` : `${token.by}, being written`;
}

// ---- going about

const LABELS = { loading: "Start", editing: "Start", running: "Pause", paused: "Go on", over: "Again" };

function set_state(next) {
  state = next;
  $("go").textContent = LABELS[state];
  const has_problems = state === "editing" && sheet.some(line => line.problem);
  $("go").disabled = state === "loading" || has_problems;
  $("step").disabled = state === "loading" || state === "over" || has_problems;
  $("over").disabled = team === null;
  $("another").disabled = state === "loading";
  $("looking").ariaLive = state === "running" ? "off" : "polite"; // many a second are no news
  if (state === "running") run_on();
}

let last_told = -Infinity;
let waiting_news = [];

/** Say what has happened, in the line below the buttons. While it runs, only so often, and then all at once. */
function tell(text, at_once = state !== "running") {
  waiting_news.push(text);
  const now = performance.now();
  if (!at_once && now - last_told < BETWEEN_NEWS) return;
  $("said").textContent = at_once ? text : waiting_news.join(" ");
  $("said").classList.remove("bad");
  waiting_news = [];
  last_told = now;
}

/** Do it; if that fails, say so. What is no fault of a file or a sheet goes to the browser's console too. */
function attempt(act) {
  try {
    act();
  } catch (error) {
    fail(error);
    if (!(error instanceof InputError)) throw error;
  }
}

/** Say what went wrong. A run that broke off can begin again; without a model nothing can. */
function fail(error) {
  if (!model) set_state("loading");
  else set_state(team ? "over" : "editing");
  waiting_news = [];
  $("said").textContent = error instanceof InputError ? error.message : `Something went wrong: ${error.message}`;
  $("said").classList.add("bad");
}

const is_reading = () => Boolean(team.is_reading_prompt || solo?.is_reading_prompt);

let next_frame = null;

/** Steps, at the pace that was chosen, until something stops it; between two drawings as many as are due. */
function run_on() {
  let due = 1; // steps, or a part of one
  let before = performance.now();
  function frame() {
    if (state !== "running") return;
    const now = performance.now();
    const pace = team.stopped_by ? FASTEST : PACES[$("speed").value]; // nobody need watch the one to its end
    due = Math.min(due + ((now - before) / 1000) * pace, MOST_DUE);
    before = now;
    while (state === "running" && due >= 1 && performance.now() - now < FRAME) {
      const reads = is_reading();
      take_step();
      due = reads ? 1 : due - 1;
      if (reads) break; // the page is drawn between two pieces of the prompt
    }
    draw_step();
    if (state !== "running") return;
    tell_of_end();
    next_frame = next();
  }
  const next = () => requestAnimationFrame(() => attempt(frame));
  cancelAnimationFrame(next_frame); // that of a run which was paused a moment ago
  next_frame = next();
}

/** That the team has finished, once, where the one worker goes on. */
function tell_of_end() {
  if (!team.stopped_by || end_is_told) return;
  end_is_told = true;
  tell(`${in_words(names())}: done after ${team.forward_steps} steps. The one alone goes on.`, true);
}

function go() {
  if ($("go").disabled) return;
  if (state === "running") {
    set_state("paused");
    tell(`Paused after ${team.forward_steps} steps.`);
    return;
  }
  if (state !== "paused") {
    begin();
    tell(`${in_words(names())} ${team.workers.length > 1 ? "begin" : "begins"}.`);
  }
  set_state("running");
}

function go_one_step() {
  if ($("step").disabled) return;
  if (team === null) {
    begin();
    tell(`${in_words(names())} ${team.workers.length > 1 ? "read" : "reads"} the sheet.`);
  }
  if (state !== "paused") set_state("paused");
  step_when_read();
}

/** One step. Before the first one the prompt is read, a piece between two drawings: it takes a second or so. */
function step_when_read() {
  if (state !== "paused") return;
  cancelAnimationFrame(next_frame);
  const has_read = !is_reading();
  take_step();
  draw_step();
  if (!has_read) next_frame = requestAnimationFrame(() => attempt(step_when_read));
  else if (state === "paused") tell_of_step();
}

function tell_of_step() {
  if (!team.stopped_by) {
    const doings = team.workers.map(worker => `${worker.name} ${status_of(worker).words}`);
    tell(`Step ${team.forward_steps}: ${doings.join("; ")}.`);
  } else if (end_is_told) tell(`One worker alone: step ${solo.forward_steps}.`);
  else tell_of_end();
}

/**
 * Back to the sheet, of which something is said after so many milliseconds of quiet. Without a model nothing can begin:
 * then what was said of that stays.
 */
function start_over(quiet = 0) {
  team = solo = null;
  solved = [];
  solo_solved = [];
  set_state(model ? "editing" : "loading");
  if (model) check_sheet();
  draw_empty("has not begun");
  clearTimeout(news_of_sheet);
  if (!model) return;
  if (quiet > 0) news_of_sheet = setTimeout(tell_of_sheet, quiet);
  else tell_of_sheet();
}

let news_of_sheet = null; // a timer, while somebody types

/** Say beside each line what duet does not understand, before it runs. */
function check_sheet() {
  sheet = read_sheet($("written").value);
  const rows = $("written").value.split("\n").length;
  $("written").style.height = `${1.6 * rows + 0.8}rem`;
  $("notes").replaceChildren(
    ...sheet.map(line => make("li", { className: line.problem ? "bad" : "" }, line.problem?.short ?? "")),
  );
  const problems = sheet.flatMap((line, n) => (line.problem ? [`Line ${n + 1}: ${line.problem.long}`] : []));
  $("problems").replaceChildren(...problems.map(problem => make("li", {}, problem)));
  $("written").ariaInvalid = problems.length > 0;
  set_state(state);
}

/** The same in the one place that a screen reader reads aloud; the words that stand below the sheet are only heard. */
function tell_of_sheet() {
  const problems = [...$("problems").children].map(item => item.textContent);
  if (problems.length === 0) {
    tell("Ready: press Start, or change the sheet first.");
    return;
  }
  const not_understood = problems.length === 1 ? "One line is" : `${problems.length} lines are`;
  tell(`${not_understood} not understood yet: see beside the sheet.`);
  $("said").append(make("span", { className: "unseen" }, ` ${problems.join(" ")}`));
}

function change_pace() {
  const pace = PACES[$("speed").value];
  const said = pace === FASTEST ? "as fast as it can" : `${pace} ${pace === 1 ? "step" : "steps"} a second`;
  $("speed_said").textContent = $("speed").ariaValueText = said;
}

/** From a token to its neighbour, by an arrow key; a text that has the focus gives it to its first or last one. */
function go_to_neighbour(target, key) {
  const text = target.closest(".text");
  const tokens = [...text.querySelectorAll(".t")];
  const at = tokens.indexOf(target);
  const places = {
    ArrowRight: at + 1,
    ArrowLeft: at < 0 ? tokens.length - 1 : at - 1,
    Home: 0,
    End: tokens.length - 1,
  };
  tokens[places[key]]?.focus();
}

function listen() {
  $("go").onclick = () => attempt(go);
  $("step").onclick = () => attempt(go_one_step);
  $("over").onclick = () => start_over();
  $("edit").onclick = () => {
    start_over();
    $("written").focus();
  };
  $("another").onclick = () => {
    $("written").value = make_sheet();
    start_over();
    tell("Another sheet, of random sums: press Start.");
  };
  $("written").oninput = () => start_over(QUIET);
  $("speed").oninput = change_pace;
  $("heads").onchange = draw_looks;
  $("let_go").onclick = let_go;
  $("workers").onchange = () => {
    const was_running = state === "running";
    start_over();
    if (was_running) attempt(go);
  };

  const token_at = event => event.target.closest?.(".t")?.token ?? null;
  document.addEventListener("pointerover", event => {
    if (event.pointerType !== "mouse" || held) return;
    const token = token_at(event);
    pointed = token !== null;
    if (token !== chosen && (token || !event.target.closest("aside"))) choose(token);
  });
  document.addEventListener("focusin", event => {
    const token = token_at(event);
    if (token && event.target.matches(":focus-visible")) {
      pointed = true;
      if (!held) choose(token);
    }
  });
  document.addEventListener("focusout", event => {
    if (token_at(event) && !held) choose(null);
  });
  document.addEventListener("click", event => {
    const token = token_at(event);
    if (token) hold(token);
  });
  document.addEventListener("keydown", event => {
    const { key, target } = event;
    if (event.ctrlKey || event.altKey || event.metaKey || target.matches("textarea")) return;
    const in_text = target.closest?.(".text");
    if (in_text && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(key)) go_to_neighbour(target, key);
    else if (key === "Enter" && token_at(event)) hold(token_at(event));
    else if (key === "Escape") let_go();
    else if (!$("keys").checked) return;
    else if (key === " " && !target.matches("button, input, summary")) attempt(go);
    else if (key === "s" || key === "S") attempt(go_one_step);
    else if ((key === "r" || key === "R") && (state === "paused" || state === "over")) start_over();
    else return;
    event.preventDefault();
  });
}

async function open_page() {
  change_pace();
  draw_looks();
  listen();
  await load();
  const pace = PACES.findIndex(pace => pace >= words.pace);
  if (pace >= 0) $("speed").value = pace;
  change_pace();
  if ($("written").value === "") $("written").value = words.problem;
  start_over();
}

open_page().catch(error => {
  fail(error);
  if (!(error instanceof InputError)) throw error;
});
