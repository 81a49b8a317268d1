// Text to token ids and back, and when a paragraph ends: what loop.js needs to know about words.

import { require } from "./engine.js";

// What would make a BPE work otherwise
const UNKNOWN_IN_BPE = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"];

/** A byte-level BPE that takes a text whole, as duet's tokenizer.json has it. Others are refused. */
export class Tokenizer {
  constructor(json) {
    const { model, pre_tokenizer, normalizer, added_tokens } = json;
    const splits_nowhere =
      pre_tokenizer?.type === "ByteLevel" && pre_tokenizer.use_regex === false && !pre_tokenizer.add_prefix_space;
    const is_plain = model?.type === "BPE" && !UNKNOWN_IN_BPE.some(key => model[key]);
    const has_all_bytes = is_plain && letters_of_bytes().every(letter => letter in model.vocab);
    const is_known = has_all_bytes && splits_nowhere && !normalizer;
    require(is_known, "tokenizer.json: only byte-level BPE that splits and changes no text is supported here");
    this.ids = new Map(Object.entries(model.vocab));
    this.ranks = new Map(model.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.spellings = new Map([...this.ids].map(([spelling, id]) => [id, spelling]));
    this.special = new Set(added_tokens.filter(token => token.special).map(token => token.id));
    const letters = letters_of_bytes();
    this.letters = letters;
    this.bytes = new Map(letters.map((letter, byte) => [letter, byte]));
  }

  /** Bytes, then one merge after the other: of all neighbours those that were merged first in training. */
  encode(text) {
    const parts = [...new TextEncoder().encode(text)].map(byte => this.letters[byte]);
    while (true) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map(part => this.ids.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  /** The bytes of a token; special tokens, such as end-of-sequence, have none. */
  bytes_of(id) {
    if (this.special.has(id) || !this.spellings.has(id)) return new Uint8Array(0);
    return Uint8Array.from([...this.spellings.get(id)].map(letter => this.bytes.get(letter)));
  }

  decode(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // a byte order mark stays in the text
    return decoder.decode(Uint8Array.from(ids.flatMap(id => [...this.bytes_of(id)])));
  }
}

/** GPT-2's alphabet: a visible letter for each of the 256 bytes, most of them by the letter that they are. */
function letters_of_bytes() {
  const is_visible = byte => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(is_visible(byte) ? byte : others++));
}

/** Put values in the place of `{key}`; all other braces stay. */
export function fill(template, values) {
  return template.replace(/\{(\w+)\}/g, (whole, key) => (Object.hasOwn(values, key) ? values[key] : whole));
}

// ---- when a paragraph ends: as prompts.py has it

const TERMINATORS = ".!?…‼⁇⁈⁉‽。．！？｡।॥؟۔։።፧၊။។៕᙮᠃᠉᭚᭛꓿꘎꘏⸮";
const SKIPPED = /["'*_~` \p{Pe}\p{Pf}\p{Pi}]/u; // when looking back for the end of a sentence: closing marks
const FENCE_LINE = /^(?:[^\p{L}\p{N}_`~]|\p{Nd}+[.)])*(?<fence>`{3,}|~{3,})(?<language>[^`]*)$/u;
const SPACE_AT_THE_END = /[\p{Z}\t-\r\x1c-\x1f\x85]+$/u; // what Python takes for white space; trimEnd() does not quite

const trim_end = text => text.replace(SPACE_AT_THE_END, "");

/** Does the text end with a blank line, after a sentence, a code fence or a `$$`; and not inside of those two? */
export function paragraph_closed(text) {
  const visible = trim_end(text);
  const line_breaks = text.slice(visible.length).split("\n").length - 1;
  if (line_breaks < 2) return false;
  const prose = without_code(visible);
  if (prose === null) return false;
  const parts = prose.split("$$"); // text, formula, text, formula, ..., text
  if (parts.length % 2 === 0) return false;
  const last_text = (parts.length > 1 ? "." : "") + parts.at(-1); // a formula ends a sentence, as code does
  return ends_a_sentence(last_text);
}

/** The text with a full stop in the place of each code block; null where one is still open. */
function without_code(text) {
  const prose = [];
  let open_fence = "";
  for (const line of text.split("\n")) {
    const mark = line.match(FENCE_LINE)?.groups;
    if (open_fence) {
      if (mark?.fence.startsWith(open_fence) && trim_end(mark.language) === "") {
        open_fence = "";
        prose.push(".");
      }
    } else if (mark) open_fence = mark.fence;
    else prose.push(line);
  }
  return open_fence ? null : prose.join("\n");
}

function ends_a_sentence(text) {
  const last = [...trim_end(text)].reverse().find(character => !SKIPPED.test(character));
  return last !== undefined && TERMINATORS.includes(last);
}
