// Sheets of sums: what duet was taught, said line by line; what a line comes to; and new sheets.

const MOST_LINES = 14; // in training; on longer sheets it gets digits wrong
const LETTERS = "abcdefghijklmnopqrstuvwxyz";

/**
 * The lines of a sheet: [{text, name, terms, value, problem}]. `problem` is null, or {short, long}: what duet does not
 * understand, for beside the line, and as a sentence. Empty lines at the end do not count.
 */
export function read_sheet(text) {
  const lines = [];
  for (const written of text.trimEnd().split("\n")) lines.push(read_line(written, lines));
  return lines;
}

function read_line(written, before) {
  const line = { text: written.trim(), name: null, terms: [], value: null, problem: null };
  const refuse = (short, long) => ({ ...line, problem: { short, long } });

  if (before.length === MOST_LINES)
    return refuse("too many lines", `duet was taught sheets of at most ${MOST_LINES} lines.`);
  if (line.text === "") return refuse("empty", "Each line is a sum, such as c = 30 + 45.");
  const parts = line.text.match(/^(\w+)\s*=\s*(\w+)\s*\+\s*(\w+)$/);
  if (!parts)
    return refuse(
      "not “c = 30 + 45”",
      "A line is a letter, =, and two things added, such as c = 30 + 45 or c = a + b.",
    );
  const [, name, ...terms] = parts;

  if (!/^[a-z]$/.test(name))
    return refuse("its name: one letter", "A line's name is one small letter, as in c = 30 + 45.");
  // Letters are counted from the first line whose name is understood: that need not be the first line
  const named = before.findIndex(other => other.name !== null);
  const expected = named < 0 ? name : LETTERS[LETTERS.indexOf(before[named].name) + before.length - named];
  if (expected === undefined)
    return refuse("no letter after z", "Lines are named in the order of the alphabet, which ends at z.");
  if (name !== expected)
    return refuse(
      `must be called ${expected}`,
      `Lines are named in the order of the alphabet, so this one is ${expected}.`,
    );

  line.name = name; // also where the rest is wrong: lines below may add it

  // By their places: a line that is not understood yet has no name of its own, and may be added all the same
  const names_above = before.map((_, n) => LETTERS[LETTERS.indexOf(name) - before.length + n]);

  const are_numbers = terms.map(term => /^\d+$/.test(term));
  if (are_numbers[0] !== are_numbers[1])
    return refuse(
      "a number and a name",
      "duet adds two numbers, or two lines, and never one of each: write c = 30 + 45 or c = a + b.",
    );
  if (are_numbers[0]) {
    const wrong = terms.find(term => !/^(0|[1-9]\d{0,2})$/.test(term));
    if (wrong !== undefined)
      return refuse(
        `${wrong}: only 0 to 999`,
        `duet knows numbers from 0 to 999, without zeros before them; not ${wrong}.`,
      );
  } else {
    const unknown = terms.find(term => !names_above.includes(term));
    if (unknown !== undefined)
      return refuse(
        `no ${unknown} above it`,
        `A line may only add lines that stand above it, and ${unknown} does not.`,
      );
    if (terms[0] === terms[1])
      return refuse(`${terms[0]} twice`, `duet was taught to add two different lines, not ${terms[0]} to itself.`);
  }

  line.text = `${name} = ${terms[0]} + ${terms[1]}`;
  line.terms = terms;
  const value_of = term => (are_numbers[0] ? Number(term) : before[names_above.indexOf(term)].value);
  const values = terms.map(value_of);
  if (values.includes(null)) return line; // a line that it adds has a problem of its own
  line.value = values[0] + values[1];
  if (line.value > 9999)
    return refuse("comes to more than 9999", `This comes to ${line.value}: duet was taught results up to 9999.`);
  return line;
}

/** A sheet like those that duet was taught: from the third line on, one in three needs two others. */
export function make_sheet(lines = 12, random = Math.random) {
  const below = most => Math.floor(random() * most);
  const number = () => {
    const digits = 1 + below(3);
    const least = digits > 1 ? 10 ** (digits - 1) : 0;
    return least + below(10 ** digits - least);
  };
  const written = [];
  for (let n = 0; n < lines; n++) {
    const first = below(n);
    const second = (first + 1 + below(n - 1)) % n; // another one
    const needs_others = n >= 2 && random() < 1 / 3;
    const terms = needs_others ? [LETTERS[first], LETTERS[second]] : [number(), number()];
    written.push(`${LETTERS[n]} = ${terms[0]} + ${terms[1]}`);
  }
  const sheet = written.join("\n");
  return read_sheet(sheet).some(line => line.problem) ? make_sheet(lines, random) : sheet;
}
