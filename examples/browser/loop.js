// The loop: several workers write one text together, in the layout "combined", each token the likeliest one.
//
// Every worker sees, in this order: what is common (the prompt, then all finished paragraphs), a heading, what the
// others are writing, a heading, what it is writing itself. When its paragraph has closed, that moves to the common
// block, and it begins the next. The rules are those of the package's workers.py, and tests hold the two together.

import { Cache, require, step } from "./engine.js";
import { fill, paragraph_closed } from "./words.js";

export const COMMON = "common";
const HEADER_OTHERS = "header others";
const HEADER_OWN = "header own";
// `check_after`: tokens sampled by all workers between two questions whether work is done twice
const LIMITS = { max_steps: 1024, check_after: 1024 };
export const NAMES = [
  ...["Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi"],
  ...["Ivan", "Judy", "Kim", "Leo", "Mallory", "Nina", "Oscar", "Peggy"],
];

// Of the words that a prompts.json may set: those that it must, those that this loop knows only one value of, and those
// that it has no use for
const NEEDED = ["together", "header_others", "header_own", "prefix", "check"];
const ONLY = {
  ...{ may_end: true, boxed: false, done: "", opening: "auto" },
  ...{ banned: [], roles: [], unaware: [], head_start: 0 },
};
const UNSAID = { ...ONLY, may_end: false, boxed: true }; // what silence means
const UNUSED = ["alone", "separator", "cue", "finisher_tokens", "problem", "pace"];

export const block_of = name => `text of ${name}`;

class Worker {
  constructor(name, names) {
    const others = names.filter(other => other !== name).map(block_of);
    this.name = name;
    this.view = [COMMON, HEADER_OTHERS, ...others, HEADER_OWN, block_of(name)];
    this.to_feed = []; // token ids: a prefix, or what it has sampled last
    this.feeds_sampled = false;
    this.paragraphs = []; // the sampled text of each
    this.token_ids = []; // all of its own: prefixes, and what it sampled
    this.sampled = 0; // how many of them it sampled
    this.active = true;
    this.stream = null; // bytes to text; a character may take several tokens
  }

  get block() {
    return this.view.at(-1);
  }
}

function check_words(words) {
  for (const name of NEEDED) require(typeof words[name] === "string", `prompts.json must have ${name}, a text`);
  for (const [name, only] of Object.entries(ONLY)) {
    const found = JSON.stringify(words[name] ?? UNSAID[name]);
    const known = JSON.stringify(only);
    require(found === known, `prompts.json: ${name} ${found} is not supported here, only ${known}`);
  }
  require(words.names === undefined, "prompts.json: other names are not supported here");
  const all = [...NEEDED, ...Object.keys(ONLY), ...UNUSED, "names"];
  const unknown = Object.keys(words).find(name => !all.includes(name));
  require(unknown === undefined, `prompts.json: ${unknown} is not known here`);
}

export class Run {
  constructor(model, tokenizer, words, problem, workers, limits = LIMITS) {
    check_words(words);
    const is_count = Number.isInteger(workers) && 1 <= workers && workers <= NAMES.length;
    require(is_count, `workers must be a whole number from 1 to ${NAMES.length}, not ${workers}`);
    const names = NAMES.slice(0, workers);
    this.model = model;
    this.tokenizer = tokenizer;
    this.words = words;
    this.limits = limits;
    this.workers = names.map(name => new Worker(name, names));
    this.cache = new Cache(model.config, [COMMON, HEADER_OTHERS, HEADER_OWN, ...names.map(block_of)]);
    this.forward_steps = 0; // without the prompt's
    this.sampled_since_check = 0;
    this.stopped_by = null;

    const text = fill(words.together, { names: names.join(", "), n: workers, first: names[0], problem });
    const prompt = tokenizer.encode(text.trim() + "\n"); // all that duet's chat_template.jinja does
    const headers = [HEADER_OTHERS, HEADER_OWN];
    const header_ids = [words.header_others, words.header_own].map(header => tokenizer.encode(header));
    this.prompt_feeds = [
      { views: [[COMMON]], tokens: [prompt] },
      { views: headers.map(header => [COMMON, header]), tokens: header_ids }, // read once, and never again
    ];
  }

  /** So a page does not stand still while a long prompt is read: in pieces of so many tokens. */
  read_prompt_in_pieces(size) {
    const [first, headers] = this.prompt_feeds;
    const [prompt] = first.tokens;
    const pieces = [];
    for (let start = 0; start < prompt.length; start += size)
      pieces.push({ views: first.views, tokens: [prompt.slice(start, start + size)] });
    this.prompt_feeds = [...pieces, headers];
  }

  get is_reading_prompt() {
    return this.prompt_feeds.length > 0;
  }

  /**
   * One forward pass, and what follows from it. Returns what has happened, in order; [] when all is over:
   *   {do: "step", views, tokens, sampled}, {do: "move", from, to, worker}, {do: "begin", worker},
   *   {do: "text", worker, text}, {do: "retire", worker}
   */
  next(watch = null) {
    const prompt_feed = this.prompt_feeds.shift();
    if (prompt_feed) {
      step(prompt_feed.views, prompt_feed.tokens, this.model, this.cache, watch);
      const begun = this.is_reading_prompt ? [] : this.workers.map(worker => this.begin_paragraph(worker));
      return [{ do: "step", ...prompt_feed, sampled: prompt_feed.views.map(() => null) }, ...begun];
    }
    this.stopped_by = this.reason_to_stop();
    if (this.stopped_by) return [];

    const writing = this.workers.filter(worker => worker.active);
    const views = writing.map(worker => worker.view);
    const tokens = writing.map(worker => worker.to_feed);
    const logits = step(views, tokens, this.model, this.cache, watch);
    this.forward_steps += 1;

    const V = this.model.config.vocab_size;
    const sampled = writing.map(() => null);
    const events = [{ do: "step", views, tokens, sampled }];
    writing.forEach((worker, row) => {
      if (this.has_ended(worker)) {
        worker.active = false;
        events.push({ do: "retire", worker: worker.name });
      } else if (paragraph_closed(worker.paragraphs.at(-1))) {
        this.cache.move(worker.block, COMMON);
        events.push({ do: "move", from: worker.block, to: COMMON, worker: worker.name });
        events.push(this.begin_paragraph(worker));
      } else {
        sampled[row] = likeliest(logits.subarray(row * V, (row + 1) * V));
        this.sampled_since_check += 1;
        events.push({ do: "text", worker: worker.name, text: this.take(worker, sampled[row]) });
      }
    });
    this.stopped_by = this.reason_to_stop();
    return events;
  }

  /** Was the token that it has just fed an end-of-sequence of its own? */
  has_ended(worker) {
    const ends = [this.model.config.eos_token_id].flat();
    return worker.feeds_sampled && ends.includes(worker.to_feed.at(-1));
  }

  /** Queue the prefix of the worker's next paragraph: it is fed as one chunk, in one step. */
  begin_paragraph(worker) {
    const number = worker.paragraphs.length + 1;
    let prefix = this.tokenizer.encode(fill(this.words.prefix, { name: worker.name, number }));
    if (this.sampled_since_check >= this.limits.check_after && this.workers.length > 1) {
      this.sampled_since_check = 0;
      prefix = prefix.concat(this.tokenizer.encode(this.words.check));
    }
    worker.to_feed = prefix;
    worker.feeds_sampled = false;
    worker.paragraphs.push("");
    worker.token_ids.push(...prefix);
    worker.stream = new TextDecoder("utf-8", { ignoreBOM: true }); // it stays in the text
    return { do: "begin", worker: worker.name };
  }

  /** Give a worker the token that was sampled for it: it is fed in the next step. Returns the text that this adds. */
  take(worker, id) {
    worker.to_feed = [id];
    worker.feeds_sampled = true;
    worker.token_ids.push(id);
    worker.sampled += 1;
    const text = worker.stream.decode(this.tokenizer.bytes_of(id), { stream: true });
    worker.paragraphs[worker.paragraphs.length - 1] += text;
    return text;
  }

  /** Why no further step follows; null: one does. */
  reason_to_stop() {
    const writing = this.workers.filter(worker => worker.active);
    if (writing.length === 0) return "retired";
    if (this.forward_steps >= this.limits.max_steps) return "steps";
    const fed = new Map(writing.map(worker => [worker.block, worker.to_feed.length]));
    const length_after = block => this.cache.length(block) + (fed.get(block) ?? 0);
    const length_of = view => view.reduce((sum, block) => sum + length_after(block), 0);
    const longest = Math.max(...writing.map(worker => length_of(worker.view)));
    return longest > this.model.config.max_position_embeddings ? "context" : null;
  }
}

function likeliest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}
