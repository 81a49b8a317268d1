// Hogwild! attention once more, in plain JavaScript: from token ids to logits, for all workers in one step.
//
// Nothing here knows about text, about a page or about Node. It was written from the specification, and is held to the
// Python package's oracle by its own commands, replay and compare (tests/test_browser.py).
//
// A block is a run of tokens; key n of a block is stored rotated to position n, whoever looks at it. A view is the list
// of blocks that one worker sees, in its order; the last one is its own, the one it writes to. Two tables say the rest:
// for each new token t and each block b, where the block starts in that token's view, `offset`, and how many of its
// tokens may be seen, `visible`.
//
// Letters, as in the package: T new tokens of a step (all workers), W workers, B blocks, N tokens of a block, H query
// heads, K key/value heads, D numbers of a head, E numbers of a token, F of the MLP's inside, V vocabulary.
// JavaScript's own numbers have 64 bits: sums and angles are made in those, and what is kept has 32.

/** What can't be done, said in one line that names the culprit. */
export class InputError extends Error {}

export function require(holds, otherwise) {
  if (!holds) throw new InputError(otherwise);
}

// ---- config.json

// What each family means where its config.json is silent
const FAMILIES = {
  llama: {},
  mistral: { max_position_embeddings: 131072 },
  qwen2: { max_position_embeddings: 32768 },
  qwen3: { max_position_embeddings: 32768, head_dim: 128 },
  seed_oss: { max_position_embeddings: 524288, head_dim: 128 },
  smollm3: { max_position_embeddings: 32768, rope_theta: 2e6, tie_word_embeddings: true },
};
const TRAINED_LENGTH = "original_max_position_embeddings";
// The numbers that each type of rope must have; what YaRN may have besides; and what is known to mean nothing in it
const ROPE_NEEDS = {
  default: [],
  linear: ["factor"],
  llama3: ["factor", "low_freq_factor", "high_freq_factor", TRAINED_LENGTH],
  yarn: ["factor"],
};
const YARN_NUMBERS = [TRAINED_LENGTH, "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"];
const YARN_MAY_HAVE = [...YARN_NUMBERS, "truncate", "attn_factor", "finetuned"];
const COUNTS = [
  ...["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"],
  ...["num_attention_heads", "num_key_value_heads", "head_dim"],
];

/** The numbers of a model, under config.json's own names. Refuses by name what would change the mathematics. */
export function parse_config(given) {
  const family = FAMILIES[given.model_type];
  const known = Object.keys(FAMILIES).join(", ");
  require(family, `config.json: model_type ${given.model_type} is not supported here (${known} are)`);
  const defaults = {
    max_position_embeddings: 2048,
    rope_theta: 10000,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
  };
  const config = { ...defaults, ...family, ...without_nulls(given) };

  config.num_key_value_heads ??= config.num_attention_heads;
  config.head_dim ??= config.hidden_size / config.num_attention_heads;
  for (const key of COUNTS) {
    const is_count = Number.isInteger(config[key]) && config[key] > 0;
    require(is_count, `config.json: ${key} must be a whole number from 1 on, not ${config[key]}`);
  }
  const packed = config.quantization_config ?? config.quantization;
  require(!packed, "config.json: packed weights (quantization_config) are not supported here");
  const always_has_window = given.model_type === "mistral" && given.sliding_window !== null;
  const some_layer_has = config.layer_types?.includes("sliding_attention");
  const has_window = config.use_sliding_window || always_has_window || some_layer_has;
  require(!has_window, "config.json: sliding_window is not supported here");
  const unknown = config.layer_types?.find(type => type !== "full_attention");
  require(unknown === undefined, `config.json: layer_types ${unknown} is not supported here`);
  const activation = config.hidden_act ?? "silu";
  require(activation === "silu", `config.json: hidden_act ${activation} is not supported here`);
  const [H, K] = [config.num_attention_heads, config.num_key_value_heads];
  require(H % K === 0, `config.json: num_attention_heads ${H} is no multiple of num_key_value_heads ${K}`);
  const is_even = config.head_dim % 2 === 0;
  require(is_even, `config.json: head_dim ${config.head_dim} is not an even number: rope turns pairs`);
  config.rope = parse_rope(config, given.rope_theta);
  config.is_rotated = rotated_layers(config);
  return config;
}

/** null says what silence says. */
function without_nulls(settings) {
  return Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== null));
}

/** From `rope_scaling`, with `rope_theta` beside it; or, where that says nothing, from the newer `rope_parameters`. */
function parse_rope(config, given_theta) {
  const [older, newer] = [config.rope_scaling ?? {}, config.rope_parameters ?? {}].map(without_nulls);
  const is_older = Object.keys(older).length > 0;
  const theta_is_lost = is_older && newer.rope_theta && ![older.rope_theta, given_theta].some(Boolean);
  require(!theta_is_lost, "config.json: rope_scaling lacks the rope_theta that rope_parameters has beside it");
  const { type = "default", rope_type = type, rope_theta = config.rope_theta, ...rest } = is_older ? older : newer;
  const { partial_rotary_factor = config.partial_rotary_factor ?? 1, ...numbers } = rest;
  require(partial_rotary_factor === 1, "config.json: partial_rotary_factor is not supported here");

  const supported = Object.keys(ROPE_NEEDS).join(", ");
  const needed = Object.hasOwn(ROPE_NEEDS, rope_type) ? ROPE_NEEDS[rope_type] : null;
  require(needed, `config.json: rope type ${rope_type} is not supported here (${supported} are)`);
  const missing = needed.filter(key => !Number.isFinite(numbers[key]));
  require(missing.length === 0, `config.json: rope type ${rope_type} needs ${missing.join(", ")}`);
  const known = rope_type === "yarn" ? [...needed, ...YARN_MAY_HAVE] : needed;
  const unknown = Object.keys(numbers).filter(key => !known.includes(key));
  require(unknown.length === 0, `config.json: rope type ${rope_type} has unknown keys: ${unknown.join(", ")}`);
  const wrong = YARN_NUMBERS.find(key => key in numbers && !Number.isFinite(numbers[key]));
  require(wrong === undefined, `config.json: ${wrong} must be a number`);
  const { factor = 1 } = numbers;
  require(factor > 0, `config.json: rope type ${rope_type}: factor ${factor} is not above 0`);
  if (rope_type === "llama3") {
    const { low_freq_factor: low, high_freq_factor: high } = numbers;
    require(low < high, `config.json: low_freq_factor ${low} is not below high_freq_factor ${high}`);
  }
  numbers[TRAINED_LENGTH] ??= config[TRAINED_LENGTH] ?? config.max_position_embeddings;
  return { rope_type, rope_theta, ...numbers };
}

/** For each layer: are its queries and keys rotated? SmolLM3 has layers where they are not. */
function rotated_layers(config) {
  const layers = Array.from({ length: config.num_hidden_layers }, (_, number) => number);
  if (config.model_type !== "smollm3") return layers.map(() => true);
  const interval = config.no_rope_layer_interval ?? 4;
  return layers.map(number => Boolean(config.no_rope_layers?.[number] ?? (number + 1) % interval !== 0));
}

// ---- model.safetensors

/** All tensors of a safetensors file, by name: {shape, data}, in 32 bits. */
export function read_safetensors(buffer) {
  const bytes = new DataView(buffer);
  require(buffer.byteLength >= 8, "model.safetensors is no safetensors file");
  const length = Number(bytes.getBigUint64(0, true));
  require(length <= buffer.byteLength - 8, "model.safetensors is no safetensors file, or not whole");
  const header = read_header(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    require(is_list_of_counts(shape), `model.safetensors: ${name} has no shape`);
    const has_place = is_list_of_counts(data_offsets) && data_offsets.length === 2;
    require(has_place, `model.safetensors: ${name} has no place`);
    const [begin, end] = data_offsets.map(offset => 8 + length + offset);
    require(end <= buffer.byteLength, `model.safetensors is not whole: ${name} is missing`);
    const data = numbers_of(buffer.slice(begin, end), dtype, name);
    const count = shape.reduce((product, size) => product * size, 1);
    require(data?.length === count, `model.safetensors: ${name} is [${shape}], and has ${end - begin} bytes`);
    tensors.set(name, { shape, data });
  }
  return tensors;
}

function read_header(text) {
  let header;
  try {
    header = JSON.parse(text);
  } catch {
    throw new InputError("model.safetensors: its header is not JSON");
  }
  const is_object = header !== null && typeof header === "object" && !Array.isArray(header);
  require(is_object, "model.safetensors: its header must be an object");
  delete header.__metadata__;
  return header;
}

const is_list_of_counts = list => Array.isArray(list) && list.every(count => Number.isInteger(count) && count >= 0);

/** 32-bit numbers; null where the bytes are not whole numbers of them. */
function numbers_of(buffer, dtype, name) {
  const is_known = dtype === "F32" || dtype === "BF16";
  require(is_known, `model.safetensors: ${name} is ${dtype}, which is not supported here (F32 and BF16 are)`);
  if (buffer.byteLength % (dtype === "F32" ? 4 : 2) !== 0) return null;
  if (dtype === "F32") return new Float32Array(buffer);
  const halves = new Uint16Array(buffer);
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16; // a bfloat16 is the first half of a float32
  return new Float32Array(bits.buffer);
}

/** The model's weights, each under a name of ours. What a family adds follows from which tensors there are. */
export function arrange_weights(tensors, config) {
  const { vocab_size: V, hidden_size: E, intermediate_size: F, head_dim: D } = config;
  const [H, K] = [config.num_attention_heads, config.num_key_value_heads];
  const left = new Map(tensors);

  function take_if_there(name, ...shape) {
    const tensor = left.get(name);
    left.delete(name);
    if (tensor === undefined) return null;
    const fits = String(tensor.shape) === String(shape);
    require(fits, `model.safetensors: ${name} is [${tensor.shape}], and should be [${shape}]`);
    return tensor.data;
  }
  function take(name, ...shape) {
    const data = take_if_there(name, ...shape);
    require(data, `model.safetensors has no ${name}`);
    return data;
  }
  function take_matrix(name, outputs, inputs) {
    return {
      data: take(`${name}.weight`, outputs, inputs),
      bias: take_if_there(`${name}.bias`, outputs),
      outputs,
      inputs,
    };
  }
  function take_layer(name) {
    return {
      attn_norm: take(`${name}.input_layernorm.weight`, E),
      q: take_matrix(`${name}.self_attn.q_proj`, H * D, E),
      k: take_matrix(`${name}.self_attn.k_proj`, K * D, E),
      v: take_matrix(`${name}.self_attn.v_proj`, K * D, E),
      out: take_matrix(`${name}.self_attn.o_proj`, E, H * D),
      q_norm: take_if_there(`${name}.self_attn.q_norm.weight`, D),
      k_norm: take_if_there(`${name}.self_attn.k_norm.weight`, D),
      mlp_norm: take(`${name}.post_attention_layernorm.weight`, E),
      gate: take_matrix(`${name}.mlp.gate_proj`, F, E),
      up: take_matrix(`${name}.mlp.up_proj`, F, E),
      down: take_matrix(`${name}.mlp.down_proj`, E, F),
    };
  }

  const embed = take("model.embed_tokens.weight", V, E);
  const layers = config.is_rotated.map((_, number) => take_layer(`model.layers.${number}`));
  const norm = take("model.norm.weight", E);
  const own_head = take_if_there("lm_head.weight", V, E);
  require(config.tie_word_embeddings || own_head, "model.safetensors has no lm_head.weight");
  const head = { data: config.tie_word_embeddings ? embed : own_head, bias: null, outputs: V, inputs: E };
  const [unknown] = left.keys();
  require(unknown === undefined, `model.safetensors: ${unknown} is not known here`);
  return { embed, layers, norm, head };
}

// ---- rope

/** Radians per position of each pair of a head's numbers: [D / 2]. */
export function frequencies_of(config) {
  const { rope, head_dim: D } = config;
  const pairs = Array.from({ length: D / 2 }, (_, pair) => pair);
  const trained = pairs.map(pair => rope.rope_theta ** ((-2 * pair) / D));
  if (rope.rope_type === "default") return trained;
  // All others lie between two ends: as trained, and the same divided by `factor`. How much is kept as trained?
  const kept = pairs.map(pair => clamp(share_kept(rope, trained[pair], pair, D), 0, 1));
  return pairs.map(pair => trained[pair] * kept[pair] + (trained[pair] / rope.factor) * (1 - kept[pair]));
}

function share_kept(rope, frequency, pair, D) {
  if (rope.rope_type === "linear") return 0;
  if (rope.rope_type === "llama3") {
    const turns = (rope[TRAINED_LENGTH] * frequency) / (2 * Math.PI); // within the trained length
    return (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  }
  // yarn: a ramp over the pairs, between those that make beta_fast and beta_slow turns within the trained length
  const pair_that_makes = turns =>
    (D * Math.log(rope[TRAINED_LENGTH] / (2 * Math.PI * turns))) / (2 * Math.log(rope.rope_theta));
  let [low, high] = [pair_that_makes(rope.beta_fast ?? 32), pair_that_makes(rope.beta_slow ?? 1)];
  if (rope.truncate ?? true) [low, high] = [Math.floor(low), Math.ceil(high)];
  [low, high] = [Math.max(low, 0), Math.min(high, D - 1)];
  if (low === high) high += 0.001; // a ramp without width would divide by zero
  return 1 - (pair - low) / (high - low);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

/** YaRN's m: scores are multiplied by m². It belongs there, and never in a rotation: a moved key is rotated twice. */
function attention_factor(rope) {
  if (rope.rope_type !== "yarn") return 1;
  if (rope.attention_factor !== undefined) return rope.attention_factor;
  const growth = 0.1 * Math.log(Math.max(rope.factor, 1));
  if (rope.mscale && rope.mscale_all_dim) return (rope.mscale * growth + 1) / (rope.mscale_all_dim * growth + 1);
  return growth + 1;
}

/** cos and sin of each pair's angle at a position. In 64 bits: 32 are not exact at position 131,072. */
function rotation_to(position, frequencies) {
  const angles = frequencies.map(frequency => position * frequency);
  return { cos: angles.map(Math.cos), sin: angles.map(Math.sin) };
}

/** Turn the pairs (x[i], x[i + D/2]) of each head in x[start, stop), and write them to `into`, from `to` on. */
function rotate(x, start, stop, rotation, into, to) {
  const { cos, sin } = rotation;
  const half = cos.length;
  for (let from = start; from < stop; from += 2 * half, to += 2 * half) // a head after the other
    for (let i = 0; i < half; i++) {
      const a = x[from + i];
      const b = x[from + half + i];
      into[to + i] = a * cos[i] - b * sin[i];
      into[to + half + i] = b * cos[i] + a * sin[i];
    }
}

// ---- blocks

/** One run of tokens: for each layer its keys and values, [N, K * D] each, in arrays that have room for more. */
class Block {
  constructor(layers, width) {
    this.width = width; // K * D
    this.length = 0; // N
    this.keys = Array.from({ length: layers }, () => new Float32Array(0));
    this.values = Array.from({ length: layers }, () => new Float32Array(0));
  }

  /** Count these tokens as the block's, and make room; what is in their place is written by whoever asked. */
  lengthen(count) {
    this.length += count;
    const needed = this.length * this.width;
    if (needed <= this.keys[0].length) return;
    for (const arrays of [this.keys, this.values])
      arrays.forEach((array, layer) => {
        arrays[layer] = new Float32Array(Math.max(needed, 2 * array.length));
        arrays[layer].set(array);
      });
  }
}

/** The keys and values of all blocks, by name. */
export class Cache {
  constructor(config, names) {
    this.frequencies = frequencies_of(config);
    this.is_rotated = config.is_rotated;
    this.width = config.num_key_value_heads * config.head_dim;
    this.blocks = new Map(names.map(name => [name, new Block(config.num_hidden_layers, this.width)]));
  }

  length(name) {
    return this.blocks.get(name).length;
  }

  /** Append the whole of a block to another: keys are rotated on by the other's length, values copied. */
  move(source_name, target_name) {
    const [source, target] = [this.blocks.get(source_name), this.blocks.get(target_name)];
    const [count, start] = [source.length, target.length];
    const turned = rotation_to(start, this.frequencies); // R(start) R(n) = R(start + n)
    target.lengthen(count);
    this.is_rotated.forEach((is_rotated, layer) => {
      const keys = source.keys[layer].subarray(0, count * this.width);
      const values = source.values[layer].subarray(0, count * this.width);
      if (is_rotated) rotate(keys, 0, keys.length, turned, target.keys[layer], start * this.width);
      else target.keys[layer].set(keys, start * this.width);
      target.values[layer].set(values, start * this.width);
    });
    source.length = 0;
  }

  drop(name) {
    this.blocks.get(name).length = 0;
  }
}

// ---- one step

/**
 * The two tables of a step, whose new tokens are counted in the blocks' lengths already.
 * Columns are the blocks of all views, in the order in which the views first name them.
 */
export function tables_of(views, counts, cache) {
  const columns = [...new Set(views.flat())];
  const [offset, visible, own, last] = [[], [], [], []];
  views.forEach((view, worker) => {
    const [starts, lengths] = [columns.map(() => 0), columns.map(() => 0)];
    let start = 0;
    for (const block of view) {
      const column = columns.indexOf(block);
      starts[column] = start;
      lengths[column] = cache.length(block); // all of it: also what others write in this very step
      start += cache.length(block);
    }
    const own_column = columns.indexOf(view.at(-1));
    const own_length = lengths[own_column];
    for (let index = own_length - counts[worker]; index < own_length; index++) {
      const seen = [...lengths];
      seen[own_column] = index + 1; // of its own block, a token sees itself and what stands before it
      offset.push(starts); // one array for all of the worker's tokens: nobody writes to it any more
      visible.push(seen);
      own.push(own_column);
    }
    last.push(own.length - 1);
  });
  return { columns, offset, visible, own, last };
}

/** What follows from the tables for all layers: by how much each new key and each query is to be rotated. */
function positions_of(tables, frequencies) {
  const index = tables.own.map((column, t) => tables.visible[t][column] - 1); // in the token's own block
  const position = tables.own.map((column, t) => tables.offset[t][column] + index[t]); // in its view
  return {
    index,
    key_rotation: index.map(n => rotation_to(n, frequencies)),
    query_rotation: tables.offset.map((starts, t) =>
      starts.map(start => rotation_to(position[t] - start, frequencies)),
    ),
  };
}

/**
 * One step: worker w feeds `tokens[w]` to the last block of `views[w]`. Returns the logits after each worker's last
 * token, [W, V]. `watch(layer, t, head, attention, tables)`, if given, is shown each softmax, column by column.
 */
export function step(views, tokens, model, cache, watch = null) {
  const { config, weights } = model;
  const E = config.hidden_size;
  const ids = tokens.flat();
  const T = ids.length;
  const counts = tokens.map(fed => fed.length);
  views.forEach((view, worker) => cache.blocks.get(view.at(-1)).lengthen(counts[worker]));
  const tables = tables_of(views, counts, cache);
  const positions = positions_of(tables, cache.frequencies);

  const x = new Float32Array(T * E);
  ids.forEach((id, t) => x.set(weights.embed.subarray(id * E, (id + 1) * E), t * E));
  weights.layers.forEach((layer, number) => {
    const y = norm(x, layer.attn_norm, config.rms_norm_eps);
    const [q, k, v] = [linear(y, T, layer.q), linear(y, T, layer.k), linear(y, T, layer.v)];
    const queries = layer.q_norm ? norm(q, layer.q_norm, config.rms_norm_eps) : q;
    const keys = layer.k_norm ? norm(k, layer.k_norm, config.rms_norm_eps) : k;
    append(keys, v, number, tables, positions, cache); // all workers write, and only then does any of them look
    const mixed = attend(queries, number, tables, positions, config, cache, watch);
    add(x, linear(mixed, T, layer.out));
    add(x, mlp(norm(x, layer.mlp_norm, config.rms_norm_eps), T, layer));
  });

  const last = new Float32Array(tables.last.length * E);
  tables.last.forEach((t, worker) => last.set(x.subarray(t * E, (t + 1) * E), worker * E));
  return linear(norm(last, weights.norm, config.rms_norm_eps), tables.last.length, weights.head);
}

/** Write the step's keys and values, [T, K * D] each: a key is rotated to its place in its own block. */
function append(k, v, layer, tables, positions, cache) {
  const { width, is_rotated } = cache;
  tables.own.forEach((column, t) => {
    const block = cache.blocks.get(tables.columns[column]);
    const to = positions.index[t] * width;
    const key = k.subarray(t * width, (t + 1) * width);
    if (is_rotated[layer]) rotate(key, 0, width, positions.key_rotation[t], block.keys[layer], to);
    else block.keys[layer].set(key, to);
    block.values[layer].set(v.subarray(t * width, (t + 1) * width), to);
  });
}

/** Attention of queries [T, H * D], as projected, over all that they may see: [T, H * D]. */
function attend(q, layer, tables, positions, config, cache, watch) {
  const { num_attention_heads: H, num_key_value_heads: K, head_dim: D } = config;
  const G = H / K; // so many query heads share a head of keys and values
  const is_rotated = cache.is_rotated[layer];
  const m = is_rotated ? attention_factor(config.rope) : 1;
  const scale = m ** 2 / Math.sqrt(D);
  const out = new Float32Array(q.length);
  const turned = new Float32Array(H * D);

  tables.own.forEach((_, t) => {
    const query = q.subarray(t * H * D, (t + 1) * H * D);
    const seen = tables.columns.map((name, b) => ({
      block: cache.blocks.get(name),
      b,
      visible: tables.visible[t][b],
    }));
    const total = tables.visible[t].reduce((sum, visible) => sum + visible, 0);
    const attention = Array.from({ length: H }, () => new Float64Array(total)); // block after block, key after key
    let start = 0;
    for (const { block, b, visible } of seen) {
      if (visible === 0) continue;
      // The query is rotated once for each block, by its distance from the block's start. Keys are not touched.
      if (is_rotated) rotate(query, 0, H * D, positions.query_rotation[t][b], turned, 0);
      else turned.set(query);
      const keys = block.keys[layer];
      for (let h = 0; h < H; h++) {
        const kv_head = Math.floor(h / G);
        for (let n = 0; n < visible; n++)
          attention[h][start + n] = scale * dot(turned, h * D, keys, (n * K + kv_head) * D, D);
      }
      start += visible;
    }
    for (let h = 0; h < H; h++) {
      softmax(attention[h]); // one, over all blocks together
      watch?.(layer, t, h, attention[h], tables);
      const mixed = new Float64Array(D);
      start = 0;
      for (const { block, visible } of seen) {
        mix(attention[h].subarray(start, start + visible), block.values[layer], Math.floor(h / G) * D, K * D, mixed);
        start += visible;
      }
      out.set(mixed, (t * H + h) * D);
    }
  });
  return out;
}

/** Add to `mixed` the values of a block's tokens, each times its weight; they lie `stride` numbers apart. */
function mix(attention, values, start, stride, mixed) {
  for (let n = 0; n < attention.length; n++, start += stride) {
    const weight = attention[n];
    for (let i = 0; i < mixed.length; i++) mixed[i] += weight * values[start + i];
  }
}

/** SwiGLU, [T, E] in and out. */
function mlp(x, T, layer) {
  const gate = linear(x, T, layer.gate);
  const up = linear(x, T, layer.up);
  for (let i = 0; i < gate.length; i++) up[i] *= gate[i] / (1 + Math.exp(-gate[i]));
  return linear(up, T, layer.down);
}

// ---- arithmetic

/** x [T, inputs] times a matrix [outputs, inputs], and its bias if it has one: [T, outputs]. */
function linear(x, T, matrix) {
  const { bias, outputs } = matrix;
  const y = new Float32Array(T * outputs);
  for (let o = 0; o < outputs; o += 4)
    // Rows within: so a row of weights is read from memory once, for all workers
    for (let t = 0; t < T; t += 2)
      multiply_tile(x, t, Math.min(t + 1, T - 1), matrix, o, y);
  if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % outputs];
  return y;
}

/**
 * Two rows of x, `t` and `u`, times four of the matrix, from `o0` on: what is read once serves two or four products,
 * which is faster than one product after the other. Where rows are missing, the last one is taken again.
 */
function multiply_tile(x, t, u, { data, outputs, inputs }, o0, y) {
  const last = outputs - 1;
  const o1 = Math.min(o0 + 1, last);
  const o2 = Math.min(o0 + 2, last);
  const o3 = Math.min(o0 + 3, last);
  let t0 = 0; // the sum of row t times row o0, and so on
  let t1 = 0;
  let t2 = 0;
  let t3 = 0;
  let u0 = 0;
  let u1 = 0;
  let u2 = 0;
  let u3 = 0;
  for (let i = 0; i < inputs; i++) {
    const a = x[t * inputs + i];
    const b = x[u * inputs + i];
    let weight = data[o0 * inputs + i];
    t0 += a * weight;
    u0 += b * weight;
    weight = data[o1 * inputs + i];
    t1 += a * weight;
    u1 += b * weight;
    weight = data[o2 * inputs + i];
    t2 += a * weight;
    u2 += b * weight;
    weight = data[o3 * inputs + i];
    t3 += a * weight;
    u3 += b * weight;
  }
  y[t * outputs + o0] = t0;
  y[t * outputs + o1] = t1;
  y[t * outputs + o2] = t2;
  y[t * outputs + o3] = t3;
  y[u * outputs + o0] = u0;
  y[u * outputs + o1] = u1;
  y[u * outputs + o2] = u2;
  y[u * outputs + o3] = u3;
}

/** The sum of products of `count` numbers. In four sums: else each addition would wait for the one before it. */
function dot(a, a_start, b, b_start, count) {
  let first = 0;
  let second = 0;
  let third = 0;
  let fourth = 0;
  let i = 0;
  for (; i + 3 < count; i += 4) {
    first += a[a_start + i] * b[b_start + i];
    second += a[a_start + i + 1] * b[b_start + i + 1];
    third += a[a_start + i + 2] * b[b_start + i + 2];
    fourth += a[a_start + i + 3] * b[b_start + i + 3];
  }
  for (; i < count; i++) first += a[a_start + i] * b[b_start + i];
  return first + second + third + fourth;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** RMSNorm of rows that are as long as `weight`. */
function norm(x, weight, eps) {
  const width = weight.length;
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    const factor = 1 / Math.sqrt(dot(x, start, x, start, width) / width + eps);
    for (let i = 0; i < width; i++) y[start + i] = x[start + i] * factor * weight[i];
  }
  return y;
}

/** In place. The largest is taken off first, or the exponentials of large scores would overflow. */
function softmax(scores) {
  let largest = -Infinity;
  for (const score of scores) largest = Math.max(largest, score);
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - largest);
  for (let i = 0; i < scores.length; i++) scores[i] /= sum;
}
