// A schedule in, logits out, by engine.js: node examples/browser/replay.mjs schedule.json model-folder out.safetensors
//
// The format is that of `python -m minihogwild.replay`, and so `python -m minihogwild.compare` can hold the two against
// each other. Exit code 0; 2 for bad input, which is told in one line.

import { closeSync, openSync, readFileSync, renameSync, rmSync, writeSync } from "node:fs";
import { join } from "node:path";

import { Cache, InputError, arrange_weights, parse_config, read_safetensors, require, step } from "./engine.js";

function read(path) {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new InputError(`${path} cannot be read: ${error.code}`);
  }
}

function read_json(path) {
  const text = read(path).toString();
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new InputError(`${path} is not JSON: ${error.message}`);
  }
  require(value !== null && typeof value === "object" && !Array.isArray(value), `${path} must be an object`);
  return value;
}

function load_model(folder) {
  const config = parse_config(read_json(join(folder, "config.json")));
  const file = read(join(folder, "model.safetensors"));
  const buffer = file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength);
  return { config, weights: arrange_weights(read_safetensors(buffer), config) };
}

// ---- what a schedule may say

const is_list_of = (kind, list) => Array.isArray(list) && list.every(kind);
const is_text = value => typeof value === "string";
const quoted = names => names.map(name => JSON.stringify(name)).join(", ");

function check_schedule(schedule, vocab_size) {
  const { version = 1, blocks, events } = schedule;
  require(version === 1, `version ${version} is not known, only 1`);
  const names_differ = is_list_of(is_text, blocks) && new Set(blocks).size === blocks.length;
  require(names_differ, "blocks must be a list of names that differ");
  require(Array.isArray(events), "events must be a list");
  events.forEach((event, index) => {
    try {
      check_event(event, blocks, vocab_size);
    } catch (error) {
      throw error instanceof InputError ? new InputError(`event ${index}: ${error.message}`) : error;
    }
  });
}

function check_event(event, blocks, vocab_size) {
  const known = names => {
    const unknown = names.filter(name => !blocks.includes(name));
    require(unknown.length === 0, `unknown block ${quoted(unknown)}`);
  };
  if (event?.do === "step") check_step(event, known, vocab_size);
  else if (event?.do === "move") {
    require(is_text(event.from) && is_text(event.to), "'from' and 'to' must be names of blocks");
    known([event.from, event.to]);
    require(event.from !== event.to, `block ${quoted([event.from])} cannot be moved onto itself`);
  } else if (event?.do === "drop") {
    require(is_text(event.block), "'block' must be the name of a block");
    known([event.block]);
  } else require(false, "'do' must be step, move or drop");
}

function check_step({ views, tokens }, known, vocab_size) {
  require(is_list_of(view => is_list_of(is_text, view), views), "views must be a list of lists of names");
  require(is_list_of(ids => is_list_of(Number.isInteger, ids), tokens), "tokens must be a list of lists of ids");
  const are_paired = views.length === tokens.length && views.length > 0;
  require(are_paired, "a step needs at least one view, and a token list for each");
  for (const view of views) {
    require(view.length > 0, "a view is empty");
    known(view);
    require(new Set(view).size === view.length, `a block stands twice in the view ${quoted(view)}`);
  }
  const own_blocks = views.map(view => view.at(-1));
  const differ = new Set(own_blocks).size === own_blocks.length;
  require(differ, `two views of one step end in the same block: ${quoted(own_blocks)}`);
  for (const ids of tokens) {
    require(ids.length > 0, "each worker of a step feeds at least one token: a list is empty");
    for (const id of ids)
      require(id >= 0 && id < vocab_size, `token ${id} is outside the vocabulary of ${vocab_size}`);
  }
}

// ---- what comes out

/** What the file begins with: the header's length, and where each step's logits lie. */
function safetensors_header(events, vocab_size) {
  const header = {};
  let begin = 0;
  events.forEach((event, index) => {
    if (event.do !== "step") return;
    const shape = [event.views.length, vocab_size];
    const end = begin + 4 * shape[0] * shape[1];
    header[`step_${String(index).padStart(4, "0")}`] = { dtype: "F32", shape, data_offsets: [begin, end] };
    begin = end;
  });
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8); // so that the numbers begin at a multiple of 8 bytes
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, Buffer.from(text)]);
}

/** The logits of each step, as they are made: so none need be kept. */
function* replay(schedule, model) {
  const cache = new Cache(model.config, schedule.blocks);
  for (const [index, event] of schedule.events.entries()) {
    if (event.do === "move") cache.move(event.from, event.to);
    else if (event.do === "drop") cache.drop(event.block);
    else {
      const logits = step(event.views, event.tokens, model, cache);
      require(logits.every(Number.isFinite), `event ${index}: its logits are not finite`);
      yield logits;
    }
  }
}

function main([schedule_path, folder, out, ...more]) {
  const has_three = out !== undefined && more.length === 0;
  require(has_three, "usage: node replay.mjs schedule.json model-folder out.safetensors");
  const model = load_model(folder);
  const schedule = read_json(schedule_path);
  try {
    check_schedule(schedule, model.config.vocab_size);
  } catch (error) {
    throw error instanceof InputError ? new InputError(`${schedule_path}: ${error.message}`) : error;
  }
  const unfinished = `${out}.unfinished`;
  let file;
  try {
    file = openSync(unfinished, "w");
  } catch (error) {
    throw new InputError(`${out} cannot be written: ${error.code}`);
  }
  try {
    writeSync(file, safetensors_header(schedule.events, model.config.vocab_size));
    for (const logits of replay(schedule, model)) writeSync(file, logits);
    closeSync(file);
    renameSync(unfinished, out);
  } finally {
    rmSync(unfinished, { force: true });
  }
}

try {
  main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof InputError)) throw error;
  console.error(`replay.mjs: ${error.message}`);
  process.exitCode = 2;
}
